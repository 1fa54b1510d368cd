"""Unit vectors and cosines, always in single precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(embeddings, targets), row by row, to what is explained: one number per row."""


def unit(x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """Rows divided by their length, in fp32; a row of length 0 stays 0."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def cosine(a: Float[Tensor, "R D"], b: Float[Tensor, "R D"]) -> Float[Tensor, " R"]:
    """Score S = unit(a) · unit(b), row by row (Grad-ECLIP, eq. 1); no temperature."""
    return (unit(a) * unit(b)).sum(-1)


def product(a: Float[Tensor, "R D"], b: Float[Tensor, "R D"]) -> Float[Tensor, " R"]:
    """Row by row a · b: of class logits and the unit vector of a class, the logit of that class."""
    return (a.float() * b.float()).sum(-1)
