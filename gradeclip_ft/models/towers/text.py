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

from gradeclip_ft.batch import PackedTexts
from gradeclip_ft.models.tower import PassTower
from gradeclip_ft.models.towers.vit import block_layer, check_blocks
from gradeclip_ft.models.trace import Foreign, Layer, Pass, Pick, Rows, UnsupportedTowerError
from gradeclip_ft.ops.attention import attend as attend_all

POOLING = {
    "argmax": "end of the text",
    "eos": "end of the text",
    "last": "last position",
    "class": "class token behind the text",
}


class TransformerTextTower(PassTower):
    """Text tower around an open_clip CLIP or the TextTransformer of a CustomTextCLIP or CoCa.

    Embeddings are those of `encode_text` at the full context, not normalised.
    """

    def __init__(self, text: Foreign) -> None:
        self._text = text
        self._class_token = getattr(text, "cls_emb", None) is not None
        self._pool = "class" if self._class_token else _pool(text)
        self._eos = int(getattr(text, "eos_id", getattr(text, "text_eos_id", -1)) or -1)
        _check(text, self._pool)
        blocks = text.transformer.resblocks
        self._layers = tuple(block_layer(block) for block in blocks)
        self.width = int(text.transformer.width)
        self.heads = self._layers[-1].heads
        self.depth = len(blocks)
        self.pooling = POOLING[self._pool]
        self.context_length = int(text.positional_embedding.shape[0]) - self._class_token
        self.pad = int(getattr(text, "pad_id", 0) or 0)
        self.cuts_exactly = (
            self._pool in ("argmax", "eos") and getattr(text, "attn_mask", None) is not None
        )

    def open(self, x: Int[Tensor, "M L"]) -> Pass:
        """This forward pass; the query is the position that is pooled.

        Raises:
            ValueError: More tokens than positions, or fewer where the tower needs all of them.
        """
        self._check_length(x.shape[1])
        tokens, mask, query = self._embed(x), self._mask(x), self._query(x)
        return self._pass(tokens, query, self._words(x, tokens.shape[1], mask), mask)

    def encode_packed(self, packed: PackedTexts) -> Float[Tensor, "M D"]:
        """Embeddings of all texts, equal to those of `encode`.

        Raises:
            ValueError: The tower is not causal.
        """
        text = self._text
        if not self.cuts_exactly:
            raise ValueError(f"this tower pools the {self.pooling}; texts cannot share a row")
        dtype = text.transformer.get_cast_dtype()
        places = text.positional_embedding.to(dtype)[packed.position]
        tokens = text.token_embedding(packed.ids).to(dtype) + places
        mask = torch.zeros_like(packed.hidden, dtype=dtype).masked_fill(packed.hidden, -torch.inf)
        opened = self._pass(tokens, None, torch.ones_like(packed.ids, dtype=torch.bool), mask)
        rows = opened.run(tokens, 0, self.depth).flatten(0, 1)
        return self._head(rows[packed.end])

    def _pass(
        self, tokens: Tensor, query: Tensor | None, explained: Tensor, mask: Tensor | None
    ) -> Pass:
        return Pass(
            tokens,
            self._layers,
            self._head,
            query,
            explained,
            mask=mask,
            checkpointed=self._text.transformer.grad_checkpointing,
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
        """Additive mask: (N, N), with the padding (M, N, N), or None."""
        text, length = self._text, ids.shape[1] + self._class_token
        causal: Tensor | None = getattr(text, "attn_mask", None)
        if causal is not None:
            causal = causal[:length, :length]
        if not self._class_token:
            return causal
        dtype = text.positional_embedding.dtype
        padding: Tensor = text._build_additive_mask(ids, length, dtype)[:: self.heads]
        return padding if causal is None else causal + padding

    def _query(self, ids: Tensor) -> Tensor:
        if self._pool == "argmax":
            return ids.argmax(dim=-1)
        if self._pool == "eos":
            return torch.eq(ids, self._eos).int().argmax(dim=-1)
        return torch.full_like(ids[:, 0], ids.shape[1] - 1 + self._class_token)

    def _words(self, ids: Tensor, length: int, mask: Tensor | None) -> Bool[Tensor, "M N"]:
        """The positions that hold words: neither start, nor end, nor padding, nor hidden."""
        position = torch.arange(length, device=ids.device)
        if self._pool == "last":  # the tokenizer ends and fills up with one id
            return (ids != ids[:, -1:]) & (position < length - 1)
        end = self._query(ids) if self._pool != "class" else ids.argmax(dim=-1)
        words = (position > 0) & (position < end.unsqueeze(1))
        if mask is None or mask.ndim == 2:  # a causal mask hides nothing before the end
            return words
        return words & (mask[:, -1] == 0)

    def _head(self, rows: Tensor) -> Tensor:
        rows = self._text.ln_final(rows)
        projection = self._text.text_projection
        if projection is None:
            return rows
        result: Tensor = (
            projection(rows) if isinstance(projection, nn.Linear) else rows @ projection
        )
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
    check_blocks(text.transformer.resblocks, "text tower")


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
