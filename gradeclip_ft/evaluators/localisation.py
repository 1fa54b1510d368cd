"""Where maps point: for every class in a picture, is the hottest place on an object of it?

`any_object` asks for an object of whatever class: what a method finds that knows no text. All
methods see the same pixels and the same text vectors; maps are enlarged bilinearly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.evaluators.base import Track, evaluating, placement, untracked
from gradeclip_ft.evaluators.embed import encode_classes
from gradeclip_ft.evaluators.methods import chosen, require_float32, settings
from gradeclip_ft.evaluators.region_source import RegionSource
from gradeclip_ft.evaluators.square import square_side
from gradeclip_ft.explain.able import Able
from gradeclip_ft.explain.base import Explainer, explain_image
from gradeclip_ft.explain.pictures import prepared
from gradeclip_ft.metrics.localisation import (
    chance,
    energy_pointing_game,
    is_constant,
    pointing_game,
)
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.heatmap import to_pixels
from gradeclip_ft.results.fingerprint import data_fingerprint, hash_json
from gradeclip_ft.results.record import Json, Measured
from gradeclip_ft.text.prompts import phrase_prompt

PIXELS = 1  # masks are asked for at pixels: a grid with cells of one


@dataclass(frozen=True)
class Phrases:
    """Classes of a batch's pictures.

    Attributes:
        owner: Picture of each phrase.
        labels: Class of each phrase.
        masks: Every object of that class in that picture.
        objects: Every object of that picture, of whatever class.
        empty: Classes left out, because no pixel of their objects was left at this size.
    """

    owner: Int[Tensor, " P"]
    labels: Int[Tensor, " P"]
    masks: Bool[Tensor, "P H W"]
    objects: Bool[Tensor, "P H W"]
    empty: int

    def to(self, device: torch.device) -> Phrases:
        """The same on another device."""
        return Phrases(
            owner=self.owner.to(device),
            labels=self.labels.to(device),
            masks=self.masks.to(device),
            objects=self.objects.to(device),
            empty=self.empty,
        )


@dataclass(frozen=True)
class LocalisationEvaluator:
    """Pointing game of several methods, by peak and by energy, and what chance gives.

    Attributes:
        name: Of the result file.
        data: Where pictures and objects come from.
        explainers: Methods by name.
        methods: Names of those to measure; None for all.
        image_size: Side of the padded square in pixels; None for the model's own size.
        prompt: Sentence with `{}` for the class name.
        batch_size: Pictures per call; does not change the numbers.
        workers: Processes that load images; 0 loads them here.
    """

    name: str
    data: RegionSource
    explainers: Mapping[str, Explainer]
    methods: Sequence[str] | None = None
    image_size: int | None = None
    prompt: str = "a photo of a {}"
    batch_size: int = 8
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        size: dict[str, Json] = {} if self.image_size is None else {"image_size": self.image_size}
        return {
            "task": "localisation of phrases",
            **size,
            "prompt": self.prompt,
            "map": "enlarged bilinearly to the padded square",
            "mask": "all objects of a class in a picture",
            "pointing": "share of the highest pixels on the mask; a constant map misses",
            "any_object": "as pointing, on the objects of all classes",
            "energy": "share of the map, shifted to a minimum of 0, on the mask",
            "methods": settings(chosen(self.explainers, self.methods)),
            **self.data.protocol,
        }

    def prepare(self) -> None:
        """Make or check the data."""
        self.data.prepare()

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model.

        Raises:
            FileNotFoundError: Data are missing.
            ValueError: The model can do none of the methods, is in half precision, the size does
                not suit its patches, the data are damaged, or a map is not finite.
        """
        require_float32(loaded.clip, self.name)
        side = square_side(loaded, self.image_size, self.name)
        regions = self.data(image_size=side, patch=PIXELS, mean=loaded.mean, std=loaded.std)
        batches = regions.batches(self.batch_size, self.workers)
        found: dict[str, list[Tensor]] = {}
        empty = 0
        with evaluating(loaded.clip):
            able = Able(prepared(chosen(self.explainers, self.methods), loaded))
            classes = encode_classes(
                loaded, regions.names, [self.prompt], track, self.name, say=phrase_prompt
            )
            for batch in track(batches, f"{self.name}: images", len(batches)):
                phrases = phrases_of(batch)
                empty += phrases.empty
                for key, values in _scores(able, loaded, batch, phrases, classes).items():
                    found.setdefault(key, []).append(values)
        scores = {key: torch.cat(values) for key, values in found.items()}
        return Measured(
            metrics={
                key: float(values.double().mean())
                for key, values in scores.items()
                if not key.endswith(CONSTANT)
            },
            protocol={
                **self.protocol,
                "image_size": side,
                "class_list_hash": hash_json(list(regions.names)),
            },
            data=data_fingerprint(regions.files, regions.listed, regions.counts),
            details=_details(scores, empty, able),
        )


CONSTANT = "/constant"


def phrases_of(batch: RegionBatch) -> Phrases:
    """One phrase for every class of every picture, with the union of its objects' masks.

    Raises:
        ValueError: The regions have no masks.
    """
    if batch.masks is None:
        raise ValueError("regions without masks cannot be pointed at; use annotations with masks")
    pairs, row = torch.unique(
        torch.stack([batch.owner, batch.labels], 1), dim=0, return_inverse=True
    )
    masks = _unions(batch.masks, row, len(pairs))
    objects = _unions(batch.masks, batch.owner, len(batch.images))
    kept = masks.flatten(1).any(1)
    owner, labels = pairs[kept].T
    return Phrases(owner, labels, masks[kept], objects[owner], int((~kept).sum()))


def _unions(
    masks: Float[Tensor, "R H W"], group: Int[Tensor, " R"], groups: int
) -> Bool[Tensor, "G H W"]:
    count = masks.new_zeros(groups, *masks.shape[1:])
    return count.index_add_(0, group, masks) > 0


def _scores(
    able: Able,
    loaded: LoadedClip,
    batch: RegionBatch,
    phrases: Phrases,
    classes: Float[Tensor, "K D"],
) -> dict[str, Tensor]:
    """Values of every phrase by metric."""
    device, _ = placement(loaded.clip)
    images, phrases = batch.images.to(device), phrases.to(device)
    masks, target = phrases.masks, classes[phrases.labels]

    def work(method: Explainer) -> Tensor:
        heat = explain_image(method, loaded.clip, images, target, phrases.owner).float()
        return to_pixels(heat, (masks.shape[1], masks.shape[2]))

    found = {f"chance/{key}": chance(masks) for key in ("pointing", "energy")}
    found["chance/any_object"] = chance(phrases.objects)
    for name, heat in able.each(work).items():
        found[f"{name}/pointing"] = pointing_game(heat, masks)
        found[f"{name}/energy"] = energy_pointing_game(heat, masks)
        found[f"{name}/any_object"] = pointing_game(heat, phrases.objects)
        found[f"{name}{CONSTANT}"] = is_constant(heat).float()
    return {key: values.cpu() for key, values in found.items()}


def _details(scores: Mapping[str, Tensor], empty: int, able: Able) -> dict[str, Any]:
    phrases = len(scores["chance/pointing"])
    constant = {
        key.removesuffix(CONSTANT): int(values.sum())
        for key, values in scores.items()
        if key.endswith(CONSTANT) and values.any()
    }
    errors = {
        key: round(float(values.double().std()) / phrases**0.5, 4)
        for key, values in scores.items()
        if key.endswith("/pointing") and phrases > 1
    }
    return {
        "phrases": phrases,
        "empty_masks": empty,
        "constant_maps": constant,
        "standard_error": errors,
        "left_out": {**able.left_out},
    }
