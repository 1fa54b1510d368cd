"""Region classification: dense features pooled by box or mask against class embeddings.

The protocol of Grad-ECLIP's Table 7. Every region competes over all classes, things and stuff; the
accuracies are means over the classes that occur, for things and stuff apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.data.files import Source
from gradeclip_ft.data.regions import RegionImages
from gradeclip_ft.evaluators.base import Track, evaluating, placement, untracked
from gradeclip_ft.evaluators.embed import encode_classes
from gradeclip_ft.metrics import ClassMeanAccuracy
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.heatmap import pool_boxes, pool_masks
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.results.record import Json, Measured, data_fingerprint, hash_json
from gradeclip_ft.text.prompts import VILD


def square_side(loaded: LoadedClip, wanted: int | None, name: str) -> int:
    """Side of the square in pixels; towers interpolate their positions to it.

    Args:
        loaded: The model.
        wanted: Side that is asked for; None for the model's own.
        name: Of the evaluator, for messages.
    """
    height, width = loaded.image_size
    tower = loaded.clip.image
    if tower.unexplained is not None:
        raise ValueError(f"{name} needs dense features, but {tower.unexplained}")
    if wanted is None and height != width:
        raise ValueError(
            f"{name} pads photos to squares, the model takes {height} x {width}; set the "
            "evaluator's image_size"
        )
    side = height if wanted is None else wanted
    if side % tower.patch:
        below = side // tower.patch * tower.patch
        raise ValueError(
            f"{name} asks for {side} pixels, which is not a multiple of the model's patch size "
            f"{tower.patch}; set the evaluator's image_size to {below or tower.patch} or "
            f"{below + tower.patch}"
        )
    return side


THINGS = {"boxes": "boxes", "masks": "thing_masks", "crops": "crops"}
STUFF = {"boxes": "stuff_boxes", "masks": "stuff_masks", "crops": "stuff_crops"}
ORDER = ("boxes", "thing_masks", "stuff_masks", "stuff_boxes", "crops", "stuff_crops")
TOPK = (1, 5)


@dataclass(frozen=True)
class RegionEvaluator:
    """Top-1 and top-5 of boxes, thing masks and stuff masks.

    Attributes:
        name: Of the result file.
        data: Where regions come from.
        image_size: Side of the padded square in pixels; None for the model's own size.
        templates: "vild" for its 63, or sentences with `{}` for the class name.
        micro: Add the share of correct regions, every region alike, as `micro_top1`.
        crops: Add the class embedding of each region's own crop, at the model's own size.
        batch_size: Images per forward pass; does not change the numbers.
        workers: Processes that load images; 0 loads them here.
    """

    name: str
    data: Source[RegionImages]
    image_size: int | None = None
    templates: str | Sequence[str] = "vild"
    micro: bool = False
    crops: bool = False
    batch_size: int = 32
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuse an unknown name of templates, or a sentence without place for the class name."""
        if isinstance(self.templates, str) and self.templates != "vild":
            raise ValueError(f"templates={self.templates!r}: write vild or a list of sentences")
        if not self.sentences or any("{}" not in sentence for sentence in self.sentences):
            raise ValueError(f"templates={self.templates!r}: each needs {{}} for the class name")

    @property
    def sentences(self) -> tuple[str, ...]:
        """The templates themselves."""
        return VILD if isinstance(self.templates, str) else tuple(self.templates)

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        size: dict[str, Json] = {} if self.image_size is None else {"image_size": self.image_size}
        crops = "class embedding at the model's own size, fitted into the square as the image"
        return {
            "task": "region classification",
            **size,
            "templates": self.templates if isinstance(self.templates, str) else "own",
            "templates_hash": hash_json(list(self.sentences)),
            "box_pooling": "RoIAlign 1x1, sampling_ratio -1, aligned",
            "mask_pooling": "mean of unit tokens, bicubic mask above 0",
            "accuracy": "mean over classes present, among all classes",
            **({"micro": True} if self.micro else {}),
            **({"crops": crops} if self.crops else {}),
            **self.data.protocol,
        }

    def prepare(self) -> None:
        """Make or check the data."""
        self.data.prepare()

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        size = square_side(loaded, self.image_size, self.name)
        regions = self.data(
            image_size=size,
            patch=loaded.patch,
            mean=loaded.mean,
            std=loaded.std,
            crop_size=max(loaded.image_size) if self.crops else None,
        )
        meters: dict[str, ClassMeanAccuracy] = {}
        names = regions.classes
        empty = 0
        batches = regions.batches(self.batch_size, self.workers)
        with evaluating(loaded.clip):
            classes = encode_classes(loaded, names, self.sentences, track, self.name)
            for batch in track(batches, f"{self.name}: images", len(batches)):
                self._count(meters, classes, loaded, batch)
                if batch.masks is not None:
                    empty += int((~batch.masks.bool().flatten(1).any(1)).sum())
        counted = {
            group: meters[group] for group in ORDER if group in meters and meters[group].total.any()
        }
        metrics: dict[str, float] = {}
        for group, meter in counted.items():
            metrics |= {f"{group}/{key}": value for key, value in meter.mean().items()}
            if self.micro:
                metrics |= {f"{group}/micro_{key}": value for key, value in meter.micro().items()}
        return Measured(
            metrics=metrics,
            protocol={
                **self.protocol,
                "image_size": size,
                "grid": size // loaded.patch,
                "classes": len(names),
                "class_list_hash": hash_json(names),
            },
            data=data_fingerprint(regions.files, regions.listed, regions.counts),
            details={
                "empty_masks": empty,
                "classes_present": {key: int((m.total > 0).sum()) for key, m in meters.items()},
                "share_of_ties": {key: meter.share_of_ties for key, meter in meters.items()},
                "by_class": {key: meter.by_class(names) for key, meter in meters.items()},
                "most_confused": {key: meter.most_confused(names) for key, meter in meters.items()},
            },
        )

    def _count(
        self,
        meters: dict[str, ClassMeanAccuracy],
        classes: Float[Tensor, "K D"],
        loaded: LoadedClip,
        batch: RegionBatch,
    ) -> None:
        """Classify the regions of one batch."""
        device, dtype = placement(loaded.clip)
        batch = batch.to(device)
        dense = loaded.clip.image.trace(batch.images.to(dtype)).dense()  # (B, h, w, D)
        found = {"boxes": pool_boxes(dense, batch.boxes, batch.owner)}
        if batch.masks is not None:
            found["masks"] = pool_masks(dense, batch.masks, batch.owner)
        if batch.crops is not None:
            parts = torch.split(batch.crops.to(dtype), self.batch_size)
            found["crops"] = torch.cat([unit(loaded.clip.image.encode(part)) for part in parts])
        thing = batch.is_thing.bool()
        for way, features in found.items():  # (R, D)
            scores = (features @ classes.T).cpu()  # (R, K)
            for group, rows in ((THINGS[way], thing), (STUFF[way], ~thing)):
                meter = meters.setdefault(group, ClassMeanAccuracy(len(classes), TOPK))
                meter.update(scores[rows.cpu()], batch.labels[rows].cpu())
