"""What an explainer is, and the one place where a heat map is stopped or left differentiable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from gradeclip_ft.models.clip import Clip, ImageModel, evaluation_mode
from gradeclip_ft.models.tower import Tower
from gradeclip_ft.models.trace import Heads, Record, Trace, UnsupportedTowerError, record_layers
from gradeclip_ft.ops.heatmap import to_grid
from gradeclip_ft.ops.similarity import unit

WITHOUT_TEXTS = "grad_eclip, raw_attention, rollout, grad_cam, game or integrated_gradients"


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


@runtime_checkable
class RecordExplainer(Protocol):
    """Relevance of tokens from several layers in full; for explanation, not for training."""

    @property
    def depth(self) -> int | None:
        """Last layers that are recorded; None for all."""
        ...

    @property
    def heads(self) -> Heads:
        """How these layers attend: the model's own heads, or one over all channels."""
        ...

    def from_record(self, record: Record, target: Float[Tensor, "P D"]) -> Float[Tensor, "P N"]:
        """Relevance of every token.

        Args:
            record: One row of inputs per target.
            target: Unit embeddings whose score is explained.
        """
        ...


@runtime_checkable
class InputExplainer(Protocol):
    """Relevance from forward passes of its own."""

    @property
    def images_only(self) -> bool:
        """Whether it changes pixels, so that texts have no such relevance."""
        ...

    def from_input(
        self,
        tower: Any,
        x: Shaped[Tensor, "B ..."],
        target: Float[Tensor, "P D"],
        owner: Int[Tensor, " P"],
    ) -> Float[Tensor, "P ..."]:
        """Relevance of every token (P, N), or of patches (P, h, w)."""
        ...


Explainer: TypeAlias = TraceExplainer | RecordExplainer | InputExplainer


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
    explainer: Explainer,
    clip: ImageModel,
    images: Float[Tensor, "B 3 H W"],
    target: Float[Tensor, "P D"],
    owner: Int[Tensor, " P"],
) -> Float[Tensor, "P h w"]:
    """Heat maps for pictures, without a graph; the model's mode, gradients and hooks stay as is.

    Args:
        explainer: The method.
        clip: The model: a CLIP, or a classifier.
        images: Normalised pixels.
        target: Embeddings of the phrases, any length; for a classifier, unit vectors of classes.
        owner: Image row of each target.

    Raises:
        UnsupportedTowerError: The image tower cannot do this method.
    """
    _check_texts(explainer, clip)
    with _explaining(clip), torch.autocast(images.device.type, enabled=False):
        images = _usable(images)
        target, owner = unit(_usable(target)).to(images.device), _usable(owner).to(images.device)
        if isinstance(explainer, InputExplainer):
            with torch.enable_grad():
                found = explainer.from_input(clip.image, images, target, owner).detach()
            if found.ndim == 3:
                return found
            with torch.no_grad():
                opened = clip.image.open(images)
            found = found.masked_fill(~opened.explained[owner], 0.0)
            return to_grid(found, _grid(opened.grid))
        if isinstance(explainer, RecordExplainer):
            record, found = _from_record(explainer, clip.image, images, target, owner)
            return to_grid(found, _grid(record.opened.grid))
        with torch.no_grad():
            trace = clip.image.trace(images)
        return heat_from_trace(explainer, trace, target, owner).detach()


def explain_text(
    explainer: Explainer,
    clip: Clip,
    texts: Int[Tensor, "M L"],
    target: Float[Tensor, "P D"],
    owner: Int[Tensor, " P"],
) -> Float[Tensor, "P N"]:
    """Relevance of every token of a text for an image, without a graph.

    Positive parts over the words, divided by their sum; 0 everywhere where nothing is relevant.

    Args:
        explainer: The method.
        clip: The model.
        texts: Token ids.
        target: Embeddings of the images, any length.
        owner: Text row of each image.

    Raises:
        UnsupportedTowerError: The text tower cannot do this method.
        ValueError: The method is for images alone.
    """
    if isinstance(explainer, InputExplainer) and explainer.images_only:
        raise ValueError(f"{type(explainer).__name__} changes pixels; it explains images alone")
    device = clip.device
    with _explaining(clip), torch.autocast(device.type, enabled=False):
        texts, owner = _usable(texts).to(device), _usable(owner).to(device)
        target = unit(_usable(target)).to(device)
        with torch.no_grad():
            opened = clip.text.open(texts)
        if isinstance(explainer, InputExplainer):
            with torch.enable_grad():
                found = explainer.from_input(clip.text, texts, target, owner)
        elif isinstance(explainer, RecordExplainer):
            _, found = _from_record(explainer, clip.text, texts, target, owner)
        else:
            trace = opened.trace().detach().float()
            with torch.enable_grad():
                found = explainer.from_trace(trace, target, owner)
    words = found.detach().masked_fill(~opened.explained[owner], 0.0).clamp(min=0)
    total = words.sum(1, keepdim=True)
    return words / total.masked_fill(total == 0, 1.0)


def _check_texts(explainer: Explainer, model: ImageModel) -> None:
    """Refuse a comparison with texts where there are none."""
    if not isinstance(model, Clip) and getattr(explainer, "compares_texts", False):
        raise UnsupportedTowerError(
            f"{type(explainer).__name__} compares tokens with the embedding of a text, which a "
            f"classifier has not; choose {WITHOUT_TEXTS}"
        )


def _from_record(
    explainer: RecordExplainer, tower: Tower, x: Tensor, target: Tensor, owner: Tensor
) -> tuple[Record, Float[Tensor, "P N"]]:
    with torch.enable_grad():
        with torch.no_grad():
            opened = tower.open(x)
        record = record_layers(opened, owner, depth=explainer.depth, heads=explainer.heads)
        found = explainer.from_record(record, target).detach()
    return record, found.masked_fill(~record.explained, 0.0)


def _grid(grid: tuple[int, int] | None) -> tuple[int, int]:
    if grid is None:
        raise ValueError("heat maps exist for images; this is the pass of a text")
    return grid


def _usable(tensor: Tensor) -> Tensor:
    """Without a graph; a copy where inference mode forbids gradients through it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


@contextmanager
def _explaining(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, outside inference mode, which allows no gradient."""
    with evaluation_mode(module), torch.inference_mode(False):
        yield


Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


class Able:
    """Methods that this model can do; the others are left out at their first failure, with a word.

    Args:
        methods: By name.
        skip: Whether others may be left out at all.

    Attributes:
        methods: Those left, by name.
        left_out: Why the others are not.
    """

    def __init__(self, methods: Mapping[str, Explainer], *, skip: bool = True) -> None:
        self.methods = dict(methods)
        self.left_out: dict[str, str] = {}
        self._skip = skip

    def each(self, work: Callable[[Explainer], Answer]) -> dict[str, Answer]:
        """Answers of all methods that this model can do.

        Raises:
            UnsupportedTowerError: It can do none, or not all of them and none may be left out.
        """
        return {name: answer for name in list(self.methods) for answer in self.one(name, work)}

    def one(self, name: str, work: Callable[[Explainer], Answer]) -> list[Answer]:
        """The answer of one method, or none."""
        try:
            return [work(self.methods[name])]
        except UnsupportedTowerError as error:
            if not self._skip:
                raise
            log.warning("%s is left out: %s", name, error)
            self.left_out[name] = str(error)
            del self.methods[name]
            if not self.methods:
                raise UnsupportedTowerError(
                    f"this model can do none of {', '.join(self.left_out)}: {error}"
                ) from error
            return []
