"""Ordinary fine-tuning: the global loss alone (Grad-ECLIP's "ordinary FT")."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.losses import contrastive_loss
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.objectives.base import LossTerms


@dataclass(frozen=True)
class GlobalOnly:
    """Symmetric contrast of images and captions (eq. 21)."""

    def check(self, clip: Clip) -> None:
        """Every model that encodes can be trained."""

    def __call__(self, clip: Clip, batch: CaptionBatch) -> LossTerms:
        """Loss terms of this batch."""
        images = clip.image.encode(batch.images)
        captions = clip.text.encode(batch.captions)
        with torch.autocast(batch.images.device.type, enabled=False):
            loss = contrastive_loss(images, captions, clip.log_scale.exp())
        return LossTerms(loss, {"global": loss.detach()})
