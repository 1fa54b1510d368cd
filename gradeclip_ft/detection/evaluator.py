"""Average precision of a detector on base and novel classes, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gradeclip_ft.data.detection import BoxImages, CocoBoxes, Placing
from gradeclip_ft.detection.detector import BACKGROUND, Detector
from gradeclip_ft.evaluators.base import Track, evaluating, untracked
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.results.record import Json, Measured, data_fingerprint, hash_json


def require_detector(loaded: LoadedClip, what: str) -> Detector:
    """The detector of a run.

    Raises:
        ValueError: It is a CLIP alone.
    """
    if not isinstance(loaded.clip, Detector):
        raise ValueError(
            f"{what} needs a detector, {loaded.name} is a model of images and texts; train one on "
            "it: train +exp=detector_shapes or +exp=detector_ovcoco_vitb16, with init_from=RUN"
        )
    return loaded.clip


@dataclass(frozen=True)
class DetectionEvaluator:
    """AP at an overlap of 0.5 on novel, base and all classes; AP and recall over all overlaps.

    Every image is searched for all classes, novel ones too. A class without a box is left out of
    the means.

    Attributes:
        name: Of the result file.
        data: Where boxes come from.
    """

    name: str
    data: CocoBoxes
    batch_size: int = 8
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "open-vocabulary detection",
            "accuracy": "mean over classes of COCO's average precision, 100 boxes per image",
            **self.data.protocol,
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one detector."""
        detector = require_detector(loaded, self.name)
        images = self.data()
        names, base = self.data.classes()
        settings, results = detector.settings, []
        placing = Placing(settings.side, loaded.mean, loaded.std)
        batches = images.batches(placing, self.batch_size, self.workers)
        device, done = detector.device, 0
        with evaluating(detector):
            vocabulary = detector.vocabulary(names, base)
            for batch in track(batches, f"{self.name}: images", len(batches)):
                found = detector.detect(batch.images.to(device), batch.sizes.to(device), vocabulary)
                for each, scale in zip(found, batch.scale.tolist(), strict=True):
                    image = images.chosen[done][0]
                    done += 1
                    sides = torch.cat([each.boxes[:, :2], each.boxes[:, 2:] - each.boxes[:, :2]], 1)
                    results += [
                        {"image_id": image.id, "category_id": label, "bbox": box, "score": score}
                        for label, box, score in zip(
                            each.labels.tolist(),
                            (sides / scale).tolist(),
                            each.scores.tolist(),
                            strict=True,
                        )
                    ]
        metrics, by_class = average_precision(images, results)
        shares = {"base": settings.base_share, "novel": settings.novel_share}
        return Measured(
            metrics=metrics,
            protocol={
                **self.protocol,
                "image_size": settings.side,
                "templates_hash": hash_json(list(settings.sentences)),
                "background": BACKGROUND,
                "share_of_frozen_model": shares,
                "scale": settings.scale,
                "class_list_hash": hash_json(names),
            },
            data=data_fingerprint(images.files, images.listed, images.counts),
            details={"detections": len(results), "by_class": by_class},
        )


def average_precision(
    images: BoxImages, results: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], dict[str, float | None]]:
    """AP and recall of detections, and AP50 of each class (None without a box).

    Args:
        images: With all true boxes.
        results: COCO's form; `category_id` is a label of `images`.
    """
    truth = COCO()
    truth.dataset = _dataset(images)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        # loadRes refuses an empty list.
        found = truth.loadRes([dict(one) for one in results]) if results else COCO()
        run = COCOeval(truth, found, "bbox")
        run.params.imgIds = [image.id for image, _ in images.chosen]
        run.params.catIds = list(range(len(images.classes)))
        run.evaluate()
        run.accumulate()
    # overlaps .5 to .95, recalls, classes, areas (all first), most boxes (100 last); -1: no box
    precision = run.eval["precision"][:, :, :, 0, -1]
    recall = run.eval["recall"][:, :, 0, -1]
    half, whole, reached = (_by_class(x) for x in (precision[:1], precision, recall[:, None]))
    groups = {"novel": slice(images.base, None), "base": slice(0, images.base), "all": slice(None)}
    metrics = {f"{name}/AP50": _mean(half[rows]) for name, rows in groups.items()}
    metrics |= {f"{name}/AP": _mean(whole[rows]) for name, rows in groups.items()}
    metrics |= {f"{name}/AR100": _mean(reached[rows]) for name, rows in groups.items()}
    names = [category.name for category in images.classes]
    by_class = {
        name: None if np.isnan(value) else round(float(value), 4)
        for name, value in zip(names, half, strict=True)
    }
    return {name: value for name, value in metrics.items() if not np.isnan(value)}, by_class


def _by_class(values: Any) -> Any:
    """Mean over overlaps and recalls, per class; NaN where -1 says that there is no box."""
    return np.where(values[0, 0] < 0, np.nan, values.mean((0, 1)))


def _mean(values: Any) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _dataset(images: BoxImages) -> dict[str, Any]:
    annotations = [
        {
            "id": number,
            "image_id": image.id,
            "category_id": region.label,
            "bbox": list(region.box),
            "area": region.box[2] * region.box[3],
            "iscrowd": int(region.crowd),
        }
        for number, (image, region) in enumerate(
            ((image, region) for image, regions in images.chosen for region in regions), start=1
        )
    ]
    return {
        "info": {},
        "images": [
            {"id": image.id, "height": image.height, "width": image.width}
            for image, _ in images.chosen
        ],
        "annotations": annotations,
        "categories": [
            {"id": row, "name": category.name} for row, category in enumerate(images.classes)
        ],
    }
