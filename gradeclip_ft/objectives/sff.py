"""The authors' follow-up ("Fine-grained CLIP fine-tuning with self-annotated region alignment").

Global and local loss with the phrase weight w_t, and a momentum copy that softens pairs which the
model it came from does not believe.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.losses import pair_log_probabilities
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.step import Step, Teacher

COPY = "momentum"


@dataclass(eq=False)
class SFF(GlobalLocal):
    """Every pair of (21) counts `trust` · p' + 1 - `trust`, p' its probability by the copy.

    Attributes:
        momentum: M' <- momentum · M' + (1 - momentum) · M.
        every: Steps between two updates of the copy; an epoch as published.
        trust: Of the copy's probability; 0.4 as published.
    """

    momentum: float = 0.995
    every: int = 1000
    trust: float = 0.4

    def asked(self) -> set[str]:
        """Names of the copies of the model that are needed."""
        return super().asked() | {COPY}

    def after_step(self, clip: Clip, step: int) -> None:
        """The copy moves once per epoch."""
        super().after_step(clip, step)
        copy = self.teachers[COPY]
        assert isinstance(copy, Teacher)
        if step % self.every == 0:
            copy.follow(clip, self.momentum)

    def global_loss(self, step: Step) -> Float[Tensor, ""]:
        """(21) with a weight for every pair, in both directions."""
        images, captions, scale = step.embedding, step.captions, step.clip.log_scale.exp()
        copy = step.teacher(COPY)
        with step.single_precision():
            now = pair_log_probabilities(images, captions, scale)
            then = pair_log_probabilities(copy.embedding, copy.captions, copy.clip.log_scale.exp())
            weight = self.trust * then.exp() + 1 - self.trust
            return -(weight.detach() * now).mean()
