"""What an adapter around an encoder offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NoReturn, Protocol, TypeGuard, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor, cat
from torch.nn.functional import interpolate, linear

from gradeclip_ft.batch import PackedTexts
from gradeclip_ft.models.trace import Foreign, Pass, Pick, Trace, UnsupportedTowerError
from gradeclip_ft.ops.similarity import Score, cosine

EXPLAINED = "ViT-B-16, EVA02-B-16, RN50, ViT-B-16-SigLIP or coca_ViT-B-32"
"""Models with a trace, one of each kind, for error messages."""


@runtime_checkable
class Tower(Protocol):
    """One encoder of an open_clip model, image or text; owns no parameters.

    Attributes:
        width: Channels of a token; 0 where unknown.
        heads: Attention heads of the explained layer; 0 where there is none.
        depth: Number of blocks; 0 where unknown.
        pooling: What becomes the embedding, in words.
        unexplained: Why this tower has no trace; None where it has one.
    """

    width: int
    heads: int
    depth: int
    pooling: str
    unexplained: str | None

    @property
    def score(self) -> Score:
        """What is explained, from embeddings and targets: the cosine, or a class logit."""
        ...

    def encode(self, x: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B D"]:
        """Embeddings, not normalised, equal to those of the library."""
        ...

    def open(self, x: Shaped[Tensor, "B ..."]) -> Pass:
        """This forward pass, before its first layer.

        Raises:
            UnsupportedTowerError: The tower cannot be taken apart.
        """
        ...

    def trace(self, x: Shaped[Tensor, "B ..."]) -> Trace:
        """The last layer of this forward pass.

        Raises:
            UnsupportedTowerError: The tower has none that could be explained.
        """
        ...


@runtime_checkable
class ImageTower(Tower, Protocol):
    """The encoder of images.

    Attributes:
        patch: Side of a patch, or of a cell of the feature map, in pixels; 0 where unknown.
    """

    patch: int


@runtime_checkable
class TextTower(Tower, Protocol):
    """The encoder of texts.

    Attributes:
        context_length: Tokens at most.
        pad: Id of the padding.
        cuts_exactly: Whether padding may be cut off without changing the embedding.
    """

    context_length: int
    pad: int
    cuts_exactly: bool


@runtime_checkable
class PackingTower(Protocol):
    """A causal encoder of texts that takes several of them in one row.

    Attributes:
        cuts_exactly: Whether it is causal and pools at the end of the text.
    """

    cuts_exactly: bool

    def encode_packed(self, packed: PackedTexts) -> Float[Tensor, "M D"]:
        """Embeddings of all texts, not normalised, equal to those of `encode`."""
        ...


def packs(tower: TextTower) -> TypeGuard[PackingTower]:
    """Whether a tower takes packed texts."""
    return isinstance(tower, PackingTower) and tower.cuts_exactly


def image_grid(images: Shaped[Tensor, "B 3 H W"], patch: int) -> tuple[int, int]:
    """Patches of these images as (h, w).

    Raises:
        ValueError: A side is no multiple of the patch.
    """
    height, width = images.shape[2:]
    if height % patch or width % patch or not height or not width:
        near = [max(1, round(side / patch)) * patch for side in (height, width)]
        raise ValueError(
            f"images are {height}x{width} pixels, expected multiples of the patch size {patch}; "
            f"resize them to {near[0]}x{near[1]}, for example"
        )
    return height // patch, width // patch


def patch_grid(tower: ImageTower, height: int, width: int) -> tuple[int, int]:
    """Patches (h, w) of pictures of this size, where the tower need not be taken apart.

    Raises:
        UnsupportedTowerError: The tower does not say how large a patch is.
    """
    if not tower.patch:
        raise UnsupportedTowerError(
            f"{tower.unexplained}: it has no grid of patches, so no method draws a map"
        )
    return height // tower.patch, width // tower.patch


class PassTower(ABC):
    """A tower that says how its forward pass comes apart; everything else follows."""

    unexplained: str | None = None
    score = staticmethod(cosine)

    @abstractmethod
    def open(self, x: Shaped[Tensor, "B ..."]) -> Pass:
        """This forward pass, before its first layer."""

    def encode(self, x: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B D"]:
        """Embeddings, not normalised, equal to those of the library."""
        return self.trace(x).embedding

    def trace(self, x: Shaped[Tensor, "B ..."]) -> Trace:
        """The last layer of this forward pass."""
        return self.open(x).trace()


class OpaqueTower:
    """What every tower can: embeddings, as the library computes them."""

    width = 0
    heads = 0
    depth = 0
    pooling = "as the library does"
    score = staticmethod(cosine)

    def __init__(self, encoder: Foreign, reason: str) -> None:
        self._encoder = encoder
        self.unexplained: str | None = reason

    def encode(self, x: Tensor) -> Tensor:
        """Embeddings, not normalised."""
        result = self._encoder(x)
        embedding: Tensor = result[0] if isinstance(result, tuple) else result
        return embedding

    def open(self, x: Tensor) -> NoReturn:
        """Nothing to explain here.

        Raises:
            UnsupportedTowerError: Always; with the reason, and towers that do work.
        """
        raise UnsupportedTowerError(
            f"{self.unexplained}: it encodes, but has no heat maps and no dense features; choose "
            f"{EXPLAINED}, for example"
        )

    def trace(self, x: Tensor) -> NoReturn:
        """Nothing to explain here.

        Raises:
            UnsupportedTowerError: Always.
        """
        self.open(x)


class OpaqueImageTower(OpaqueTower):
    """An image tower without a trace: ConvNeXt, average pooling, ..."""

    patch = 0


class OpaqueTextTower(OpaqueTower):
    """A text tower without a trace.

    Attributes:
        context_length: Tokens at most.
        pad: Id of the padding.
        cuts_exactly: Whether padding may be cut off without changing the embedding.
    """

    def __init__(
        self, encoder: Foreign, reason: str, *, context_length: int, pad: int, cuts_exactly: bool
    ) -> None:
        super().__init__(encoder, reason)
        self.context_length = context_length
        self.pad = pad
        self.cuts_exactly = cuts_exactly


def library_text(model: Foreign) -> Any:
    """The text encoder of an open_clip model, nested or not, as a function of token ids."""
    return model.text if hasattr(model, "text") else model.encode_text


def project_fused(
    y: Tensor, pick: Pick, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Q of the picked rows, k and v of all.

    Args:
        y: Normed tokens (B, N, W).
        pick: Which rows need a query.
        weight: (3 C, W), the queries' part first.
        bias: (3 C), or None.
    """
    width = len(weight) // 3
    first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
    q = linear(pick(y), weight[:width], first)
    k, v = linear(y, weight[width:], rest).chunk(2, dim=-1)
    return q, k, v


def resample_positions(
    table: Float[Tensor, "N C"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "M C"]:
    """A table of position embeddings for another grid; leading rows (class, registers) stay.

    Bicubic without antialias, corners not aligned: what CLIPSelf, F-ViT and the Grad-ECLIP authors'
    script do. open_clip and timm antialias, which differs in the third digit.

    Args:
        table: Leading rows, then one row per cell of the old grid, row by row.
        old: (h, w) of the table.
        new: (h, w) wanted; the table itself comes back where both are equal.

    Raises:
        ValueError: The table is smaller than the old grid.
    """
    if old == new:
        return table
    first = len(table) - old[0] * old[1]
    if first < 0:
        raise ValueError(f"{len(table)} position embeddings, expected a {old[0]} x {old[1]} grid")
    cells = table[first:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = interpolate(cells, size=new, mode="bicubic", align_corners=False)
    rows = resized.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1)
    return cat([table[:first], rows.to(table.dtype)])
