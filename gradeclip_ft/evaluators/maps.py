"""Where maps point, and what they cost.

The pointing game asks, for every class in a picture: is the hottest place on an object of it?
`any_object` asks for an object of any class, which a method that ignores the text can find too.
All methods read one pass over the same pixels and text vectors; maps are enlarged bilinearly.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.data.files import Source
from gradeclip_ft.data.label_maps import LabelMapImages
from gradeclip_ft.data.regions import RegionImages
from gradeclip_ft.evaluators.base import Track, evaluating, placement, untracked
from gradeclip_ft.evaluators.embed import encode_classes
from gradeclip_ft.evaluators.regions import square_side
from gradeclip_ft.explain.base import Explainer, explain_image, settings_of, shared_pass
from gradeclip_ft.explain.driver import Supported, heat_maps
from gradeclip_ft.metrics import (
    Threshold,
    average_precision,
    chance,
    confusion,
    energy_pointing_game,
    is_constant,
    label_ranks,
    overlap,
    pointing_game,
    scaled,
    share_inside,
)
from gradeclip_ft.models.clip import (
    IMAGENET_NAMES,
    ImageTextModel,
    LoadedClip,
    imagenet_wnids,
)
from gradeclip_ft.ops.heatmap import pool_heatmap, to_pixels
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.results.record import Json, Measured, data_fingerprint, hash_json
from gradeclip_ft.text.prompts import phrase_prompt

PIXELS = 1  # masks are asked for at pixels: a grid with cells of one
CONSTANT, PIXEL_COUNTS = "/constant", "/pixels"
REFERENCE = "encode_image"
SEED = 0


@dataclass(frozen=True)
class LocalisationEvaluator:
    """Pointing game of several methods, overlap with masks (Table 4), and what chance gives.

    `inside` and `pooled` say before training whether a method's maps can serve it: how much of what
    a step would pool lies on the object, and what it names; beside them a uniform map (`chance`)
    and the mask itself (`true_mask`), the most that any map could bring.

    Attributes:
        prompt: Sentence with `{}` for the class name.
        threshold: Of the map between 0 and 1, for what counts pixels: a number, the `mean` of the
            map, or Otsu's.
        two_class: Also average precision of object and background together, as Chefer et al.'s
            program counts it.
    """

    name: str
    data: Source[RegionImages] | Source[LabelMapImages]
    explainers: Mapping[str, Explainer]
    methods: Sequence[str] | None = None
    image_size: int | None = None
    prompt: str = "a photo of a {}"
    threshold: Threshold = 0.5
    two_class: bool = False
    batch_size: int = 8
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "localisation of phrases",
            **({"image_size": self.image_size} if self.image_size else {}),
            "prompt": self.prompt,
            "map": "enlarged bilinearly to the padded square, min-maxed over the pixels that count",
            "mask": "all objects of a class in a picture",
            "pointing": "share of the highest pixels on the mask; a constant map misses",
            "any_object": "as pointing, on the objects of all classes",
            "energy": "share of the map, shifted to a minimum of 0, on the mask",
            "inside": "share of the map above 0, as a training step pools by it, on the mask",
            "pooled": "share of phrases that are top-1 of all classes for F_d pooled by the map",
            "threshold": self.threshold,
            "ap": "of the pixels of the object among all, mean over phrases",
            "iou": "of the object, mean over phrases; iou_set of object and background by counts",
            "methods": settings(chosen(self.explainers, self.methods)),
            **self.data.protocol,
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        require_float32(loaded.clip, self.name)
        side = square_side(loaded, self.image_size, self.name)
        regions = self.data(image_size=side, patch=PIXELS, mean=loaded.mean, std=loaded.std)
        batches = regions.batches(self.batch_size, self.workers)
        found: dict[str, list[Tensor]] = {}
        empty = bare = 0
        occurring: set[int] = set()
        with evaluating(loaded.clip):
            supported = Supported(chosen(self.explainers, self.methods), loaded)
            names = class_names(regions.classes)
            classes = encode_classes(
                loaded, names, [self.prompt], track, self.name, say=phrase_prompt
            )
            for batch in track(batches, f"{self.name}: images", len(batches)):
                phrases = phrases_of(batch)
                empty += phrases.empty
                bare += len(batch.images) - len(torch.unique(phrases.owner))
                occurring.update(phrases.labels.tolist())
                if not len(phrases.owner):
                    continue
                scores = _scores(self, supported, loaded, batch, phrases, classes)
                for key, values in scores.items():
                    found.setdefault(key, []).append(values.cpu())
        if not found:
            raise ValueError(f"{self.name}: no picture has a pixel of a class; check the masks")
        scores = {key: torch.cat(values).double() for key, values in found.items()}
        count = len(scores["chance/pointing"])
        return Measured(
            metrics=means(scores),
            protocol={
                **self.protocol,
                "image_size": side,
                "class_list_hash": hash_json(list(regions.classes)),
            },
            data=data_fingerprint(regions.files, regions.listed, regions.counts),
            details={
                "phrases": count,
                "empty_masks": empty,
                "images_without_phrases": bare,
                "masks_of_all_pixels": int((scores["chance/pointing"] >= 1).sum()),
                "classes_without_images": len(regions.classes) - len(occurring),
                "constant_maps": {
                    key.removesuffix(CONSTANT): int(values.sum())
                    for key, values in scores.items()
                    if key.endswith(CONSTANT) and values.any()
                },
                "standard_error": {
                    key: round(float(values.std()) / count**0.5, 4)
                    for key, values in scores.items()
                    if key.endswith("/pointing") and count > 1
                },
                "left_out": {**supported.left_out},
            },
        )


def class_names(classes: Sequence[str]) -> list[str]:
    """Names to say: ImageNet's for WordNet ids, others as they are."""
    by_wnid = dict(zip(imagenet_wnids(), IMAGENET_NAMES, strict=True))
    return [by_wnid.get(name, name) for name in classes]


def means(scores: Mapping[str, Float[Tensor, "P ..."]]) -> dict[str, float]:
    """Metrics over all phrases; `iou_set` adds up pixels first (object and background alike)."""
    metrics = {}
    for key, values in scores.items():
        if key.endswith(PIXEL_COUNTS):
            hit, wrong, missed, clear = values.sum(0).tolist()
            shares = [part / max(1, part + wrong + missed) for part in (hit, clear)]
            metrics[key.removesuffix(PIXEL_COUNTS) + "/iou_set"] = sum(shares) / 2
        elif not key.endswith(CONSTANT):
            metrics[key] = float(values.mean())
    return metrics


@dataclass(frozen=True)
class Phrases:
    """Classes of a batch's pictures.

    Attributes:
        owner: Picture of each phrase.
        labels: Class of each phrase.
        masks: Every object of that class in that picture.
        objects: Every object of that picture, of whatever class.
        counted: Pixels that count.
        empty: Classes left out, because no pixel of their objects was left at this size.
    """

    owner: Int[Tensor, " P"]
    labels: Int[Tensor, " P"]
    masks: Bool[Tensor, "P H W"]
    objects: Bool[Tensor, "P H W"]
    counted: Bool[Tensor, "P H W"]
    empty: int


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
    empty = batch.masks.new_zeros(1, *batch.masks.shape[1:])
    masks = empty.repeat(len(pairs), 1, 1).index_add_(0, row, batch.masks) > 0
    objects = empty.repeat(len(batch.images), 1, 1).index_add_(0, batch.owner, batch.masks) > 0
    ignored = batch.ignored
    if ignored is None:
        ignored = torch.zeros_like(objects)
    kept = masks.flatten(1).any(1)
    owner, labels = pairs[kept].T
    return Phrases(owner, labels, masks[kept], objects[owner], ~ignored[owner], int((~kept).sum()))


def _scores(
    evaluator: LocalisationEvaluator,
    supported: Supported,
    loaded: LoadedClip,
    batch: RegionBatch,
    phrases: Phrases,
    classes: Float[Tensor, "K D"],
) -> dict[str, Tensor]:
    """Values of every phrase by metric."""
    device, _ = placement(loaded.clip)
    masks, objects, counted, owner = (
        each.to(device) for each in (phrases.masks, phrases.objects, phrases.counted, phrases.owner)
    )
    target = classes[phrases.labels.to(device)]
    with shared_pass(loaded.clip, loaded.clip.image, batch.images.to(device)) as shared:
        maps = heat_maps(supported, shared, target, owner)
        dense = shared.trace.dense() if loaded.clip.image.unexplained is None else None
    keys = ("pointing", "energy", "inside", "pixel_precision", "ap")
    found = {f"chance/{key}": chance(masks, counted) for key in keys}
    found["chance/any_object"] = chance(objects, counted)
    labels = phrases.labels.to(device)
    if dense is not None:  # what a uniform map and a perfect one would pool
        true = adaptive_avg_pool2d(masks.float(), (dense.shape[1], dense.shape[2]))
        for name, grid in (("chance", torch.ones_like(true)), ("true_mask", true)):
            found[f"{name}/pooled"] = _named(dense, grid, owner, labels, classes)
    for name, grid in maps.items():
        heat = to_pixels(grid.float(), (masks.shape[1], masks.shape[2]))
        found[f"{name}{CONSTANT}"] = is_constant(heat).float()
        found[f"{name}/inside"] = share_inside(heat * counted, masks)
        if dense is not None:
            found[f"{name}/pooled"] = _named(dense, grid.float(), owner, labels, classes)
        heat = scaled(heat, counted)  # 0 where pixels do not count
        found[f"{name}/pointing"] = pointing_game(heat, masks)
        found[f"{name}/energy"] = energy_pointing_game(heat, masks)
        found[f"{name}/any_object"] = pointing_game(heat, objects)
        pixels = confusion(heat, masks, counted, evaluator.threshold)
        found |= {f"{name}/{key}": values for key, values in overlap(pixels).items()}
        found[f"{name}{PIXEL_COUNTS}"] = pixels
        score, right = heat.masked_fill(~counted, -1).flatten(1), masks.flatten(1)
        found[f"{name}/ap"] = average_precision(score, right)
        if evaluator.two_class:
            clear = (1 - heat).masked_fill(~counted, -1).flatten(1)
            both = torch.cat([(counted & ~masks).flatten(1), right], 1)
            found[f"{name}/ap_two_class"] = average_precision(torch.cat([clear, score], 1), both)
    return found


def _named(
    dense: Float[Tensor, "B h w D"],
    heat: Float[Tensor, "P m n"],
    owner: Int[Tensor, " P"],
    labels: Int[Tensor, " P"],
    classes: Float[Tensor, "K D"],
) -> Float[Tensor, " P"]:
    """Whether a phrase is the nearest class of the region that its map pools."""
    grid = dense.shape[1], dense.shape[2]
    if heat.shape[1:] != grid:  # of methods that change pixels
        heat = adaptive_avg_pool2d(heat, grid)
    regions = unit(pool_heatmap(dense, heat.clamp(min=0), owner))
    return (label_ranks(regions @ classes.T, labels) < 1).float()


@dataclass(frozen=True)
class TimingEvaluator:
    """Median seconds of every method, and of `encode_image` alone on the same pictures.

    Pictures are random pixels of the model's size and text vectors are random, which cost what real
    ones cost. A time is that from pixels and text vectors to finished maps; encoding texts is not
    part of it. The methods take turns, so that a machine that slows down slows all of them.

    Attributes:
        methods: Names of those to time; None for all.
        image_size: Side in pixels; None for the model's own size.
        batch_size: Pictures per call.
        phrases: Texts per picture.
        warm_up: Calls before the first that counts; slow methods (see `budget`) have one.
        rounds: Calls that count, at most.
        budget: Seconds for the calls of a method that count. A method of which only k calls fit has
            k rounds; where not even one fits, its warm-up is its time. `details.rounds` says so.
    """

    name: str
    explainers: Mapping[str, Explainer]
    methods: Sequence[str] | None = None
    image_size: int | None = None
    batch_size: int = 1
    phrases: int = 1
    warm_up: int = 3
    rounds: int = 20
    budget: float = 20.0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "time of heat maps",
            **({"image_size": self.image_size} if self.image_size else {}),
            "pictures": "random pixels",
            "batch_size": self.batch_size,
            "phrases_per_image": self.phrases,
            "from": "pixels and text vectors on the device",
            "to": "maps at the patch grid",
            "time": "median, methods in turns",
            "warm_up": self.warm_up,
            "rounds": self.rounds,
            "budget": self.budget,
            "methods": settings(chosen(self.explainers, self.methods)),
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Time one model, where it is."""
        require_float32(loaded.clip, self.name)
        height, width = (self.image_size,) * 2 if self.image_size else loaded.image_size
        device, count = loaded.clip.device, self.batch_size * self.phrases
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randn(self.batch_size, 3, height, width, generator=generator).to(device)
        owner = torch.arange(self.batch_size).repeat_interleave(self.phrases).to(device)
        with evaluating(loaded.clip):
            channels = loaded.clip.image.encode(images).shape[1]
            target = unit(torch.randn(count, channels, generator=generator)).to(device)
            supported = Supported(chosen(self.explainers, self.methods), loaded)

            def call(method: Explainer) -> Callable[[], object]:
                return partial(explain_image, method, loaded.clip, images, target, owner)

            first = supported.run(lambda method: seconds(call(method), device))
            calls = {name: call(method) for name, method in supported.methods.items()}
            calls = {REFERENCE: partial(loaded.clip.image.encode, images), **calls}
            first = {REFERENCE: seconds(calls[REFERENCE], device), **first}
            times = self._in_turns(calls, first, device, track)
        median = {name: statistics.median(each) for name, each in times.items()}
        metrics: dict[str, float] = {}
        for name, taken in median.items():
            metrics[f"{name}/seconds"] = taken / self.batch_size
            if name != REFERENCE:
                metrics[f"{name}/seconds_per_map"] = taken / count
            metrics[f"{name}/times_encode_image"] = taken / median[REFERENCE]
        on_gpu = device.type == "cuda"
        return Measured(
            metrics=metrics,
            protocol={
                **self.protocol,
                "image_size": [height, width],
                "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
                "threads": torch.get_num_threads(),
            },
            data=data_fingerprint([], [], {"images": self.batch_size}),
            details={
                "rounds": {name: len(each) for name, each in times.items()},
                "quartiles": {name: _quartiles(each) for name, each in times.items()},
                "left_out": {**supported.left_out},
            },
        )

    def _in_turns(
        self,
        calls: Mapping[str, Callable[[], object]],
        first: Mapping[str, float],
        device: torch.device,
        track: Track,
    ) -> dict[str, list[float]]:
        """Seconds of every call that counts, by method."""
        left = {name: min(self.rounds, int(self.budget / first[name])) for name in calls}
        times = {name: [] if count else [first[name]] for name, count in left.items()}
        for name, count in left.items():
            for _ in range(self.warm_up - 1 if count == self.rounds else 0):
                seconds(calls[name], device)
        for turn in track(range(self.rounds), f"{self.name}: rounds", self.rounds):
            for name, count in left.items():
                if turn < count:
                    times[name].append(seconds(calls[name], device))
        return times


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call, waiting for the device before and after it."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    start = now()
    call()
    return now() - start


def _quartiles(times: Sequence[float]) -> list[Json]:
    """First and third quartile of a call in seconds."""
    ends = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times
    return [round(ends[0], 6), round(ends[-1], 6)]


def chosen(
    explainers: Mapping[str, Explainer], methods: Sequence[str] | None
) -> dict[str, Explainer]:
    """The methods that are asked for, in that order; all for None."""
    names = list(explainers) if methods is None else list(methods)
    unknown = [name for name in names if name not in explainers]
    if unknown or not names:
        raise ValueError(
            f"methods={names}: {', '.join(unknown) or 'none asked for'}; choose from "
            f"{', '.join(explainers)}"
        )
    return {name: explainers[name] for name in names}


def settings(explainers: Mapping[str, Explainer]) -> dict[str, Json]:
    """The settings of each method, as plain JSON."""
    told = {
        name: {"method": type(method).__name__, **dict(settings_of(method))}
        for name, method in explainers.items()
    }
    plain: dict[str, Json] = json.loads(json.dumps(told))
    return plain


def require_float32(clip: ImageTextModel, name: str) -> None:
    """Refuse a model in half precision, whose gradients are not a reference."""
    _, dtype = placement(clip)
    if dtype != torch.float32:
        raise ValueError(f"{name} explains in float32, the model is {dtype}; set precision=float32")
