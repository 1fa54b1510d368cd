"""What an explainer is, and the one forward pass that several of them read.

`heat_from_trace` serves the training step: it is the one place where a heat map is stopped or left
differentiable. `SharedPass` serves explanation: it traces once, and every method explains from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from gradeclip_ft.models.clip import ImageTextModel, evaluation_mode
from gradeclip_ft.models.other.classifier import ImageModel
from gradeclip_ft.models.trace import (
    Heads,
    Pass,
    Record,
    Trace,
    UnsupportedTowerError,
    record_layers,
)
from gradeclip_ft.ops.heatmap import to_grid
from gradeclip_ft.ops.similarity import cosine, unit

WITHOUT_TEXTS = "grad_eclip, raw_attention, rollout, grad_cam, game or integrated_gradients"


@runtime_checkable
class TraceExplainer(Protocol):
    """Relevance of tokens from the last layer alone; cheap enough for a training step."""

    @property
    def create_graph(self) -> bool:
        """Whether gradients flow through the map: differentiable, or stopped."""

    def from_trace(
        self, trace: Trace, target: Float[Tensor, "P D"], owner: Int[Tensor, " P"]
    ) -> Float[Tensor, "P N"]:
        """Relevance of every token for unit targets, 0 where the trace explains nothing."""


@runtime_checkable
class RecordExplainer(Protocol):
    """Relevance of tokens from several layers in full; for explanation, not for training."""

    @property
    def depth(self) -> int | None:
        """Number of last layers that are recorded; None for all."""

    @property
    def heads(self) -> Heads:
        """How these layers attend: the model's own heads, or one over all channels."""

    def from_record(self, record: Record, target: Float[Tensor, "P D"]) -> Float[Tensor, "P N"]:
        """Relevance of every token; keeps the graph of the record, which other methods read too."""


@runtime_checkable
class InputExplainer(Protocol):
    """Relevance from forward passes of its own."""

    @property
    def images_only(self) -> bool:
        """Whether it changes pixels, so that texts have no such relevance."""

    def from_input(
        self,
        tower: Any,
        x: Shaped[Tensor, "B ..."],
        target: Float[Tensor, "P D"],
        owner: Int[Tensor, " P"],
    ) -> Float[Tensor, "P ..."]:
        """Relevance of every token (P, N), or of patches (P, h, w)."""


Explainer: TypeAlias = TraceExplainer | RecordExplainer | InputExplainer


def settings_of(method: Explainer) -> list[tuple[str, Any]]:
    """Name and value of every option of a method, without tensors that it keeps."""
    values = vars(method).items()
    return [pair for pair in values if pair[0][0] != "_" and not isinstance(pair[1], Tensor)]


def heat_from_trace(
    explainer: TraceExplainer,
    trace: Trace,
    target: Float[Tensor, "P D"],
    owner: Int[Tensor, " P"],
) -> Float[Tensor, "P h w"]:
    """Heat maps H of phrases, one per target, in fp32; a ValueError for the trace of a text.

    The target is always stopped; the map is stopped unless the explainer says `create_graph`. Both
    give the same values.
    """
    source = trace.float() if explainer.create_graph else trace.detach().float()
    with torch.enable_grad(), torch.autocast(trace.tokens.device.type, enabled=False):
        relevance = explainer.from_trace(source, unit(target.detach()), owner)
    heat = to_grid(relevance, trace.grid)
    return heat if explainer.create_graph else heat.detach()


class SharedPass:
    """One forward pass over a batch, made at its first use and read by every method.

    The input of every layer is kept, without a graph, so that the trace of the last layer and
    records of any depth continue the same pass. A record needs one row for each target; it is kept
    as long as the targets belong to the same inputs.
    """

    def __init__(
        self, tower: Any, x: Shaped[Tensor, "B ..."], logit_scale: Tensor | float = 1.0
    ) -> None:
        self._tower, self._x, self._logit_scale = tower, x, logit_scale
        self._inputs: list[Tensor] = []  # of each layer, (B, N, W)
        self._owner: Tensor | None = None
        self._records: dict[tuple[Heads, int | None], Record] = {}

    @cached_property
    def opened(self) -> Pass:
        """The pass before its first layer."""
        with torch.no_grad():
            opened: Pass = self._tower.open(self._x)
        return opened

    @cached_property
    def trace(self) -> Trace:
        """The last layer, without a graph."""
        with torch.no_grad():
            return self._from_layer(len(self.opened.layers) - 1).trace().detach().float()

    @property
    def embedding(self) -> Float[Tensor, "B D"]:
        """Embeddings, not normalised; from the trace, or as the library encodes without one."""
        if self._tower.unexplained is None:
            return self.trace.embedding
        with torch.no_grad():
            embedding: Tensor = self._tower.encode(self._x).float()
        return embedding

    def heat(
        self, explainer: Explainer, target: Float[Tensor, "P D"], owner: Int[Tensor, " P"]
    ) -> Float[Tensor, "P h w"]:
        """Heat maps for pictures; see `explain_image`."""
        found = self._relevance(explainer, target, owner)
        return found if found.ndim == 3 else to_grid(found, self.opened.grid)

    def word_shares(
        self, explainer: Explainer, target: Float[Tensor, "P D"], owner: Int[Tensor, " P"]
    ) -> Float[Tensor, "P N"]:
        """Shares of the tokens of texts; see `explain_text`."""
        if isinstance(explainer, InputExplainer) and explainer.images_only:
            raise ValueError(f"{type(explainer).__name__} changes pixels; it explains images alone")
        positive = self._relevance(explainer, target, owner).clamp(min=0)
        total = positive.sum(1, keepdim=True)
        return positive / total.masked_fill(total == 0, 1.0)

    def _relevance(self, explainer: Explainer, target: Tensor, owner: Tensor) -> Tensor:
        """What a method says of tokens (P, N), those that are not explained 0; or (P, h, w)."""
        # A classifier's score is a logit, so its targets are classes and no embeddings of texts.
        if getattr(explainer, "compares_texts", False) and self._tower.score is not cosine:
            raise UnsupportedTowerError(
                f"{type(explainer).__name__} compares tokens with the embedding of a text, which a "
                f"classifier does not have; choose {WITHOUT_TEXTS}"
            )
        target = unit(_usable(target)).to(self._x.device)
        owner = _usable(owner).to(self._x.device)
        if isinstance(explainer, InputExplainer):
            found = explainer.from_input(self._tower, self._x, target, owner)
        elif isinstance(explainer, RecordExplainer):
            found = explainer.from_record(
                self._record(owner, explainer.depth, explainer.heads), target
            )
        else:
            found = explainer.from_trace(self.trace, target, owner)
        if found.ndim == 3:
            return found.detach()
        return found.detach().masked_fill(~self.opened.explained[owner], 0.0)

    def _record(self, owner: Tensor, depth: int | None, heads: Heads) -> Record:
        if self._owner is None or not self._owner.equal(owner):
            self._records.clear()  # before the next one is made: they are large
            self._owner = owner
        # With the model's own heads a deep record holds every shallower one. With one head over all
        # channels the recorded layers compute something else, and each depth is another pass.
        key = heads, depth if heads == "one" else None
        count = len(self.opened.layers)
        last = count if depth is None else min(depth, count)
        kept = self._records.get(key)
        if kept is None or len(kept.layers) < last:
            start = count - last if last > 0 else 0
            kept = record_layers(self._from_layer(start), owner, depth=depth, heads=heads)
            kept = self._records[key] = replace(kept, logit_scale=self._logit_scale)
        return replace(kept, layers=kept.layers[-last:])

    def _from_layer(self, start: int) -> Pass:
        """The pass as if layer `start` were its first one."""
        inputs = self._inputs or [self.opened.tokens]
        with torch.no_grad():
            for layer in range(len(inputs), start + 1):
                inputs.append(self.opened.run(inputs[-1], layer - 1, layer))
        self._inputs = inputs
        return replace(self.opened, tokens=inputs[start], layers=self.opened.layers[start:])


@contextmanager
def shared_pass(model: ImageModel, tower: Any, x: Shaped[Tensor, "B ..."]) -> Iterator[SharedPass]:
    """A pass of a tower for explanation: evaluation mode, gradients possible, full precision.

    Mode, gradients and hooks of the model stay as they were. Inference mode, which allows no
    gradient, is left for a while.
    """
    with (
        evaluation_mode(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(x.device.type, enabled=False),
    ):
        log_scale = getattr(model, "log_scale", None)  # a classifier's score is its logit
        scale = 1.0 if log_scale is None else log_scale.detach().float().exp()
        yield SharedPass(tower, _usable(x), scale)


def explain_image(
    explainer: Explainer,
    clip: ImageModel,
    images: Float[Tensor, "B 3 H W"],
    target: Float[Tensor, "P D"],
    owner: Int[Tensor, " P"],
) -> Float[Tensor, "P h w"]:
    """Heat maps for pictures by one method, without a graph.

    Args:
        explainer: The method.
        clip: The model: a CLIP, or a classifier.
        images: Normalised pixels.
        target: Embeddings of phrases, any length; of a classifier, unit vectors of classes.
        owner: Image row of each target.

    Raises:
        UnsupportedTowerError: The image tower cannot do this method.
    """
    with shared_pass(clip, clip.image, images) as shared:
        return shared.heat(explainer, target, owner)


def explain_text(
    explainer: Explainer,
    clip: ImageTextModel,
    texts: Int[Tensor, "M L"],
    target: Float[Tensor, "P D"],
    owner: Int[Tensor, " P"],
) -> Float[Tensor, "P N"]:
    """Relevance of every token of a text for an image by one method, without a graph.

    Positive parts over the words, divided by their sum; 0 everywhere where nothing is relevant.
    Targets are embeddings of images of any length, owners their rows of token ids.

    Raises:
        UnsupportedTowerError: The text tower cannot do this method.
        ValueError: The method is for images alone.
    """
    with shared_pass(clip, clip.text, texts.to(clip.device)) as shared:
        return shared.word_shares(explainer, target, owner)


def _usable(tensor: Tensor) -> Tensor:
    """Without a graph; a copy where inference mode forbids gradients through it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()
