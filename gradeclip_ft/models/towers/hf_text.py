"""Adapter: Hugging Face encoders as text towers (BERT's and RoBERTa's layout).

Padding is masked in every layer, so cutting it off is exact. A tower that pools its first token has
a query row and can be explained; one that averages has none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError
from gradeclip_ft.models.trace import Trace, query_rows, trace_layer

POOLERS = ("ClsPooler", "ClsLastHiddenStatePooler")
LAYOUTS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


class HuggingFaceTextTower:
    """Text tower around an HFTextEncoder that pools the first token."""

    unexplained: str | None = None
    pooling = "first token"
    cuts_exactly = True

    def __init__(self, text: Foreign) -> None:
        check_pooling(text)
        self._text, self._last = text, text.transformer.encoder.layer[-1]
        config = text.config
        self.width = int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        self.depth = int(config.num_hidden_layers)
        self.context_length = context_length(text)
        self.pad = int(config.pad_token_id)

    def encode(self, x: Int[Tensor, "M L"]) -> Float[Tensor, "M D"]:
        """Embeddings F_T, not normalised, as the library computes them."""
        result = self._text(x)
        embedding: Tensor = result[0] if isinstance(result, tuple) else result
        return embedding

    def trace(self, x: Int[Tensor, "M L"]) -> Trace:
        """The last layer of this forward pass; the query is the first token."""
        visible = x != self.pad
        layers = self._text.transformer(
            input_ids=x, attention_mask=visible.long(), output_hidden_states=True
        ).hidden_states
        tokens: Tensor = layers[-2]
        hidden = torch.zeros_like(tokens[..., 0]).masked_fill(~visible, -torch.inf)
        position = torch.arange(x.shape[1], device=x.device)
        last = visible.sum(1, keepdim=True) - 1  # the separator behind the words
        return trace_layer(
            tokens,
            x.new_zeros(len(x)),
            attend=self._attend,
            finish=self._finish,
            project=self._last.attention.output.dense,
            heads=self.heads,
            explained=(position > 0) & (position < last),
            mask=hidden,
        )

    def _attend(self, tokens: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        attention = self._last.attention.self
        row = query_rows(tokens, query)
        return attention.query(row), attention.key(tokens), attention.value(tokens)

    def _finish(self, x: Tensor, o: Tensor) -> Tensor:
        """Post-norm tail of the layer, then the pooler of the tower and its projection."""
        text, after = self._text, self._last.attention.output
        x = after.LayerNorm(after.dense(o) + x)
        mixed = self._last.output.dense(self._last.intermediate(x))
        x = self._last.output.LayerNorm(mixed + x)
        pooler = getattr(text.transformer, "pooler", None)
        if pooler is not None and getattr(text.pooler, "use_pooler_output", False):
            x = pooler.activation(pooler.dense(x))
        result: Tensor = text.proj(x)
        return result


def context_length(text: Foreign) -> int:
    """Positions of the encoder that a text may fill."""
    config = text.config
    first = int(config.pad_token_id) + 1 if "roberta" in config.model_type else 0
    return int(getattr(config, "max_position_embeddings", 512)) - first


def check_pooling(text: Foreign) -> None:
    """Refuse an encoder without a query row, or of another layout.

    Raises:
        UnsupportedTowerError: It is one.
    """
    pooler = type(text.pooler).__name__
    if pooler not in POOLERS:
        raise UnsupportedTowerError(
            f"text tower averages its tokens ({pooler}), text explanation needs a pooled token"
        )
    if text.config.model_type not in LAYOUTS:
        raise UnsupportedTowerError(f"text tower has the layers of {text.config.model_type!r}")
