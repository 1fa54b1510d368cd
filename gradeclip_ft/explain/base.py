"""What an explainer is, and the one place where a heat map is stopped or left differentiable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.trace import Trace
from gradeclip_ft.ops.heatmap import to_grid
from gradeclip_ft.ops.similarity import unit


@runtime_checkable
class TraceExplainer(Protocol):
    """Relevance of tokens from the last layer alone; cheap enough for a training step."""

    @property
    def create_graph(self) -> bool:
        """Whether gradients flow through the map: differentiable, or stopped."""
        ...

    def from_trace(
        self, trace: Trace, target: Float[Tensor, "P D"], owner: Int[Tensor, " P"]
    ) -> Float[Tensor, "P N"]:
        """Relevance of every token, 0 where the trace explains nothing.

        Args:
            trace: Rows for B inputs.
            target: Unit embeddings whose score is explained.
            owner: Row of the trace for each target.
        """
        ...


def heat_from_trace(
    explainer: TraceExplainer,
    trace: Trace,
    target: Float[Tensor, "P D"],
    owner: Int[Tensor, " P"],
) -> Float[Tensor, "P h w"]:
    """Heat maps H of phrases, one per target, in fp32.

    The target is always stopped; the map is stopped unless the explainer says `create_graph`. Both
    give the same values.

    Raises:
        ValueError: The trace is that of a text.
    """
    if trace.grid is None:
        raise ValueError("heat maps exist for images; this is the trace of a text")
    source = trace.float() if explainer.create_graph else trace.detach().float()
    with torch.enable_grad(), torch.autocast(trace.tokens.device.type, enabled=False):
        relevance = explainer.from_trace(source, unit(target.detach()), owner)
    heat = to_grid(relevance, trace.grid)
    return heat if explainer.create_graph else heat.detach()


def explain_image(
    explainer: TraceExplainer,
    clip: Clip,
    images: Float[Tensor, "B 3 H W"],
    target: Float[Tensor, "P D"],
    owner: Int[Tensor, " P"],
) -> Float[Tensor, "P h w"]:
    """Heat maps for pictures, without a graph; the model's mode, gradients and hooks stay as is.

    Args:
        explainer: The method.
        clip: The model.
        images: Normalised pixels.
        target: Embeddings of the phrases, any length.
        owner: Image row of each phrase.
    """
    with _evaluating(clip):
        with torch.no_grad():
            trace = clip.image.trace(images)
        device = trace.tokens.device
        return heat_from_trace(explainer, trace, target.to(device), owner.to(device)).detach()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule gets its own mode back."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
