"""Fine-grained fine-tuning: global loss (21) and local loss (22) from one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.base import Explainer, TraceExplainer, heat_from_trace
from gradeclip_ft.losses import AlignmentOptions, alignment_loss, contrastive_loss
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.tower import EXPLAINED
from gradeclip_ft.models.trace import UnsupportedTowerError
from gradeclip_ft.objectives.base import LossTerms
from gradeclip_ft.ops.heatmap import pool_heatmap


@dataclass(frozen=True)
class GlobalLocal:
    """L = L_global + c · L_local, each phrase pooled by its own heat map.

    Attributes:
        explainer: Makes the heat maps H, from the last layer alone.
        alignment: Choices of the local loss.
        local_weight: c.
        phrase_weight: w_t, the maximum of the phrase's map without gradient (the follow-up paper),
            or 1.
        normalize_tokens: Bring dense features to length 1 before pooling.
    """

    explainer: Explainer
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    local_weight: float = 1.0
    phrase_weight: Literal["max", "none"] = "max"
    normalize_tokens: bool = True

    def check(self, clip: Clip) -> None:
        """Heat maps and dense features need an image tower that can be traced.

        Raises:
            UnsupportedTowerError: It cannot.
            ValueError: The explainer needs more than the last layer.
        """
        if not isinstance(self.explainer, TraceExplainer):
            raise ValueError(
                f"{type(self.explainer).__name__} needs more than the last layer: it explains, but "
                "a training step cannot afford it; choose grad_eclip, grad_cam, maskclip, "
                "raw_attention or uniform"
            )
        if clip.image.unexplained is not None:
            raise UnsupportedTowerError(
                f"{clip.image.unexplained}: no heat maps, so no local loss; choose "
                f"objective=global_only, or a model such as {EXPLAINED}"
            )

    def __call__(self, clip: Clip, batch: CaptionBatch) -> LossTerms:
        """Loss terms of this batch: one image forward, one short text forward, one gradient."""
        assert isinstance(self.explainer, TraceExplainer)
        trace = clip.image.trace(batch.images)
        captions, distinct = clip.encode_texts_of(batch)
        phrases = distinct[batch.phrase]  # (P, D), each string was computed once
        # Two readings of one trace: with the query's attention it gives the embedding and the
        # maps, without any it gives F_d. The blocks before it run once for all three.
        dense = trace.dense()  # (B, h, w, D)
        heat = heat_from_trace(self.explainer, trace, phrases, batch.owner)  # (P, h, w)
        # Cosines, powers and logarithms need fp32: in bf16, 1 - 1e-6 is 1 and its logarithm 0.
        with torch.autocast(batch.images.device.type, enabled=False):
            regions = pool_heatmap(dense, heat, batch.owner, normalize_tokens=self.normalize_tokens)
            # Without gradient: a weight that learns could make all maps 0 to be rid of the loss.
            highest = heat.detach().amax((1, 2))  # (P)
            scale = clip.log_scale.exp()
            # The temperature learns from (21) alone. In (22) it would fit the smaller cosines of
            # regions, and the global loss would follow.
            whole = contrastive_loss(trace.embedding, captions, scale)
            local = alignment_loss(
                regions,
                phrases,
                identity=batch.identity[batch.phrase],
                weight=highest if self.phrase_weight == "max" else (highest > 0).float(),
                scale=scale.detach(),
                options=self.alignment,
            )
        total = whole + self.local_weight * local.loss
        count = max(len(highest), 1)
        parts = {
            "global": whole.detach(),
            "local": local.loss.detach(),
            "positive_cosine": local.positive_cosine,
            "negative_cosine": local.negative_cosine,
            "clamped_share": local.clamped_share,
            "heat_max": highest.sum() / count,
            "empty_maps": (highest == 0).sum() / count,
        }
        return LossTerms(total, parts)
