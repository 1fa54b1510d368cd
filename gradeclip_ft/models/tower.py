"""What an adapter around an encoder offers."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor

from gradeclip_ft.batch import PackedTexts
from gradeclip_ft.models.passes import Pass
from gradeclip_ft.models.trace import Trace
from gradeclip_ft.ops.similarity import Score

Foreign: TypeAlias = Any
"""A module of open_clip or timm, whose attributes the adapters check by hand."""

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


class UnsupportedTowerError(ValueError):
    """The model has a part that the adapters do not reproduce exactly."""
