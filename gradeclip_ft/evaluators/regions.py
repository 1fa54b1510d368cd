"""Region classification: dense features pooled by box or mask against class embeddings.

The protocol of Grad-ECLIP's Table 7. Every region competes over all classes, things and stuff; the
accuracies are means over the classes that occur, for things and stuff apart. Beside them are
numbers that a model cannot win by one frequent class, or by telling things from stuff alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gradeclip_ft.batch import RegionBatch
from gradeclip_ft.data.files import Source
from gradeclip_ft.data.regions import RegionImages
from gradeclip_ft.evaluators.base import Track, evaluating, placement, untracked
from gradeclip_ft.evaluators.embed import encode_classes
from gradeclip_ft.metrics import ClassMeanAccuracy, class_mean, label_ranks
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.attention import DensePath
from gradeclip_ft.ops.heatmap import pool_boxes, pool_masks
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.results.record import Json, Measured, as_text, data_fingerprint, hash_json
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
AMONG_STUFF = "among_stuff"
Columns = dict[str, list[Tensor]]


@dataclass(frozen=True)
class RegionEvaluator:
    """Top-1 and top-5 of boxes, thing masks and stuff masks.

    By group there are also `rest_top1`, `rest_top5` (the mean without the most frequent class),
    `mrr` (mean of 1 / rank of the true class, first by class), for stuff `among_stuff_top1` (stuff
    classes alone compete), and with `parts` such as `colour_given_shape`. `details.samples` holds
    the image, label and rank of every region, from which intervals are made.

    Attributes:
        templates: "vild" for its 63, or sentences with `{}` for the class name.
        micro: Add the share of correct regions, every region alike, as `micro_top1`.
        crops: Add the class embedding of each region's own crop, at the model's own size.
        dense: How the last layer makes the dense features; the papers' is the value path.
        parts: What the words of a thing's class name are, such as colour and shape: adds the
            accuracy of each among the classes that agree in the others.
    """

    name: str
    data: Source[RegionImages]
    image_size: int | None = None
    templates: str | Sequence[str] = "vild"
    micro: bool = False
    crops: bool = False
    dense: DensePath = "value"
    parts: Sequence[str] = ()
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
        crops = "class embedding at the model's own size, fitted into the square as the image"
        return {
            "task": "region classification",
            **({"image_size": self.image_size} if self.image_size else {}),
            "templates": self.templates if isinstance(self.templates, str) else "own",
            "templates_hash": hash_json(list(self.sentences)),
            "box_pooling": "RoIAlign 1x1, sampling_ratio -1, aligned",
            "mask_pooling": "mean of unit tokens, bicubic mask above 0",
            "accuracy": "mean over classes present, among all classes",
            **({"micro": True} if self.micro else {}),
            **({"crops": crops} if self.crops else {}),
            **({} if self.dense == "value" else {"dense": self.dense}),
            **self.data.protocol,
        }

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
        names = regions.classes
        things = torch.tensor([category.is_thing for category in regions.categories])
        among = {AMONG_STUFF: ~things & ~things[:, None], **self._agreeing(names, things)}
        meters: dict[str, ClassMeanAccuracy] = {}
        samples: dict[str, Columns] = {}
        empty = images = 0
        batches = regions.batches(self.batch_size, self.workers)
        with evaluating(loaded.clip):
            classes = encode_classes(loaded, names, self.sentences, track, self.name)
            for batch in track(batches, f"{self.name}: images", len(batches)):
                for group, scores, rows in self._scores(classes, loaded, batch):
                    labels = batch.labels[rows]
                    meter = meters.setdefault(group, ClassMeanAccuracy(len(names), TOPK))
                    meter.update(scores, labels)
                    columns = samples.setdefault(group, defaultdict(list))
                    columns["image"].append(batch.owner[rows] + images)
                    columns["label"].append(labels)
                    columns["rank"].append(label_ranks(scores, labels))
                    for name, competing in among.items():
                        if (name == AMONG_STUFF) == (group in STUFF.values()):
                            columns[name].append(label_ranks(scores, labels, competing))
                images += len(batch.images)
                if batch.masks is not None:
                    empty += int((~batch.masks.bool().flatten(1).any(1)).sum())
        joined = {
            group: {name: torch.cat(parts) for name, parts in samples[group].items()}
            for group in ORDER
            if group in meters and meters[group].total.any()
        }
        metrics: dict[str, float] = {}
        for group, columns_of in joined.items():
            numbers = meters[group].mean()
            if self.micro:
                numbers |= {f"micro_{key}": each for key, each in meters[group].micro().items()}
                numbers["micro_mrr"] = float((1 / (columns_of["rank"] + 1.0)).mean())
            numbers |= fair_numbers(columns_of)
            metrics |= {f"{group}/{key}": value for key, value in numbers.items()}
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
                "most_frequent": {
                    key: names[most_frequent(columns["label"])] for key, columns in joined.items()
                },
                "share_of_ties": {key: meter.share_of_ties for key, meter in meters.items()},
                "by_class": {key: meter.by_class(names) for key, meter in meters.items()},
                "most_confused": {key: meter.most_confused(names) for key, meter in meters.items()},
                "samples": {
                    group: {name: as_text(column) for name, column in columns.items()}
                    for group, columns in joined.items()
                },
            },
        )

    def _scores(
        self, classes: Float[Tensor, "K D"], loaded: LoadedClip, batch: RegionBatch
    ) -> Iterator[tuple[str, Float[Tensor, "R K"], Bool[Tensor, " _"]]]:
        """By group: scores of its regions for all classes, and which regions these are."""
        device, dtype = placement(loaded.clip)
        there = batch.to(device)
        dense = loaded.clip.image.trace(there.images.to(dtype)).dense(self.dense)  # (B, h, w, D)
        found = {"boxes": pool_boxes(dense, there.boxes, there.owner)}
        if there.masks is not None:
            found["masks"] = pool_masks(dense, there.masks, there.owner)
        if there.crops is not None:
            parts = torch.split(there.crops.to(dtype), self.batch_size)
            found["crops"] = torch.cat([unit(loaded.clip.image.encode(part)) for part in parts])
        thing = batch.is_thing.bool()
        for way, features in found.items():  # (R, D)
            scores = (features @ classes.T).cpu()  # (R, K)
            for group, rows in ((THINGS[way], thing), (STUFF[way], ~thing)):
                yield group, scores[rows], rows

    def _agreeing(
        self, names: Sequence[str], things: Bool[Tensor, " K"]
    ) -> dict[str, Bool[Tensor, "K K"]]:
        """For each of `parts`, the classes that agree in all others.

        Raises:
            ValueError: The name of a thing has another number of words.
        """
        words = [tuple(name.split()) for name in names]
        for name, each, thing in zip(names, words, things.tolist(), strict=True):
            if self.parts and thing and len(each) != len(self.parts):
                raise ValueError(
                    f"parts={list(self.parts)}: the class {name!r} has {len(each)} words; leave "
                    "parts empty for these data"
                )
        found = {}
        for place, part in enumerate(self.parts):
            others = "_".join(name for name in self.parts if name != part)
            rests = [(*each[:place], *each[place + 1 :]) for each in words]
            number = torch.tensor([rests.index(rest) for rest in rests])
            found[f"{part}_given_{others}"] = (number == number[:, None]) & things & things[:, None]
        return found


def fair_numbers(columns: Mapping[str, Int[Tensor, " R"]]) -> dict[str, float]:
    """Class means of one group's regions beside top-1 and top-5; see `RegionEvaluator`."""
    labels, ranks = columns["label"], columns["rank"]
    rest = labels != most_frequent(labels)
    numbers: dict[str, float] = {}
    if rest.any():
        numbers |= {f"rest_top{k}": mean_by_class(ranks[rest] < k, labels[rest]) for k in TOPK}
    numbers["mrr"] = mean_by_class(1 / (ranks + 1.0), labels)
    for name, column in columns.items():
        if name == AMONG_STUFF:
            numbers[f"{name}_top1"] = mean_by_class(column < 1, labels)
        elif name not in ("image", "label", "rank"):
            numbers[name] = mean_by_class(column < 1, labels)
    return numbers


def most_frequent(labels: Int[Tensor, " R"]) -> int:
    """The first of the classes that occur most often."""
    return int(labels.bincount().argmax())


def mean_by_class(values: Shaped[Tensor, " R"], labels: Int[Tensor, " R"]) -> float:
    """Mean over the classes that occur of the mean of their values."""
    return float(class_mean(labels.bincount(values.double()), labels.bincount().double()))
