"""Adapter: open_clip's VisionTransformer with a class token (OpenAI, LAION, DataComp, ...)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError
from gradeclip_ft.models.towers import block as parts
from gradeclip_ft.models.trace import Trace, class_token_query, trace_layer


class VitTower:
    """Image tower around a VisionTransformer."""

    def __init__(self, visual: Foreign) -> None:
        _check(visual)
        self._visual = visual
        self._last = visual.transformer.resblocks[-1]
        self.width = int(visual.transformer.width)
        self.heads = int(self._last.attn.num_heads)
        self.depth = len(visual.transformer.resblocks)
        self.patch = int(visual.patch_size[0])
        self.grid: tuple[int, int] = tuple(visual.grid_size)

    def encode(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Embeddings F_I, not normalised, equal to `encode_image`."""
        return self.trace(x).embedding

    def trace(self, x: Float[Tensor, "B 3 H W"]) -> Trace:
        """The last layer of this forward pass; the query is the class token."""
        _check_size(x, self._visual)
        transformer = self._visual.transformer
        tokens = parts.run_blocks(
            transformer.resblocks[:-1],
            self._visual._embeds(x),
            _step,
            checkpointed=transformer.grad_checkpointing,
        )
        query, explained = class_token_query(tokens)
        return trace_layer(
            tokens,
            query,
            attend=self._attend,
            finish=self._finish,
            project=self._last.attn.out_proj,
            heads=self.heads,
            explained=explained,
            grid=self.grid,
        )

    def _attend(self, tokens: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return parts.query_key_value(self._last, tokens, query)

    def _finish(self, x: Tensor, o: Tensor) -> Tensor:
        x = self._visual.ln_post(parts.behind_attention(self._last, x, o))
        projected: Tensor = x if self._visual.proj is None else x @ self._visual.proj
        return projected


def _step(block: Foreign, x: Tensor) -> Tensor:
    result: Tensor = block(x)
    return result


def _check(visual: Foreign) -> None:
    pool = "attention" if visual.attn_pool is not None else visual.pool_type
    if pool != "tok":
        raise UnsupportedTowerError(
            f"image tower pools by {pool!r}, expected the class token ('tok'); choose ViT-B-16 or "
            "EVA02-B-16, for example"
        )
    if not isinstance(visual.patch_dropout, nn.Identity) and visual.patch_dropout.prob > 0:
        raise UnsupportedTowerError(
            f"patch dropout is {visual.patch_dropout.prob}, expected 0: dropped tokens have no "
            "place on the grid of a heat map; load the model with patch dropout 0"
        )
    parts.check_blocks(visual.transformer.resblocks, "image tower")


def _check_size(images: Tensor, visual: Foreign) -> None:
    got, expected = tuple(images.shape[2:]), tuple(visual.image_size)
    if got != expected:
        raise ValueError(
            f"images are {got[0]}x{got[1]} pixels, expected {expected[0]}x{expected[1]}; resize "
            "them, or load the model with image_size= of that size"
        )
