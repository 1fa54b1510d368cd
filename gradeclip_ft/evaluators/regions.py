"""Region classification: dense features pooled by box or mask against class embeddings.

The protocol of Grad-ECLIP's Table 7. Every region competes over all classes, things and stuff; the
accuracies are means over the classes that occur, for things and stuff apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.evaluators.base import Track, evaluating, placement, untracked
from gradeclip_ft.metrics.accuracy import ClassMeanAccuracy
from gradeclip_ft.models.class_embeddings import class_embeddings
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.pooling import pool_boxes, pool_masks
from gradeclip_ft.results.fingerprint import data_fingerprint, hash_json
from gradeclip_ft.results.record import Json, Measured
from gradeclip_ft.text.prompts import VILD

GROUPS = ("boxes", "thing_masks", "stuff_masks", "stuff_boxes")
TOPK = (1, 5)


@runtime_checkable
class RegionBatches(Protocol):
    """Batches of regions with a known number."""

    def __iter__(self) -> Iterator[RegionBatch]: ...

    def __len__(self) -> int: ...


@runtime_checkable
class OpenedRegions(Protocol):
    """Regions at one image size."""

    @property
    def names(self) -> Sequence[str]:
        """Class names in order of the labels."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """Annotation files."""
        ...

    @property
    def listed(self) -> Sequence[Path]:
        """Images and masks."""
        ...

    @property
    def counts(self) -> Mapping[str, Any]:
        """Images, things and stuff that count, and what was skipped by cause."""
        ...

    def batches(self, batch_size: int, workers: int) -> RegionBatches:
        """All regions once."""
        ...


@runtime_checkable
class RegionSource(Protocol):
    """Where regions come from; called with the evaluator's image size and the model's pixels."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """Choices that change the numbers."""
        ...

    def prepare(self) -> None:
        """Make or check the data."""
        ...

    def __call__(
        self,
        *,
        image_size: int,
        patch: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> OpenedRegions:
        """The regions at one image size."""
        ...


@dataclass(frozen=True)
class RegionEvaluator:
    """Top-1 and top-5 of boxes, thing masks and stuff masks.

    Attributes:
        name: Of the result file.
        data: Where regions come from.
        image_size: Side of the padded square in pixels; None for the model's own size.
        templates: "vild" for its 63, or sentences with `{}` for the class name.
        batch_size: Images per forward pass; does not change the numbers.
        workers: Processes that load images; 0 loads them here.
    """

    name: str
    data: RegionSource
    image_size: int | None = None
    templates: str | Sequence[str] = "vild"
    batch_size: int = 32
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuse an unknown name of templates, or a sentence without place for the class name."""
        sentences = self.sentences
        if not sentences or any("{}" not in sentence for sentence in sentences):
            raise ValueError(f"templates={self.templates!r}: each needs {{}} for the class name")

    @property
    def sentences(self) -> tuple[str, ...]:
        """The templates themselves."""
        if isinstance(self.templates, str):
            if self.templates != "vild":
                raise ValueError(f"templates={self.templates!r}: write vild or a list of sentences")
            return VILD
        return tuple(self.templates)

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        size: dict[str, Json] = {} if self.image_size is None else {"image_size": self.image_size}
        return {
            "task": "region classification",
            **size,
            "templates": self.templates if isinstance(self.templates, str) else "own",
            "templates_hash": hash_json(list(self.sentences)),
            "letterbox": "bicubic, padded right and below with black",
            "box_pooling": "RoIAlign 1x1, sampling_ratio -1, aligned",
            "mask_pooling": "mean of unit tokens, bicubic mask above 0",
            "accuracy": "mean over classes present, among all classes",
            **self.data.protocol,
        }

    def prepare(self) -> None:
        """Make or check the data."""
        self.data.prepare()

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model.

        Raises:
            FileNotFoundError: Data are missing.
            ValueError: The model has no dense features, the size does not suit its patches, the
                data are damaged, or the features are not finite.
        """
        size = self._size(loaded)
        regions = self.data(image_size=size, patch=loaded.patch, mean=loaded.mean, std=loaded.std)
        meters = {group: ClassMeanAccuracy(len(regions.names), TOPK) for group in GROUPS}
        batches = regions.batches(self.batch_size, self.workers)
        empty = 0
        with evaluating(loaded.clip):
            classes = class_embeddings(loaded.clip, loaded.tokenizer, regions.names, self.sentences)
            for batch in track(batches, f"{self.name}: images", len(batches)):
                empty += _count(meters, classes, loaded, batch)
        metrics = {
            f"{group}/{key}": float(value)
            for group, meter in meters.items()
            if int(meter.total.sum()) > 0
            for key, value in meter.compute().items()
        }
        details: dict[str, Json] = {
            "empty_masks": empty,
            "classes_present": {group: int((m.total > 0).sum()) for group, m in meters.items()},
            "share_of_ties": {
                group: int(m.tied) / max(1.0, float(m.total.sum())) for group, m in meters.items()
            },
        }
        return Measured(
            metrics=metrics,
            protocol={
                **self.protocol,
                "image_size": size,
                "grid": size // loaded.patch,
                "classes": len(regions.names),
                "class_list_hash": hash_json(list(regions.names)),
            },
            data=data_fingerprint(regions.files, regions.listed, regions.counts),
            details=details,
        )

    def _size(self, loaded: LoadedClip) -> int:
        """Side of the square; towers interpolate their positions to it."""
        height, width = loaded.image_size
        tower = loaded.clip.image
        if tower.unexplained is not None:
            raise ValueError(f"{self.name} needs dense features, but {tower.unexplained}")
        if self.image_size is None and height != width:
            raise ValueError(
                f"{self.name} pads photos to squares, the model takes {height} x {width}; set "
                "the evaluator's image_size"
            )
        wanted = height if self.image_size is None else self.image_size
        if wanted % tower.patch:
            below = wanted // tower.patch * tower.patch
            raise ValueError(
                f"{self.name} asks for {wanted} pixels, no multiple of the model's patch size "
                f"{tower.patch}; set the evaluator's image_size to {below or tower.patch} or "
                f"{below + tower.patch}"
            )
        return wanted


def _count(
    meters: Mapping[str, ClassMeanAccuracy],
    classes: Float[Tensor, "K D"],
    loaded: LoadedClip,
    batch: RegionBatch,
) -> int:
    """Classify the regions of one batch; hands back how many masks were empty on the grid."""
    device, dtype = placement(loaded.clip)
    batch = batch.to(device)
    if batch.masks is None:
        raise ValueError("regions without masks cannot be evaluated; use annotations with masks")
    dense = loaded.clip.image.trace(batch.images.to(dtype)).dense()  # (B, h, w, D)
    thing = batch.is_thing.bool()
    by_box = pool_boxes(dense, batch.boxes, batch.owner) @ classes.T  # (R, K)
    by_mask = pool_masks(dense, batch.masks, batch.owner) @ classes.T
    for group, scores, chosen in (
        ("boxes", by_box, thing),
        ("stuff_boxes", by_box, ~thing),
        ("thing_masks", by_mask, thing),
        ("stuff_masks", by_mask, ~thing),
    ):
        meters[group].update(scores[chosen].cpu(), batch.labels[chosen].cpu())
    return int((batch.masks.flatten(1).sum(1) == 0).sum())
