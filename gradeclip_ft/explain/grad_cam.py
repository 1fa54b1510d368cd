"""Grad-CAM on the input of the last block, as the Grad-ECLIP authors apply it to transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.models.trace import Heads, Trace


@dataclass(frozen=True)
class GradCam:
    """H_i = ReLU(Σ_c α_c x_ic), α the mean gradient of S over tokens (Selvaraju et al., eq. 1-2).

    Attributes:
        heads: How the last layer attends in S: with one head over all channels, as the authors'
            script differentiates it, or with the model's own.
        average: Mean over all tokens with the class token, as the authors' script does, or over the
            patches only.
        create_graph: Let gradients flow through the map.
    """

    heads: Heads = "one"
    average: Literal["all", "patches"] = "all"
    create_graph: bool = False

    def from_trace(
        self, trace: Trace, target: Float[Tensor, "P D"], owner: Int[Tensor, " P"]
    ) -> Float[Tensor, "P N"]:
        """Relevance of every token for each target."""
        tokens = trace.tokens[owner]
        if not (self.create_graph and tokens.requires_grad):
            tokens = tokens.detach().requires_grad_()
        score = trace.score(trace.replay(tokens, owner, self.heads), target)
        (gradient,) = torch.autograd.grad(score.sum(), tokens, create_graph=self.create_graph)
        explained = trace.explained[owner]
        if self.average == "all":
            weight = gradient.mean(1)
        else:
            inside = explained.unsqueeze(2)
            weight = (gradient * inside).sum(1) / inside.sum(1).clamp(min=1)
        relevance = torch.bmm(tokens, weight.unsqueeze(2)).squeeze(2)
        return relevance.masked_fill(~explained, 0.0).relu()
