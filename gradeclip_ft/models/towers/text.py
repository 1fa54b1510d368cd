"""Adapter: open_clip's causal text transformers, at any context length.

With a causal mask and pooling at the end of the text, later positions cannot influence the result,
so token ids may be cut behind the longest text of a batch: the embedding is the same and cheaper.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError
from gradeclip_ft.models.towers import block as parts
from gradeclip_ft.models.trace import Trace, trace_layer


class TextTower:
    """Text tower around an open_clip CLIP or the TextTransformer of a CustomTextCLIP."""

    def __init__(self, text: Foreign) -> None:
        self._text = text
        self._pool = str(getattr(text, "pool_type", getattr(text, "text_pool_type", "")))
        self._eos = int(getattr(text, "eos_id", getattr(text, "text_eos_id", -1)) or -1)
        _check(text, self._pool)
        blocks = text.transformer.resblocks
        self._last = blocks[-1]
        self.width = int(text.transformer.width)
        self.heads = int(self._last.attn.num_heads)
        self.depth = len(blocks)
        self.context_length = int(text.positional_embedding.shape[0])

    def encode(self, x: Int[Tensor, "M L"]) -> Float[Tensor, "M D"]:
        """Embeddings F_T, not normalised, equal to `encode_text` at the full context."""
        return self.trace(x).embedding

    def trace(self, x: Int[Tensor, "M L"]) -> Trace:
        """The last layer of this forward pass; the query is the end of the text."""
        text, length = self._text, x.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"texts have {length} tokens, expected at most {self.context_length}; tokenise "
                "them with the model's own tokenizer"
            )
        dtype = text.transformer.get_cast_dtype()
        embedded = text.token_embedding(x).to(dtype) + text.positional_embedding[:length].to(dtype)
        mask = text.attn_mask[:length, :length]

        def step(block: Foreign, rows: Tensor) -> Tensor:
            result: Tensor = block(rows, attn_mask=mask)
            return result

        tokens = parts.run_blocks(
            text.transformer.resblocks[:-1],
            embedded,
            step,
            checkpointed=text.transformer.grad_checkpointing,
        )
        query = self._query(x)
        position = torch.arange(length, device=x.device)
        return trace_layer(
            tokens,
            query,
            attend=self._attend,
            finish=self._finish,
            project=self._last.attn.out_proj,
            heads=self.heads,
            explained=(position > 0) & (position < query.unsqueeze(1)),
            mask=mask[query],
        )

    def _query(self, ids: Tensor) -> Tensor:
        if self._pool == "argmax":
            return ids.argmax(dim=-1)
        return torch.eq(ids, self._eos).int().argmax(dim=-1)

    def _attend(self, tokens: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return parts.query_key_value(self._last, tokens, query)

    def _finish(self, x: Tensor, o: Tensor) -> Tensor:
        x = self._text.ln_final(parts.behind_attention(self._last, x, o))
        projection = self._text.text_projection
        if projection is None:
            return x
        result: Tensor = projection(x) if isinstance(projection, nn.Linear) else x @ projection
        return result


def _check(text: Foreign, pool: str) -> None:
    problems = {
        "has no open_clip transformer": not hasattr(text, "transformer")
        or not hasattr(text.transformer, "resblocks"),
        "appends a class token": getattr(text, "cls_emb", None) is not None,
        "masks its padding": bool(getattr(text, "use_pad_mask", False)),
        "has no causal mask": getattr(text, "attn_mask", None) is None,
        f"pools by {pool!r}": pool not in ("argmax", "eos"),
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise UnsupportedTowerError(
            f"text tower {found[0]}, expected a causal tower that pools at the end of the text; "
            "choose ViT-B-16 or EVA02-B-16, for example"
        )
    parts.check_blocks(text.transformer.resblocks, "text tower")
