"""Adapter: Hugging Face encoders as text towers (BERT's and RoBERTa's layout).

Padding is masked in every layer, so cutting it off is exact. A tower that pools its first token has
a query row and can be explained; one that averages has none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.models.passes import Layer, Pass, Pick
from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError
from gradeclip_ft.models.towers.base import PassTower
from gradeclip_ft.models.trace import Rows
from gradeclip_ft.ops.attention import attend as attend_all

POOLERS = ("ClsPooler", "ClsLastHiddenStatePooler")
LAYOUTS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


class BertTextTower(PassTower):
    """Text tower around an encoder of BERT's layout, whose first token becomes the embedding."""

    pooling = "first token"
    cuts_exactly = True

    def __init__(self, transformer: Foreign, head: Rows, context_length: int) -> None:
        self._transformer, self._head = transformer, head
        self._layers = tuple(_layer(layer) for layer in transformer.encoder.layer)
        config = transformer.config
        self.width = int(config.hidden_size)
        self.heads = int(config.num_attention_heads)
        self.depth = int(config.num_hidden_layers)
        self.context_length = context_length
        self.pad = int(config.pad_token_id)

    def open(self, x: Int[Tensor, "M L"]) -> Pass:
        """This forward pass; the query is the first token, the padding is hidden."""
        visible = x != self.pad
        tokens = self._transformer.embeddings(input_ids=x)
        hidden = torch.zeros_like(tokens[..., 0]).masked_fill(~visible, -torch.inf)
        position = torch.arange(x.shape[1], device=x.device)
        last = visible.sum(1, keepdim=True) - 1  # the separator behind the words
        return Pass(
            tokens,
            self._layers,
            self._head,
            x.new_zeros(len(x)),
            (position > 0) & (position < last),
            mask=hidden.unsqueeze(1).expand(-1, x.shape[1], -1),
        )


class HuggingFaceTextTower(BertTextTower):
    """Text tower around open_clip's HFTextEncoder that pools the first token."""

    def __init__(self, text: Foreign) -> None:
        check_pooling(text)
        super().__init__(text.transformer, self._pool, context_length(text))
        self._text = text

    def encode(self, x: Int[Tensor, "M L"]) -> Float[Tensor, "M D"]:
        """Embeddings F_T, not normalised, as the library computes them."""
        result = self._text(x)
        embedding: Tensor = result[0] if isinstance(result, tuple) else result
        return embedding

    def _pool(self, rows: Tensor) -> Tensor:
        """The pooler of the tower and its projection."""
        text = self._text
        pooler = getattr(text.transformer, "pooler", None)
        if pooler is not None and getattr(text.pooler, "use_pooler_output", False):
            rows = pooler.activation(pooler.dense(rows))
        result: Tensor = text.proj(rows)
        return result


def _layer(layer: Foreign) -> Layer:
    """A post-norm layer; run from its parts, whose signature outlives the whole's."""
    attention, after = layer.attention.self, layer.attention.output
    heads = int(attention.num_attention_heads)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        return attention.query(pick(tokens)), attention.key(tokens), attention.value(tokens)

    def finish(x: Tensor, o: Tensor) -> Tensor:
        x = after.LayerNorm(after.dense(o) + x)
        mixed = layer.output.dense(layer.intermediate(x))
        rows: Tensor = layer.output.LayerNorm(mixed + x)
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = attend(tokens, lambda rows: rows)
        return finish(tokens, attend_all(q, k, v, heads=heads, mask=mask)[0])

    return Layer(attend, finish, after.dense, after.dense, heads, run)


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
            f"text tower averages its tokens ({pooler}), words are explained where one is pooled"
        )
    if text.config.model_type not in LAYOUTS:
        raise UnsupportedTowerError(f"text tower has the layers of {text.config.model_type!r}")
