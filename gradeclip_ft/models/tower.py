"""What an adapter around an encoder offers, and what several adapters share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from jaxtyping import Float, Shaped
from torch import Tensor, cat, long
from torch.nn.functional import interpolate, linear

from gradeclip_ft.batch import PackedTexts
from gradeclip_ft.models.trace import (
    Foreign,
    Layer,
    Pass,
    Pick,
    Rows,
    Trace,
    UnsupportedTowerError,
    patch_tokens,
)
from gradeclip_ft.ops.similarity import Score, cosine

EXPLAINED = "ViT-B-16, EVA02-B-16, RN50, ViT-B-16-SigLIP or coca_ViT-B-32"
"""Models with a trace, one of each kind, for error messages."""


@dataclass(frozen=True)
class Tower:
    """One encoder of a library's model, of images or of texts; owns no parameters.

    Attributes:
        open: Pixels or token ids to this forward pass, before its first layer. Raises an
            UnsupportedTowerError where the tower cannot be taken apart.
        width: Channels of a token; 0 where unknown.
        heads: Attention heads of the explained layer; 0 where there is none.
        depth: Number of blocks; 0 where unknown.
        pooling: What becomes the embedding, in words.
        patch: Images: side of a patch, or of a cell of the feature map, in pixels; 0 where unknown.
        context_length: Texts: tokens at most.
        pad: Texts: id of the padding.
        cuts_exactly: Texts: whether padding may be cut off without changing the embedding.
        encode_packed: Texts: embeddings of several texts per row, equal to those of `encode`; None
            where texts cannot share a row.
        score: What is explained, from embeddings and targets: the cosine, or a class logit.
        unexplained: Why this tower has no trace; None where it has one.
        library: The library's own encoder, where `encode` is to call it; None to take the trace's.
    """

    open: Callable[[Tensor], Pass]
    width: int = 0
    heads: int = 0
    depth: int = 0
    pooling: str = "as the library does"
    patch: int = 0
    context_length: int = 0
    pad: int = 0
    cuts_exactly: bool = False
    encode_packed: Callable[[PackedTexts], Tensor] | None = None
    score: Score = cosine
    unexplained: str | None = None
    library: Foreign = None

    def encode(self, x: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B D"]:
        """Embeddings, not normalised, equal to those of the library."""
        if self.library is None:
            return self.trace(x).embedding
        result = self.library(x)
        embedding: Tensor = result[0] if isinstance(result, tuple) else result
        return embedding

    def trace(self, x: Shaped[Tensor, "B ..."]) -> Trace:
        """The last layer of this forward pass.

        Raises:
            UnsupportedTowerError: The tower has none that could be explained.
        """
        return self.open(x).trace()


def opaque_tower(encoder: Foreign, reason: str, **known: int | bool) -> Tower:
    """What every tower can: embeddings, as the library computes them (ConvNeXt, means, ...).

    `known` are context_length, pad and cuts_exactly of texts; `reason` says why there is no trace.
    """

    def refuse_pass(x: Tensor) -> NoReturn:
        raise UnsupportedTowerError(
            f"{reason}: it encodes, but has no heat maps and no dense features; choose "
            f"{EXPLAINED}, for example"
        )

    return Tower(refuse_pass, unexplained=reason, library=encoder, **known)  # type: ignore[arg-type]


def refuse_tower(tower: str, problems: dict[str, bool]) -> None:
    """Raise an UnsupportedTowerError for the first problem that is present."""
    for problem, present in problems.items():
        if present:
            raise UnsupportedTowerError(f"{tower} {problem}")


def image_grid(images: Shaped[Tensor, "B 3 H W"], patch: int) -> tuple[int, int]:
    """Patches of these images as (h, w).

    Raises:
        ValueError: A side is not a multiple of the patch.
    """
    height, width = images.shape[2:]
    if height % patch or width % patch or not height or not width:
        near = [max(1, round(side / patch)) * patch for side in (height, width)]
        raise ValueError(
            f"images are {height}x{width} pixels, expected multiples of the patch size {patch}; "
            f"resize them to {near[0]}x{near[1]}, for example"
        )
    return height // patch, width // patch


def patch_grid(tower: Tower, height: int, width: int) -> tuple[int, int]:
    """Patches (h, w) of pictures of this size, where the tower need not be taken apart.

    Raises:
        UnsupportedTowerError: The tower does not say how large a patch is.
    """
    if not tower.patch:
        raise UnsupportedTowerError(
            f"{tower.unexplained}: it has no grid of patches, so no method draws a map"
        )
    return height // tower.patch, width // tower.patch


def embed_patches(
    x: Float[Tensor, "B 3 H W"],
    patchify: Rows,
    class_token: Tensor,
    table: Float[Tensor, "N C"],
    old: tuple[int, int],
    new: tuple[int, int],
) -> Float[Tensor, "B M C"]:
    """Class token and patches with their positions, resampled from the `old` to the `new` grid."""
    patches = patchify(x).flatten(2).transpose(1, 2)  # (B, h·w, C)
    # Under autocast the convolution gives bf16 while parameters are fp32; the library casts these
    # two to the dtype of the patches, and so must we to stay equal to it.
    first = class_token.to(patches.dtype).expand(len(patches), 1, -1)
    positions = resample_positions(table, old, new).to(patches.dtype)
    return cat([first, patches], dim=1) + positions


def image_pass(
    tokens: Float[Tensor, "B N W"],
    layers: tuple[Layer, ...],
    head: Rows,
    grid: tuple[int, int],
    *,
    learned_query: bool = False,
    checkpointed: bool = False,
) -> Pass:
    """The pass of an image tower, whose patches are its last tokens.

    The query is the first token, or that of an attention pool, which is learned.
    """
    query = None if learned_query else tokens.new_zeros(len(tokens), dtype=long)
    explained = patch_tokens(tokens, grid)
    return Pass(tokens, layers, head, query, explained, grid, checkpointed=checkpointed)


def residual_layer(
    attend: Callable[[Tensor, Pick], tuple[Tensor, Tensor, Tensor]],
    add: Rows,
    mix: Rows,
    project: Foreign,
    heads: int,
    run: Callable[[Tensor, Tensor | None], Tensor],
) -> Layer:
    """A block that adds attention to its rows, and then `mix`, its MLP, of the sum."""

    def finish(x: Tensor, o: Tensor) -> Tensor:
        # Row by row, so it takes one query row (B, W) as well as all patches (B, N, W).
        x = x + add(o)
        return x + mix(x)

    return Layer(attend, finish, add, project, heads, run)


def project_fused(
    y: Tensor, pick: Pick, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Q of the picked rows of the normed tokens (B, N, W), k and v of all; weight is (3 C, W)."""
    width = len(weight) // 3
    first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
    q = linear(pick(y), weight[:width], first)  # (B, C), or (B, N, C) where all rows are picked
    k, v = linear(y, weight[width:], rest).chunk(2, dim=-1)  # one product for both
    return q, k, v


def resample_positions(
    table: Float[Tensor, "N C"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "M C"]:
    """A table of position embeddings for another grid; leading rows (class, registers) stay.

    Bicubic without antialias, corners not aligned: what CLIPSelf, F-ViT and the Grad-ECLIP authors'
    script do. open_clip and timm antialias, which differs in the third digit.

    Raises:
        ValueError: The table is smaller than the old grid.
    """
    if old == new:
        return table
    first = len(table) - old[0] * old[1]
    if first < 0:
        raise ValueError(f"{len(table)} position embeddings, expected a {old[0]} x {old[1]} grid")
    cells = table[first:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, C, h, w)
    resized = interpolate(cells, size=new, mode="bicubic", align_corners=False)
    rows = resized.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1)
    return cat([table[:first], rows.to(table.dtype)])
