"""GAME (Chefer et al., 2021, "generic attention-model explainability"), for self-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.trace import Heads, Record


@dataclass(frozen=True)
class Game:
    """R starts as I; by layer C = mean over heads of ReLU(∂s/∂A ⊙ A), R <- R + C R; H = R[query].

    Here s is the logit, for a CLIP the cosine over its temperature. With several layers its scale
    changes more than that of the map, because it sums products of layers and single layers.

    Attributes:
        layers: All, the generic definition; or the last alone, as in the authors' script.
    """

    layers: Literal["all", "last"] = "all"
    heads: Heads = "all"

    @property
    def depth(self) -> int | None:
        """Layers that are recorded."""
        return None if self.layers == "all" else 1

    def from_record(self, record: Record, target: Float[Tensor, "P D"]) -> Float[Tensor, "P N"]:
        """Relevance of every token for each target."""
        logit = record.logit_scale * record.opened.score(record.embedding, target).sum()
        nodes = [layer.attention for layer in record.layers]
        gradients = torch.autograd.grad(logit, nodes, retain_graph=True)
        count = nodes[0].shape[-1]
        relevance = torch.eye(count, device=logit.device).expand(len(target), -1, -1)
        for weights, gradient in zip(nodes, gradients, strict=True):
            cam = (gradient * weights.detach()).relu().mean(1)
            relevance = relevance + cam @ relevance
        return record.of_query(relevance)
