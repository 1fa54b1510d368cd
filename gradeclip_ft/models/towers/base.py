"""What every tower with a pass can: encode, and trace its last layer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float, Shaped
from torch import Tensor

from gradeclip_ft.models.passes import Pass
from gradeclip_ft.models.trace import Trace
from gradeclip_ft.ops.similarity import cosine


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
