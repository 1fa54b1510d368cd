"""Adapters of text transformers: open_clip's own (CLIP, EVA, SigLIP, CoCa), and BERT's layout.

With a causal mask and pooling at the end of the text, later positions cannot influence the result,
so token ids may be cut after the longest text of a batch: the embedding is the same and cheaper.
That holds neither for SigLIP (every position sees all, the last one is pooled) nor for CoCa (its
class token follows the last position).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gradeclip_ft.batch import PackedTexts
from gradeclip_ft.models.tower import Tower, refuse_tower
from gradeclip_ft.models.towers.vit import block_layer, check_blocks
from gradeclip_ft.models.trace import Foreign, Layer, Pass, Pick, Rows
from gradeclip_ft.ops.attention import attend as attend_all

POOLING = {
    "argmax": "end of the text",
    "eos": "end of the text",
    "last": "last position",
    "class": "class token after the text",
}


def transformer_text_tower(text: Foreign) -> Tower:
    """The tower around an open_clip CLIP, or the TextTransformer of a CustomTextCLIP or CoCa.

    Embeddings are those of `encode_text` at the full context.

    Raises:
        UnsupportedTowerError: It has a part that is not reproduced.
    """
    class_token = getattr(text, "cls_emb", None) is not None
    own_pool = getattr(text, "pool_type", getattr(text, "text_pool_type", ""))
    pool = "class" if class_token else str(own_pool)
    causal = getattr(text, "attn_mask", None) is not None
    refuse_tower(
        "text tower",
        {
            "has no open_clip transformer": not hasattr(text, "transformer")
            or not hasattr(text.transformer, "resblocks"),
            "masks its padding": bool(getattr(text, "use_pad_mask", False)) and not class_token,
            f"pools by {pool!r}": pool not in POOLING,
            "pools the last position of a causal mask": pool == "last" and causal,
        },
    )
    transformer = text.transformer
    check_blocks(transformer.resblocks, "text tower")
    layers = tuple(block_layer(block) for block in transformer.resblocks)
    heads = layers[-1].heads
    context = int(text.positional_embedding.shape[0]) - class_token
    cuts_exactly = pool in ("argmax", "eos") and causal

    def query_of(ids: Tensor) -> Tensor:
        """The position that is pooled, (M)."""
        if pool == "argmax":  # the end of a text has the largest id
            return ids.argmax(dim=-1)
        if pool == "eos":  # the first of them, should the padding be the same id
            eos = int(getattr(text, "eos_id", getattr(text, "text_eos_id", -1)) or -1)
            return torch.eq(ids, eos).int().argmax(dim=-1)
        return torch.full_like(ids[:, 0], ids.shape[1] - 1 + class_token)

    def mask_of(ids: Tensor) -> Tensor | None:
        """Additive mask: (N, N), with the padding (M, N, N), or None."""
        length = ids.shape[1] + class_token
        mask: Tensor | None = getattr(text, "attn_mask", None)  # read now: it moves with the model
        if mask is not None:
            mask = mask[:length, :length]
        if not class_token:
            return mask
        # CoCa's hides the padding from the class token. The library repeats it for every head,
        # (M·A, N, N); one per text is enough here.
        dtype = text.positional_embedding.dtype
        padding: Tensor = text._build_additive_mask(ids, length, dtype)[::heads]
        return padding if mask is None else mask + padding

    def words_of(ids: Tensor, mask: Tensor | None) -> Bool[Tensor, "M N"]:
        """The positions that hold words: not start, end or padding, and not hidden."""
        length = ids.shape[1] + class_token
        position = torch.arange(length, device=ids.device)
        if pool == "last":  # SigLIP's tokenizer ends and pads with one id, and marks no start
            return (ids != ids[:, -1:]) & (position < length - 1)
        end = ids.argmax(dim=-1) if class_token else query_of(ids)
        words = (position > 0) & (position < end.unsqueeze(1))
        if mask is None or mask.ndim == 2:  # a causal mask hides nothing before the end
            return words
        return words & (mask[:, -1] == 0)

    def head(rows: Tensor) -> Tensor:
        rows, projection = text.ln_final(rows), text.text_projection
        if projection is None:
            return rows
        linear = isinstance(projection, nn.Linear)
        embeddings: Tensor = projection(rows) if linear else rows @ projection
        return embeddings

    def open_pass(x: Int[Tensor, "M L"]) -> Pass:
        _check_length(x.shape[1], context, None if cuts_exactly else POOLING[pool])
        dtype = transformer.get_cast_dtype()
        rows: Tensor = text.token_embedding(x).to(dtype)
        if class_token:  # after the words, so that a causal mask lets it see all of them
            rows = torch.cat([rows, text.cls_emb.to(dtype).expand(len(x), 1, -1)], dim=1)
        tokens = rows + text.positional_embedding[: rows.shape[1]].to(dtype)
        mask, checkpointed = mask_of(x), transformer.grad_checkpointing
        query, words = query_of(x), words_of(x, mask)
        return Pass(tokens, layers, head, query, words, mask=mask, checkpointed=checkpointed)

    def encode_packed(packed: PackedTexts) -> Float[Tensor, "M D"]:
        dtype = transformer.get_cast_dtype()
        # A token's position is counted in its own text, not in the row that it shares.
        places = text.positional_embedding.to(dtype)[packed.position]
        tokens = text.token_embedding(packed.ids).to(dtype) + places  # (R, T, W)
        mask = torch.zeros_like(packed.hidden, dtype=dtype).masked_fill(packed.hidden, -torch.inf)
        words = torch.ones_like(packed.ids, dtype=torch.bool)
        checkpointed = transformer.grad_checkpointing
        opened = Pass(tokens, layers, head, None, words, mask=mask, checkpointed=checkpointed)
        # All layers run natively, the last one too: in a packed row most tokens end no text, and
        # `end` picks those that do, (R, T, W) to (M, W).
        rows = opened.run(tokens, 0, len(layers)).flatten(0, 1)
        return head(rows[packed.end])

    return Tower(
        open_pass,
        width=int(transformer.width),
        heads=heads,
        depth=len(layers),
        pooling=POOLING[pool],
        context_length=context,
        pad=int(getattr(text, "pad_id", 0) or 0),
        cuts_exactly=cuts_exactly,
        encode_packed=encode_packed if cuts_exactly else None,
    )


def _check_length(length: int, context: int, pooling: str | None) -> None:
    if length > context:
        raise ValueError(
            f"texts have {length} tokens, expected at most {context}; tokenise them with the "
            "model's own tokenizer"
        )
    if length < context and pooling is not None:
        raise ValueError(
            f"texts have {length} tokens, expected all {context}: this tower pools the {pooling}, "
            "so a cut context would change the result; tokenise without trimming"
        )


POOLERS = ("ClsPooler", "ClsLastHiddenStatePooler")
LAYOUTS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")


def bert_text_tower(
    transformer: Foreign, head: Rows, context_length: int, *, library: Foreign = None
) -> Tower:
    """The tower around an encoder of BERT's layout, whose first token becomes the embedding."""
    layers = tuple(_bert_layer(layer) for layer in transformer.encoder.layer)
    config = transformer.config
    pad = int(config.pad_token_id)

    def open_pass(x: Int[Tensor, "M L"]) -> Pass:
        visible = x != pad
        tokens = transformer.embeddings(input_ids=x)
        hidden = torch.zeros_like(tokens[..., 0]).masked_fill(~visible, -torch.inf)
        position = torch.arange(x.shape[1], device=x.device)
        last = visible.sum(1, keepdim=True) - 1  # the separator after the words
        return Pass(
            tokens,
            layers,
            head,
            x.new_zeros(len(x)),
            (position > 0) & (position < last),
            # Padding is hidden from every token, so it may be cut off without a change.
            mask=hidden.unsqueeze(1).expand(-1, x.shape[1], -1),
        )

    return Tower(
        open_pass,
        width=int(config.hidden_size),
        heads=int(config.num_attention_heads),
        depth=int(config.num_hidden_layers),
        pooling="first token",
        context_length=context_length,
        pad=pad,
        cuts_exactly=True,
        library=library,
    )


def hf_text_tower(text: Foreign) -> Tower:
    """The tower around open_clip's HFTextEncoder that pools the first token.

    Raises:
        UnsupportedTowerError: It averages its tokens, or has another layout.
    """
    pooler = type(text.pooler).__name__
    refuse_tower(
        "text tower",
        {
            f"averages its tokens ({pooler}), words are explained where one is pooled": pooler
            not in POOLERS,
            f"has the layers of {text.config.model_type!r}": text.config.model_type not in LAYOUTS,
        },
    )

    def head(rows: Tensor) -> Tensor:
        dense = getattr(text.transformer, "pooler", None)
        if dense is not None and getattr(text.pooler, "use_pooler_output", False):
            rows = dense.activation(dense.dense(rows))
        embeddings: Tensor = text.proj(rows)
        return embeddings

    # The library encodes, because in training it drops out what the layers' parts here do not.
    return bert_text_tower(text.transformer, head, context_length(text), library=text)


def context_length(text: Foreign) -> int:
    """Positions of an encoder of transformers that a text may fill."""
    config = text.config
    first = int(config.pad_token_id) + 1 if "roberta" in config.model_type else 0
    return int(getattr(config, "max_position_embeddings", 512)) - first


def _bert_layer(layer: Foreign) -> Layer:
    """A post-norm layer; run from its parts, whose signature outlives the whole's."""
    attention, after = layer.attention.self, layer.attention.output
    heads = int(attention.num_attention_heads)

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        return attention.query(pick(tokens)), attention.key(tokens), attention.value(tokens)

    def finish(x: Tensor, o: Tensor) -> Tensor:
        x = after.LayerNorm(after.dense(o) + x)  # post-norm: the norm follows the sum
        mixed = layer.output.dense(layer.intermediate(x))
        rows: Tensor = layer.output.LayerNorm(mixed + x)
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = attend(tokens, lambda rows: rows)
        return finish(tokens, attend_all(q, k, v, heads=heads, mask=mask)[0])

    return Layer(attend, finish, after.dense, after.dense, heads, run)
