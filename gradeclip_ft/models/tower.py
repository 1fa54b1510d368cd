"""What an adapter around an encoder offers."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor

from gradeclip_ft.models.trace import Trace

Foreign: TypeAlias = Any
"""A module of open_clip or timm, whose attributes the adapters check by hand."""


@runtime_checkable
class Tower(Protocol):
    """One encoder of an open_clip model, image or text; owns no parameters.

    Attributes:
        width: Channels of a token.
        heads: Attention heads of the last layer.
        depth: Number of layers.
    """

    width: int
    heads: int
    depth: int

    def encode(self, x: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B D"]:
        """Embeddings, not normalised, equal to those of the library."""
        ...

    def trace(self, x: Shaped[Tensor, "B ..."]) -> Trace:
        """The last layer of this forward pass."""
        ...


@runtime_checkable
class ImageTower(Tower, Protocol):
    """The encoder of images.

    Attributes:
        patch: Side of a patch in pixels.
    """

    patch: int


class UnsupportedTowerError(ValueError):
    """The model has a part that the adapters do not reproduce exactly."""
