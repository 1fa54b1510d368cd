"""Towers that only encode: nothing in them can be explained, everything else works."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from gradeclip_ft.models.tower import EXPLAINED, Foreign, UnsupportedTowerError
from gradeclip_ft.ops.similarity import cosine


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
