"""Adapter: open_clip's own text transformers: CLIP's and EVA's, SigLIP's, CoCa's.

With a causal mask and pooling at the end of the text, later positions cannot influence the result,
so token ids may be cut behind the longest text of a batch: the embedding is the same and cheaper.
That holds neither for SigLIP (every position sees all, the last one is pooled) nor for CoCa (its
class token stands behind the last position).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError
from gradeclip_ft.models.towers import block as parts
from gradeclip_ft.models.trace import Trace, trace_layer

POOLING = {
    "argmax": "end of the text",
    "eos": "end of the text",
    "last": "last position",
    "class": "class token behind the text",
}


class TransformerTextTower:
    """Text tower around an open_clip CLIP or the TextTransformer of a CustomTextCLIP or CoCa."""

    unexplained: str | None = None

    def __init__(self, text: Foreign) -> None:
        self._text = text
        self._class_token = getattr(text, "cls_emb", None) is not None
        self._pool = "class" if self._class_token else _pool(text)
        self._eos = int(getattr(text, "eos_id", getattr(text, "text_eos_id", -1)) or -1)
        _check(text, self._pool)
        blocks = text.transformer.resblocks
        self._last = blocks[-1]
        self.width = int(text.transformer.width)
        self.heads = int(self._last.attn.num_heads)
        self.depth = len(blocks)
        self.pooling = POOLING[self._pool]
        self.context_length = int(text.positional_embedding.shape[0]) - self._class_token
        self.pad = int(getattr(text, "pad_id", 0) or 0)
        self.cuts_exactly = (
            self._pool in ("argmax", "eos") and getattr(text, "attn_mask", None) is not None
        )

    def encode(self, x: Int[Tensor, "M L"]) -> Float[Tensor, "M D"]:
        """Embeddings F_T, not normalised, equal to `encode_text` at the full context."""
        return self.trace(x).embedding

    def trace(self, x: Int[Tensor, "M L"]) -> Trace:
        """The last layer of this forward pass; the query is the position that is pooled.

        Raises:
            ValueError: More tokens than positions, or fewer where the tower needs all of them.
        """
        self._check_length(x.shape[1])
        rows = self._embed(x)
        mask = self._mask(x)

        def step(block: Foreign, rows: Tensor) -> Tensor:
            result: Tensor = block(rows, attn_mask=mask)
            return result

        tokens = parts.run_blocks(
            self._text.transformer.resblocks[:-1],
            rows,
            step,
            checkpointed=self._text.transformer.grad_checkpointing,
        )
        query = self._query(x)
        seen = _row(mask, query)
        return trace_layer(
            tokens,
            query,
            attend=self._attend,
            finish=self._finish,
            project=self._last.attn.out_proj,
            heads=self.heads,
            explained=self._words(x, tokens.shape[1], seen),
            mask=seen,
        )

    def _embed(self, ids: Tensor) -> Tensor:
        text = self._text
        dtype = text.transformer.get_cast_dtype()
        rows: Tensor = text.token_embedding(ids).to(dtype)
        if self._class_token:
            rows = torch.cat([rows, text.cls_emb.to(dtype).expand(len(ids), 1, -1)], dim=1)
        positions: Tensor = text.positional_embedding[: rows.shape[1]].to(dtype)
        return rows + positions

    def _mask(self, ids: Tensor) -> Tensor | None:
        """Additive mask: (N, N), with the padding (M·A, N, N), or None."""
        text, length = self._text, ids.shape[1] + self._class_token
        causal: Tensor | None = getattr(text, "attn_mask", None)
        if causal is not None:
            causal = causal[:length, :length]
        if not self._class_token:
            return causal
        padding: Tensor = text._build_additive_mask(ids, length, text.positional_embedding.dtype)
        return padding if causal is None else causal + padding

    def _query(self, ids: Tensor) -> Tensor:
        if self._pool == "argmax":
            return ids.argmax(dim=-1)
        if self._pool == "eos":
            return torch.eq(ids, self._eos).int().argmax(dim=-1)
        return torch.full_like(ids[:, 0], ids.shape[1] - 1 + self._class_token)

    def _words(self, ids: Tensor, length: int, seen: Tensor | None) -> Bool[Tensor, "M N"]:
        """The positions that hold words: neither start, nor end, nor padding, nor hidden."""
        position = torch.arange(length, device=ids.device)
        if self._pool == "last":  # the tokenizer ends and fills up with one id
            return (ids != ids[:, -1:]) & (position < length - 1)
        end = self._query(ids) if self._pool != "class" else ids.argmax(dim=-1)
        words = (position > 0) & (position < end.unsqueeze(1))
        return words if seen is None else words & (seen == 0)

    def _attend(self, tokens: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return parts.query_key_value(self._last, tokens, query)

    def _finish(self, x: Tensor, o: Tensor) -> Tensor:
        x = self._text.ln_final(parts.behind_attention(self._last, x, o))
        projection = self._text.text_projection
        if projection is None:
            return x
        result: Tensor = projection(x) if isinstance(projection, nn.Linear) else x @ projection
        return result

    def _check_length(self, length: int) -> None:
        if length > self.context_length:
            raise ValueError(
                f"texts have {length} tokens, expected at most {self.context_length}; tokenise "
                "them with the model's own tokenizer"
            )
        if length < self.context_length and not self.cuts_exactly:
            raise ValueError(
                f"texts have {length} tokens, expected all {self.context_length}: this tower "
                f"pools the {self.pooling}, so a cut context would change the result; tokenise "
                "without trimming"
            )


def _row(mask: Tensor | None, query: Tensor) -> Float[Tensor, "M N"] | None:
    """The mask of the query row; with padding, heads of one text share theirs."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[query]
    own = mask.view(len(query), -1, *mask.shape[1:])[:, 0]
    return own[torch.arange(len(query), device=query.device), query]


def _pool(text: Foreign) -> str:
    return str(getattr(text, "pool_type", getattr(text, "text_pool_type", "")))


def _check(text: Foreign, pool: str) -> None:
    problems = {
        "has no open_clip transformer": not hasattr(text, "transformer")
        or not hasattr(text.transformer, "resblocks"),
        "masks its padding": bool(getattr(text, "use_pad_mask", False)) and pool != "class",
        f"pools by {pool!r}": pool not in POOLING,
        "pools the last position of a causal mask": pool == "last"
        and getattr(text, "attn_mask", None) is not None,
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise UnsupportedTowerError(f"text tower {found[0]}")
    parts.check_blocks(text.transformer.resblocks, "text tower")
