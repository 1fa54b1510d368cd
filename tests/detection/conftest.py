"""A detector on two random layers, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gradeclip_ft.batch import DetectionBatch
from gradeclip_ft.detection.detector import Detector, DetectorSettings, Vocabulary
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.tokenizer import Tokenizer
from tests.tiny import make_tiny_clip

NAMES = ("cat", "dog", "cow", "bus")
BASE = ("cat", "cow")


def token_ids(texts: Sequence[str]) -> torch.Tensor:
    """Ids of its own for each text; the last one ends it."""
    rows = [[1 + (sum(map(ord, text)) * k) % 47 for k in range(1, 8)] + [49] for text in texts]
    return torch.tensor(rows)


def settings(**changes: Any) -> DetectorSettings:
    """Small numbers on 64 pixels."""
    small = {
        "side": 64,
        "inner": (0, 0, 0),
        "channels": 16,
        "norm": "group",
        "region": 112.0,
        "templates": ("a {}",),
        "candidates": 60,
        "proposals": 40,
    }
    return DetectorSettings(**{**small, **changes})


def make_detector(family: str = "vit", clip: Clip | None = None, **changes: Any) -> Detector:
    """The same weights at every call."""
    made = clip or make_tiny_clip(family)
    torch.manual_seed(3)
    return Detector(made, Tokenizer(token_ids, 8), settings(**changes)).eval()


def make_detection_batch(images: int = 4, seed: int = 1, side: int = 64) -> DetectionBatch:
    """Random pixels; the second image has no object, the others have two."""
    draw = torch.Generator().manual_seed(seed)
    owner = torch.tensor([row for row in range(images) if row != 1 for _ in range(2)])
    corner = torch.rand(len(owner), 2, generator=draw) * side / 2
    extent = 8 + torch.rand(len(owner), 2, generator=draw) * side / 3
    return DetectionBatch(
        images=torch.randn(images, 3, side, side, generator=draw),
        sizes=torch.tensor([[side, side - 8 * (row % 2)] for row in range(images)]),
        scale=torch.ones(images),
        boxes=torch.cat([corner, corner + extent], 1).clamp(max=side - 8),
        labels=torch.tensor([0, 2] * (len(owner) // 2)),
        owner=owner,
        keys=tuple(map(str, range(images))),
    )


@pytest.fixture
def detector() -> Detector:
    """On the plain ViT."""
    return make_detector()


@pytest.fixture
def vocabulary(detector: Detector) -> Vocabulary:
    """Four classes, two of them base."""
    return detector.vocabulary(NAMES, BASE)
