"""Fine-grained fine-tuning: global loss (21) and local loss (22) from one forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradeclip_ft.explain.base import Explainer, RecordExplainer, TraceExplainer, heat_from_trace
from gradeclip_ft.losses import AlignmentOptions, alignment_loss
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.tower import EXPLAINED
from gradeclip_ft.models.trace import UnsupportedTowerError
from gradeclip_ft.objectives.base import Composed
from gradeclip_ft.objectives.step import Step
from gradeclip_ft.ops.heatmap import above, pool_heatmap, sparse

LOG_SCALE = math.log(1 / 0.07), math.log(100)  # of a temperature that is learned: first, highest


@dataclass(eq=False)
class GlobalLocal(Composed):
    """L = g · L_global + c · L_local + terms, each phrase pooled by its own heat map.

    Attributes:
        explainer: Makes the heat maps H; from the current model by its last layer alone.
        alignment: Choices of the local loss.
        local_weight: c.
        phrase_weight: w_t, the maximum of the phrase's map without gradient (the follow-up paper),
            or 1.
        normalize_tokens: Bring dense features to length 1 before pooling.
        maps_from: The model that is explained: as it is now (the paper), as it was at the start,
            or its moving average. The last two make stopped maps, by any explainer.
        map_shape: The map as it is; `sparse`, cut at one over the number of patches after the 0-1
            normalisation (SPARC); or `threshold`, cut at a share of its maximum.
        map_threshold: That share.
    """

    explainer: Explainer
    alignment: AlignmentOptions = field(default_factory=AlignmentOptions)
    local_weight: float = 1.0
    phrase_weight: Literal["max", "none"] = "max"
    normalize_tokens: bool = True
    maps_from: Literal["current", "start", "ema"] = "current"
    map_shape: Literal["full", "sparse", "threshold"] = "full"
    map_threshold: float = 0.5

    def __post_init__(self) -> None:
        """A temperature of its own is a weight of this module."""
        super().__post_init__()
        if self.alignment.temperature == "learned":
            self.local_log_scale = nn.Parameter(torch.tensor(LOG_SCALE[0]))

    def check(self, clip: Clip) -> None:
        """Heat maps and dense features need an image tower that can be traced.

        Raises:
            UnsupportedTowerError: It cannot.
            ValueError: The explainer needs more than the last layer of the current model, or other
                texts.
        """
        name = type(self.explainer).__name__
        if self.maps_from == "current" and not isinstance(self.explainer, TraceExplainer):
            raise ValueError(
                f"{name} needs more than the last layer: a training step cannot afford its "
                "gradients; choose objective.maps_from=start, or grad_eclip, grad_cam, maskclip, "
                "raw_attention or uniform"
            )
        if hasattr(self.explainer, "prepare"):
            raise ValueError(f"{name} compares with other texts, which a training step has not")
        pooling = clip.image.pooling
        if isinstance(self.explainer, RecordExplainer) and pooling.startswith("attention pool"):
            raise UnsupportedTowerError(
                f"{name} follows a class token through layers, but this tower ends in an "
                f"{pooling}; choose explainer@objective.explainer=grad_eclip"
            )
        if clip.image.unexplained is not None:
            raise UnsupportedTowerError(
                f"{clip.image.unexplained}: no heat maps, so no local loss; choose "
                f"objective=global_only, or a model such as {EXPLAINED}"
            )

    def asked(self) -> set[str]:
        """Names of the copies of the model that are needed."""
        return super().asked() | ({self.maps_from} - {"current"})

    def own_loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Both losses: one image forward, one short text forward, one gradient."""
        batch = step.batch
        # Two readings of one trace: with the query's attention it gives the embedding and the
        # maps, without any it gives F_d. The blocks before it run once for all three.
        _, phrases = step.texts  # (P, D)
        heat = self.maps(step)  # (P, h, w)
        dense = step.dense  # (B, h, w, D)
        with step.single_precision():
            regions = pool_heatmap(
                dense,
                self._shaped(heat),
                batch.owner,
                normalize_tokens=self.normalize_tokens,
                most=batch.most,
            )
            # Without gradient: a weight that learns could make all maps 0 to be rid of the loss.
            highest = heat.detach().amax((1, 2))  # (P)
            local = alignment_loss(
                regions,
                phrases,
                identity=batch.identity[batch.phrase],
                weight=highest if self.phrase_weight == "max" else (highest > 0).float(),
                scale=self._local_scale(step),
                options=self.alignment,
                owner=batch.owner,
            )
        whole = self.global_loss(step)
        total = self.global_weight * whole + self.local_weight * local.loss
        count = max(len(highest), 1)
        parts = {
            "global": whole.detach(),
            "local": local.loss.detach(),
            "positive_cosine": local.positive_cosine,
            "negative_cosine": local.negative_cosine,
            "clamped_share": local.clamped_share,
            "heat_max": highest.sum() / count,
            "heat_top_tenth": _top_share(heat.detach()).sum() / count,
            "empty_maps": (highest == 0).sum() / count,
        }
        return total, parts

    def maps(self, step: Step) -> Float[Tensor, "P h w"]:
        """Heat maps of the phrases of the batch, not negative."""
        if self.maps_from != "current":
            return step.teacher(self.maps_from).heat(self.explainer)
        assert isinstance(self.explainer, TraceExplainer)
        return heat_from_trace(self.explainer, step.trace, step.texts[1], step.batch.owner)

    def _shaped(self, heat: Float[Tensor, "P h w"]) -> Float[Tensor, "P h w"]:
        if self.map_shape == "sparse":
            return sparse(heat)
        return above(heat, self.map_threshold) if self.map_shape == "threshold" else heat

    def _local_scale(self, step: Step) -> Float[Tensor, ""]:
        """Inverse temperature of the contrastive local loss."""
        chosen = self.alignment.temperature
        if chosen == "learned":
            return self.local_log_scale.clamp(max=LOG_SCALE[1]).exp()
        scale = step.clip.log_scale.detach().exp()
        # The model's temperature learns from (21) alone. From the local loss it would fit the
        # smaller cosines of regions, and the global loss would follow.
        return scale if chosen == "model" else torch.full_like(scale, 1 / chosen)


def _top_share(heat: Float[Tensor, "P h w"]) -> Float[Tensor, " P"]:
    """Share of a map in the tenth of its cells that has most of it: 0.1 where it is flat."""
    cells = heat.flatten(1)
    most = cells.topk(max(1, round(0.1 * cells.shape[1])), dim=1).values.sum(1)
    return most / cells.sum(1).clamp(min=1e-12)
