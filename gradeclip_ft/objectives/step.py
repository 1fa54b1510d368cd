"""What the losses of one batch share: each pass of a tower is made once, at its first use."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.base import Explainer, SharedPass
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.trace import Trace

ROWS = 64  # phrases explained at a time: a method over layers keeps the attention of all of them


@runtime_checkable
class Stored(Protocol):
    """What a teacher that does not move has said before; `compute` gives the rows that are missing.

    It knows the images of the batch of the step alone: crops and canvases are always computed.
    """

    def embeddings(
        self, batch: CaptionBatch, compute: Callable[[Int[Tensor, " R"]], Tensor]
    ) -> Float[Tensor, "B D"]:
        """Of the images, not normalised."""

    def maps(
        self,
        explainer: Explainer,
        batch: CaptionBatch,
        compute: Callable[[Int[Tensor, " R"]], Tensor],
    ) -> Float[Tensor, "P h w"]:
        """Of the phrases, by one method."""


class Teacher(nn.Module):
    """A copy of a model that does not learn: as it was at the start, or its moving average.

    It is part of the checkpoint, so a resumed run asks the same teacher. Parts that do not learn
    are shared with the model.

    Args:
        clip: What is copied; its frozen parameters are those without `requires_grad`.
    """

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        shared = {id(part): part for part in clip.model.parameters() if not part.requires_grad}
        # The adapters of a Clip hold functions of its own modules: the copy gets new ones.
        self.clip = Clip(copy.deepcopy(clip.model, shared)).requires_grad_(False).eval()
        self.stored: Stored | None = None

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, clip: Clip, momentum: float) -> None:
        """M' <- momentum · M' + (1 - momentum) · M."""
        for own, other in zip(self.clip.parameters(), clip.parameters(), strict=True):
            own.lerp_(other, 1 - momentum)


class Step:
    """One batch seen by the model and by its teachers.

    Args:
        clip: The model.
        batch: The batch.
        teachers: Of `Composed`.
    """

    def __init__(self, clip: Clip, batch: CaptionBatch, teachers: nn.ModuleDict) -> None:
        self.clip = clip
        self.batch = batch
        self._teachers = teachers
        self._views: dict[str, View] = {}

    @cached_property
    def trace(self) -> Trace:
        """Last layer of the image tower."""
        return replace(self.clip.image.trace(self.batch.images), most=self.batch.most)

    @cached_property
    def embedding(self) -> Float[Tensor, "B D"]:
        """Of the images, not normalised."""
        if self.clip.image.unexplained is None:
            return self.trace.embedding
        return self.clip.image.encode(self.batch.images)

    @cached_property
    def dense(self) -> Float[Tensor, "B h w D"]:
        """F_d by the value path, not normalised."""
        return self.trace.dense()

    @cached_property
    def texts(self) -> tuple[Float[Tensor, "B D"], Float[Tensor, "P D"]]:
        """Captions and phrases; each different phrase is computed once."""
        captions, distinct = self.clip.encode_texts_of(self.batch)
        return captions, distinct[self.batch.phrase]

    @cached_property
    def captions(self) -> Float[Tensor, "B D"]:
        """Of the captions; alone, unless an objective has asked for the phrases before."""
        if "texts" in self.__dict__:
            return self.texts[0]
        return self.clip.text.encode(self.batch.captions)

    def teacher(self, name: str) -> View:
        """What a copy of the model says of this batch."""
        if name not in self._views:
            teacher = self._teachers[name]
            assert isinstance(teacher, Teacher)
            self._views[name] = View(teacher.clip, self, teacher.stored)
        return self._views[name]

    @contextmanager
    def single_precision(self) -> Iterator[None]:
        """Autocast off: cosines, powers and logarithms need fp32; in bf16, 1 - 1e-6 is 1.

        Ask the step for what the towers compute before entering.
        """
        with torch.autocast(self.batch.images.device.type, enabled=False):
            yield


class View:
    """A batch seen by a teacher: without a graph, in single precision."""

    def __init__(self, clip: Clip, step: Step, stored: Stored | None = None) -> None:
        self.clip = clip
        # If step and view held each other, the tensors of a step (gigabytes of layers and
        # attention) would live until Python's collector of cycles runs, many steps later.
        self._step: Step = weakref.proxy(step)
        self._stored = stored
        scale = clip.log_scale.float().exp()
        self._pass = SharedPass(clip.image, step.batch.images, scale)

    @cached_property
    def embedding(self) -> Float[Tensor, "B D"]:
        """Of the images, not normalised."""
        with self._step.single_precision():
            if self._stored is None:
                return self._pass.embedding
            batch = self._step.batch
            return self._stored.embeddings(batch, lambda rows: self._pass.embedding[rows])

    @cached_property
    def dense(self) -> Float[Tensor, "B h w D"]:
        """F_d of the images, not normalised."""
        with torch.no_grad(), self._step.single_precision():
            return self._pass.trace.dense()

    def dense_of_first(self, count: int) -> Float[Tensor, "K h w D"]:
        """F_d of at most so many images, which are seen alone where nothing else asked for all."""
        if "trace" in vars(self._pass):
            return self.dense[:count]
        with torch.no_grad(), self._step.single_precision():
            return self.clip.image.trace(self._step.batch.images[:count]).dense()

    @cached_property
    def captions(self) -> Float[Tensor, "B D"]:
        """Of the captions."""
        captions = self._step.captions
        if not captions.requires_grad:  # a text tower that does not learn is the same here
            return captions
        with torch.no_grad(), self._step.single_precision():
            return self.clip.text.encode(self._step.batch.captions)

    @cached_property
    def phrases(self) -> Float[Tensor, "P D"]:
        """Of the phrases."""
        batch, (_, phrases) = self._step.batch, self._step.texts
        if not phrases.requires_grad or not len(phrases):
            return phrases.detach()
        with torch.no_grad(), self._step.single_precision():
            return self.clip.text.encode(batch.distinct)[batch.phrase]

    def heat(self, explainer: Explainer) -> Float[Tensor, "P h w"]:
        """Maps of the phrases of the batch, by any method; negative values become 0."""
        batch = self._step.batch
        if not len(batch.owner):
            # The grid of the model is that of the copy, which need not see the images for it.
            return self.phrases.new_zeros((0, *self._step.dense.shape[1:3]))
        if self._stored is not None:
            return self._stored.maps(explainer, batch, lambda rows: self._heat(explainer, rows))
        return self._heat(explainer, torch.arange(len(batch.owner), device=batch.owner.device))

    def _heat(self, explainer: Explainer, rows: Int[Tensor, " R"]) -> Float[Tensor, "R h w"]:
        phrases, owner = self.phrases, self._step.batch.owner
        with torch.enable_grad(), self._step.single_precision():
            parts = [
                self._pass.heat(explainer, phrases[part], owner[part])
                for part in torch.split(rows.to(owner.device), ROWS)
            ]
        return torch.cat(parts).clamp(min=0)

    def encode(self, images: Float[Tensor, "R 3 H W"]) -> Float[Tensor, "R D"]:
        """Embeddings of other pictures, in the precision of the step."""
        with torch.no_grad():
            return self.clip.image.encode(images)
