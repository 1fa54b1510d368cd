"""What an objective is: a batch in, loss terms out; and what one adds up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.losses import contrastive_loss
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.tower import EXPLAINED
from gradeclip_ft.models.trace import UnsupportedTowerError
from gradeclip_ft.objectives.step import Step, Teacher
from gradeclip_ft.ops.similarity import unit

FEW = 8  # images of a batch whose patches are compared with those of the start model


@dataclass(frozen=True)
class LossTerms:
    """A loss and what is worth logging about it.

    Attributes:
        total: The scalar to minimise, with its graph.
        parts: Scalars without a graph, by the name they are logged under.
    """

    total: Float[Tensor, ""]
    parts: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """Loss of one batch; the whole of it runs inside the training step, so DDP sees one forward."""

    def check(self, clip: Clip) -> None:
        """Refuse a model that this objective cannot train; called before anything else.

        Raises:
            UnsupportedTowerError: A tower lacks what the loss needs.
        """
        ...

    def __call__(self, clip: Clip, batch: CaptionBatch) -> LossTerms:
        """Loss terms of this batch."""
        ...


@runtime_checkable
class Term(Protocol):
    """A further loss of a batch, chosen in yaml under `objective.terms`."""

    @property
    def weight(self) -> float:
        """Factor of the loss in the total."""

    @property
    def teacher(self) -> Literal["start", "ema"] | None:
        """The copy of the model that it asks, if any."""

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """The loss, a mean over what this process has, with a graph; autocast is as in the step."""


@dataclass(eq=False, kw_only=True)
class Composed(nn.Module):
    """L = g · L_global + Σ weight · term; other objectives add a loss of their own.

    Attributes:
        global_weight: g. The global loss is computed and logged in any case: with 0 it teaches
            nothing.
        terms: Further losses, by the name they are logged under.
        ema_momentum: Share of the old in the moving average of the weights, after every step.
        teachers: Copies of the model by name: `start`, `ema`. Empty until `begin`.
    """

    global_weight: float = 1.0
    terms: Mapping[str, Term] = field(default_factory=dict)
    ema_momentum: float = 0.999

    def __post_init__(self) -> None:
        """Plain fields came first; parameters need the module."""
        super().__init__()
        self.teachers = nn.ModuleDict()

    def check(self, clip: Clip) -> None:
        """Terms read dense features; the global loss alone takes every model that encodes.

        Raises:
            UnsupportedTowerError: There are terms, and the image tower cannot be traced.
        """
        if self.terms and clip.image.unexplained is not None:
            raise UnsupportedTowerError(
                f"{clip.image.unexplained}: no dense features, so no {', '.join(self.terms)}; "
                f"leave objective.terms empty, or choose a model such as {EXPLAINED}"
            )

    def asked(self) -> set[str]:
        """Names of the copies of the model that are needed."""
        return {term.teacher for term in self.terms.values() if term.teacher is not None}

    def begin(self, clip: Clip) -> None:
        """Copy the model as it is, its frozen parts marked, before the first step."""
        self.teachers = nn.ModuleDict({name: Teacher(clip) for name in sorted(self.asked())})

    def after_step(self, clip: Clip, step: int) -> None:
        """The moving average follows the weights; the same on all processes.

        Args:
            clip: The model, updated.
            step: Updates so far, this one included.
        """
        for name, teacher in self.teachers.items():
            if name == "ema" and isinstance(teacher, Teacher):
                teacher.follow(clip, self.ema_momentum)

    def forward(self, clip: Clip, batch: CaptionBatch) -> LossTerms:
        """Loss terms of this batch."""
        step = Step(clip, batch, self.teachers)
        total, parts = self.own_loss(step)
        for name, term in self.terms.items():
            loss = term(step)
            total = total + term.weight * loss
            parts[name] = loss.detach()
        if "start" in self.teachers:
            parts |= drift(step)
        return LossTerms(total, parts)

    def own_loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """What is added to the terms, and its parts."""
        whole = self.global_loss(step)
        return self.global_weight * whole, {"global": whole.detach()}

    def global_loss(self, step: Step) -> Float[Tensor, ""]:
        """Contrast of images and captions (21)."""
        images, captions = step.embedding, step.captions
        with step.single_precision():
            return contrastive_loss(images, captions, step.clip.log_scale.exp())


def gram_distance(
    patches: Float[Tensor, "B h w D"], anchor: Float[Tensor, "B h w D"]
) -> Float[Tensor, ""]:
    """Mean squared difference of the cosines between the patches of an image (a Gram matrix)."""
    now, then = (unit(rows).flatten(1, 2) for rows in (patches, anchor))  # (B, n, D)
    return (now @ now.transpose(1, 2) - then @ then.transpose(1, 2)).square().mean()


@torch.no_grad()
def drift(step: Step) -> dict[str, Tensor]:
    """How far dense features of a few images went from those of the start model.

    `patch_cosine` is the mean cosine of a patch with itself at the start; `patch_gram` the mean
    squared change of the cosines between patches of an image: it grows when they collapse.
    """
    now, start = step.dense[:FEW].detach(), step.teacher("start").dense_of_first(FEW)
    with step.single_precision():
        cosine = (unit(now) * unit(start)).sum(-1).mean()
        return {"patch_cosine": cosine, "patch_gram": gram_distance(now, start)}
