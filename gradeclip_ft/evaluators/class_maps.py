"""ICLIP's metrics of class maps: mAP, mMIoU and mFMB (Li et al., equations 7 and 8).

Their best threshold is chosen on the evaluation set itself, one per class, as published: mMIoU is
optimistic by design.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

from gradeclip_ft.data.files import Source
from gradeclip_ft.data.label_maps import LabelMapImages
from gradeclip_ft.data.regions import RegionImages
from gradeclip_ft.evaluators.base import Track, evaluating, placement, untracked
from gradeclip_ft.evaluators.embed import encode_classes
from gradeclip_ft.evaluators.maps import (
    PIXELS,
    chosen,
    class_names,
    phrases_of,
    require_float32,
    settings,
)
from gradeclip_ft.evaluators.regions import square_side
from gradeclip_ft.explain.base import Explainer, shared_pass
from gradeclip_ft.explain.driver import Supported, heat_maps
from gradeclip_ft.metrics import average_precision, scaled
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.results.record import Json, Measured, data_fingerprint, hash_json
from gradeclip_ft.text.prompts import phrase_prompt

STEPS = 100  # thresholds 0, 0.01, ..., 1


@dataclass(frozen=True)
class ClassMapsEvaluator:
    """Maps of the classes that a picture has, against their masks.

    `mAP` is that of the cosine of picture and class over all pictures, mean over classes; it does
    not depend on the method. `METHOD/mMIoU`: the map is resized bicubically and min-maxed; the IoU
    of the class at the best threshold of the class. `METHOD/mFMB`: mean of the map on the object
    minus the mean elsewhere.

    Attributes:
        prompt: Sentence with `{}` for the class name.
        accumulate: IoU by picture and then their mean, or pixels added up over pictures.
    """

    name: str
    data: Source[RegionImages] | Source[LabelMapImages]
    explainers: Mapping[str, Explainer]
    methods: Sequence[str] | None = None
    image_size: int | None = None
    prompt: str = "a photo of the {}"
    accumulate: Literal["images", "pixels"] = "images"
    batch_size: int = 8
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "maps of classes",
            **({"image_size": self.image_size} if self.image_size else {}),
            "prompt": self.prompt,
            "map": "bicubic to the padded square, min-maxed over the pixels that count",
            "thresholds": "0 to 1 by 0.01, the best of each class on this set",
            "accumulate": self.accumulate,
            "methods": settings(chosen(self.explainers, self.methods)),
            **self.data.protocol,
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        require_float32(loaded.clip, self.name)
        side = square_side(loaded, self.image_size, self.name)
        regions = self.data(image_size=side, patch=PIXELS, mean=loaded.mean, std=loaded.std)
        batches = regions.batches(self.batch_size, self.workers)
        device, _ = placement(loaded.clip)
        count = len(regions.classes)
        meters: dict[str, _Meter] = {}
        scores, present, empty = [], [], 0
        with evaluating(loaded.clip):
            supported = Supported(chosen(self.explainers, self.methods), loaded)
            names = class_names(regions.classes)
            classes = encode_classes(
                loaded, names, [self.prompt], track, self.name, say=phrase_prompt
            )
            for batch in track(batches, f"{self.name}: images", len(batches)):
                phrases = phrases_of(batch)
                empty += phrases.empty
                has = torch.zeros(len(batch.images), count, dtype=torch.bool)
                has[phrases.owner, phrases.labels] = True
                present.append(has)
                pixels, owner = batch.images.to(device), phrases.owner.to(device)
                labels, masks = phrases.labels.to(device), phrases.masks.to(device)
                with shared_pass(loaded.clip, loaded.clip.image, pixels) as shared:
                    scores.append((unit(shared.embedding) @ classes.T).cpu())
                    if not len(owner):
                        continue
                    maps = heat_maps(supported, shared, classes[labels], owner)
                for name, grid in maps.items():
                    heat = _resized(grid, masks, phrases.counted.to(device))
                    meter = meters.setdefault(name, _Meter(count, device))
                    meter.update(heat, masks, phrases.counted.to(device), labels)
        has, found = torch.cat(present), torch.cat(scores)
        occurs = has.any(0)
        if not occurs.any():
            raise ValueError(f"{self.name}: no picture has a pixel of a class; check the masks")
        precision = average_precision(found.T, has.T)[occurs]
        metrics = {"mAP": float(precision.mean())}
        best: dict[str, Json] = {}
        for name, meter in meters.items():
            iou = meter.iou(self.accumulate)[occurs]
            metrics[f"{name}/mMIoU"] = float(iou.amax(1).mean())
            metrics[f"{name}/mFMB"] = float(
                meter.difference[occurs].div(meter.count[occurs]).mean()
            )
            best[name] = [round(int(place) / STEPS, 2) for place in iou.argmax(1)]
        return Measured(
            metrics=metrics,
            protocol={
                **self.protocol,
                "image_size": side,
                "class_list_hash": hash_json(list(regions.classes)),
            },
            data=data_fingerprint(regions.files, regions.listed, regions.counts),
            details={
                "phrases": int(has.sum()),
                "empty_masks": empty,
                "images_without_phrases": int((~has.any(1)).sum()),
                "classes_without_images": int((~occurs).sum()),
                "best_thresholds": best,
                "left_out": {**supported.left_out},
            },
        )


class _Meter:
    """Sums over the pictures of each class.

    Attributes:
        count: Pictures.
        difference: Mean on the object minus mean elsewhere; 0 where nothing is elsewhere.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(classes, *shape, dtype=torch.float64, device=device)

        self.count, self.difference = zeros(), zeros()
        self._ratio, self._both, self._either = (zeros(STEPS + 1) for _ in range(3))

    def update(
        self,
        heat: Float[Tensor, "P H W"],
        masks: Bool[Tensor, "P H W"],
        counted: Bool[Tensor, "P H W"],
        labels: Int[Tensor, " P"],
    ) -> None:
        """Count maps between 0 and 1 of some classes of some pictures."""
        # A value v is above the thresholds 0, 1 / STEPS, ... of which there are ⌈v · STEPS⌉.
        level = (heat.double() * STEPS).ceil().long().flatten(1)
        inside, elsewhere = (counted & masks).flatten(1), (counted & ~masks).flatten(1)
        above = []
        for group in (inside, elsewhere):
            histogram = level.new_zeros(len(heat), STEPS + 2, dtype=torch.float64)
            histogram.scatter_add_(1, level, group.double())
            above.append(histogram.flip(1).cumsum(1).flip(1)[:, 1:])  # (P, STEPS + 1)
        both, size = above[0], inside.sum(1, keepdim=True).double()
        either = size + above[1]
        self.count.index_add_(0, labels, torch.ones_like(size[:, 0]))
        self._ratio.index_add_(0, labels, both / either)
        self._both.index_add_(0, labels, both)
        self._either.index_add_(0, labels, either)
        values = heat.double().flatten(1)
        rest = elsewhere.sum(1)
        means = [
            (values * group).sum(1) / group.sum(1).clamp(min=1) for group in (inside, elsewhere)
        ]
        self.difference.index_add_(0, labels, (means[0] - means[1]).masked_fill(rest == 0, 0.0))

    def iou(self, accumulate: str) -> Float[Tensor, "K T"]:
        """Of each class at each threshold."""
        if accumulate == "images":
            return self._ratio / self.count.unsqueeze(1).clamp(min=1)
        return self._both / self._either.clamp(min=1)


def _resized(
    grid: Float[Tensor, "P h w"], masks: Bool[Tensor, "P H W"], counted: Bool[Tensor, "P H W"]
) -> Float[Tensor, "P H W"]:
    size = [masks.shape[1], masks.shape[2]]
    large = interpolate(grid.float().unsqueeze(1), size, mode="bicubic", align_corners=False)
    return scaled(large.squeeze(1), counted)
