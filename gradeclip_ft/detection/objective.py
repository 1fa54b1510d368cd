"""Losses of the detector: proposals, then classes and boxes of sampled proposals (Faster R-CNN)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import box_iou

from gradeclip_ft.batch import DetectionBatch
from gradeclip_ft.detection.detector import Detector, Vocabulary
from gradeclip_ft.objectives.base import LossTerms

OVERLAP = 0.5
"""Proposals that overlap an object by this much (IoU) are of its class."""

POSITIVE = 0.25
"""Share of the samples that may be of a class."""


@dataclass(frozen=True)
class DetectionObjective:
    """Four losses with weight 1; the defaults are F-ViT's.

    Attributes:
        samples: Proposals of an image that the box head learns from, at most a quarter positive.
        background_weight: Of samples that are background, in the loss of classes.
    """

    samples: int = 512
    background_weight: float = 0.6

    def __call__(
        self, detector: Detector, batch: DetectionBatch, vocabulary: Vocabulary
    ) -> LossTerms:
        """Loss terms of this batch.

        Every loss is a mean over images of a mean over samples, so the mean over processes with as
        many images each is that over their joined batch.
        """
        rows = [batch.owner == row for row in range(len(batch.images))]
        truth = [(batch.boxes[mine], batch.labels[mine]) for mine in rows]
        levels, _ = detector.features(batch.images)
        targets = [{"boxes": boxes} for boxes, _ in truth]
        proposals, losses = detector.propose(batch.images, batch.sizes, levels, targets)
        sampled = [
            self._sample(torch.cat([found.detach(), boxes]), boxes, labels, vocabulary)
            for found, (boxes, labels) in zip(proposals, truth, strict=True)
        ]
        boxes, labels, places = (list(part) for part in zip(*sampled, strict=True))
        logits, deltas = detector.classify(levels, boxes, vocabulary)
        goal = torch.cat(detector.coder.encode(places, boxes))  # (R, 4)
        share = torch.cat([1 / each.new_full((len(each),), len(each)).float() for each in labels])
        share = share / len(labels)
        label = torch.cat(labels)
        parts = {
            "proposal_classes": losses["loss_objectness"],
            "proposal_boxes": losses["loss_rpn_box_reg"],
            "classes": (share * self._class_loss(logits, label, vocabulary)).sum(),
            "boxes": (
                share * (deltas - goal).abs().sum(1).where(label < len(vocabulary.names), 0.0)
            ).sum(),
        }
        with torch.no_grad():
            inside = label < len(vocabulary.names)
            right = (logits[:, :-1].argmax(1) == label) & inside
            seen = {
                "right_classes": right.sum() / inside.sum().clamp(min=1),
                "positive_samples": inside.float().mean(),
                "detector_temperature": detector.head.temperature.detach(),
            }
        total = torch.stack(list(parts.values())).sum()
        return LossTerms(total, {**{name: x.detach() for name, x in parts.items()}, **seen})

    def _sample(
        self,
        proposals: Float[Tensor, "A 4"],
        boxes: Float[Tensor, "G 4"],
        labels: Int[Tensor, " G"],
        vocabulary: Vocabulary,
    ) -> tuple[Float[Tensor, "S 4"], Int[Tensor, " S"], Float[Tensor, "S 4"]]:
        """Some proposals (the objects are among them), their labels, and the boxes they are of."""
        background = len(vocabulary.names)
        if not len(boxes):
            label = labels.new_full((len(proposals),), background)
            match = proposals
        else:
            overlap, nearest = box_iou(boxes, proposals).max(0)
            label = labels[nearest].where(overlap >= OVERLAP, background)
            match = boxes[nearest]
        sampler = BalancedPositiveNegativeSampler(self.samples, POSITIVE)
        positive, negative = sampler([(label < background).long()])
        rows = (positive[0].bool() | negative[0].bool()).nonzero()[:, 0]
        return proposals[rows], label[rows], match[rows]

    def _class_loss(
        self, logits: Float[Tensor, "R J"], label: Int[Tensor, " R"], vocabulary: Vocabulary
    ) -> Float[Tensor, " R"]:
        """Cross-entropy of each sample; novel classes have no part in it, so no gradient."""
        hidden = torch.cat([~vocabulary.is_base, vocabulary.is_base.new_zeros(1)])
        weight = logits.new_ones(logits.shape[1])
        weight[-1] = self.background_weight
        shown = logits.masked_fill(hidden, -torch.inf)
        return cross_entropy(shown, label, reduction="none") * weight[label]
