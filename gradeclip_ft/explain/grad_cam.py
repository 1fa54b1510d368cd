"""Grad-CAM on the input of the last block, as the Grad-ECLIP authors apply it to transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.models.trace import Heads, Trace


@dataclass(frozen=True)
class GradCam:
    """H_i = ReLU(Σ_c α_c x_ic), α the mean gradient of S over tokens (Selvaraju et al., eq. 1-2).

    The mean is over all tokens, the class token too, as in the authors' script.

    Attributes:
        heads: How the last layer attends in S: with one head over all channels, as the authors'
            script differentiates it, or with the model's own.
        create_graph: Let gradients flow through the map.
    """

    heads: Heads = "one"
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
        relevance = torch.bmm(tokens, gradient.mean(1).unsqueeze(2)).squeeze(2)
        return relevance.masked_fill(~trace.explained[owner], 0.0).relu()
