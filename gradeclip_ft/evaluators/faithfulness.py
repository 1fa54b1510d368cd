"""Faithfulness of maps of images: what happens to the match when the hottest pixels change?

Deletion, insertion and IMD (Grad-ECLIP, Tables 1 and 2; Petsiuk et al., "RISE"). Deletion replaces
the hottest pixels of the photo by noise, insertion starts from black and copies them. The score is
zero-shot accuracy, recall of retrieval, or the cosine of the pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from torchvision.transforms.v2 import functional as F  # noqa: N812

from gradeclip_ft.data.files import ImageSet, Source
from gradeclip_ft.data.loading import evaluation_loader
from gradeclip_ft.evaluators.base import Track, evaluating, placement, untracked
from gradeclip_ft.evaluators.curves import DELETION, INSERTION, Finished, Rule, summarise
from gradeclip_ft.evaluators.embed import encode_classes, encode_pairs
from gradeclip_ft.evaluators.maps import chosen, require_float32, settings
from gradeclip_ft.evaluators.zero_shot import names_of, templates_of, texts_protocol
from gradeclip_ft.explain.base import Explainer
from gradeclip_ft.explain.driver import Supported, explain_pictures, see
from gradeclip_ft.explain.page import case_of
from gradeclip_ft.metrics import first_hits, is_constant, label_ranks, require_finite
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.report.content import Case
from gradeclip_ft.results.record import Json, Measured, data_fingerprint, hash_json
from gradeclip_ft.text.prompts import phrase_prompt

Score = Literal["classification", "retrieval", "cosine"]
TOPK = (1, 5)
PHOTOS = 16  # explained in one pass
TEXTS = 256  # encoded at a time


@dataclass(frozen=True)
class FaithfulnessEvaluator:
    """Areas of deletion and insertion curves of several methods, and their difference IMD.

    `classification` explains the true and the predicted class and scores zero-shot top-1 and top-5
    of the true one (Table 1). `retrieval` explains image and caption and scores recall@1 and @5
    from text to image and back, where the changed image replaces its original alone (Table 2).
    `cosine` is the similarity of image and caption itself (the journal's Figure 1).

    Attributes:
        score: What a curve shows.
        captions: Whether the first caption of an image is explained, or all of them.
        class_names: For classification, as in `ZeroShotEvaluator`.
        templates: For classification, as in `ZeroShotEvaluator`.
        points: Of a curve, at equal distances.
        share: Of the pixels that have changed at the last point.
        include_zero: Whether the untouched image is the first point of deletion.
        rule: Of the area.
        geometry: What the methods see: the model's own crop, or the whole picture (`aspect`).
        shortest: Larger photos are shrunk to this shorter side in pixels, before all else.
        seed: Of the noise.
        progress: Folder for what an interrupted evaluation needs to go on; None for none.
        batch_size: Changed images per forward pass.
    """

    name: str
    data: Source[ImageSet]
    explainers: Mapping[str, Explainer]
    score: Score
    methods: Sequence[str] | None = None
    captions: Literal["first", "all"] = "first"
    class_names: Literal["imagenet", "data"] | Sequence[str] = "imagenet"
    templates: Literal["imagenet", "data"] | Sequence[str] = "imagenet"
    points: int = 10
    share: float = 0.5
    include_zero: bool = True
    rule: Rule = "mean"
    geometry: Literal["model", "aspect"] = "model"
    shortest: int = 640
    seed: int = 0
    progress: str | None = None
    batch_size: int = 64
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        own: dict[str, Json] = {"captions_explained": self.captions}
        if self.score == "classification":
            own = texts_protocol(self.class_names, self.templates)
        return {
            "task": f"faithfulness of image maps, {self.score}",
            **own,
            "deletion": f"uniform noise, seed {self.seed}",
            "insertion": "into black",
            "points": self.points,
            "share": self.share,
            "include_zero": self.include_zero,
            "area": self.rule,
            "map": f"geometry {self.geometry}, enlarged bilinearly to the photo",
            "shortest": self.shortest,
            "methods": settings(chosen(self.explainers, self.methods)),
            **self.data.protocol,
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        require_float32(loaded.clip, self.name)
        if self.points < 1 or not 0 < self.share <= 1:
            raise ValueError(
                f"{self.name}: points={self.points} and share={self.share}; give at least 1 point "
                "and a share of the pixels above 0 and at most 1"
            )
        images = self.data()
        height, width = loaded.image_size
        size: Json = height if height == width else [height, width]
        protocol: dict[str, Json] = {**self.protocol, "image_size": size}
        data = data_fingerprint(images.files, images.listed, images.counts)
        with evaluating(loaded.clip):
            judge, told = self._judge(loaded, images, track)
            protocol |= told  # also what class names and templates of one's own are
            done = Finished(self.progress, [loaded.weights_hash, protocol, data["hash"]])
            supported = Supported(chosen(self.explainers, self.methods), loaded)
            left = [number for number in range(len(images)) if number not in done.values]
            photos = evaluation_loader(
                Subset(images, left),
                partial(_photos, self.shortest),
                batch_size=PHOTOS,
                workers=self.workers,
            )
            waiting = iter(left)
            for some in track(photos, f"{self.name}: images", len(photos)):
                numbers = list(islice(waiting, len(some)))
                for number, record in zip(
                    numbers, self._measure(loaded, supported, judge, numbers, some), strict=True
                ):
                    done.add(number, record)
        records = [done.values[number] for number in range(len(images))]
        curves = {name: self._columns(judge, records, name) for name in records[-1]["curves"]}
        constant = sum((Counter(record["constant"]) for record in records), Counter[str]())
        metrics, details = summarise(curves, self.rule)
        done.close()
        return Measured(
            metrics=metrics,
            protocol=protocol,
            data=data,
            details={
                "constant_maps": dict(constant),
                "fractions": [round(self.share * k / self.points, 4) for k in self._steps],
                "left_out": {**supported.left_out},
                "images": list(images.names),
                **details,
            },
        )

    @property
    def _steps(self) -> range:
        return range(0 if self.include_zero else 1, self.points + 1)

    def cases(self, loaded: LoadedClip, details: Mapping[str, Any], each: int = 3) -> list[Case]:
        """Photos of the worst and the best IMD of the first method, with the maps of all.

        Args:
            loaded: The model.
            details: Of its result.
            each: Photos at either end.
        """
        metric = next(name for name in details["areas"] if "/imd" in name)
        order = np.argsort([int(value) for value in details["areas"][metric].split()])
        images, found = self.data(), []
        with evaluating(loaded.clip):
            judge, _ = self._judge(loaded, images, untracked)
            supported = Supported(chosen(self.explainers, self.methods), loaded)
            for place, number in enumerate(dict.fromkeys([*order[:each], *order[-each:]])):
                row = judge.answers(int(number))[:1]
                (photo,) = _photos(self.shortest, [images[int(number)]])
                seen = see(loaded, photo, self.geometry, self.shortest)
                (one,) = explain_pictures(loaded, [seen], [judge.target(row)], supported)
                if self.score == "classification":
                    said = names_of(images, self.class_names, self.name)[row[0]]
                else:
                    said = images.captions[int(number)][0]
                end = "worst" if place < each else "best"
                found.append(
                    case_of(loaded, one, [said], source=f"{end} {metric}: {images.names[number]}")
                )
        return found

    def _judge(
        self, loaded: LoadedClip, images: ImageSet, track: Track
    ) -> tuple[_Judge, dict[str, Json]]:
        """What scores an image, and what the protocol says about it."""
        if self.score == "classification":
            if not images.classes:
                raise ValueError(f"{self.name}: the data have no classes; set score=retrieval")
            names = names_of(images, self.class_names, self.name)
            templates = templates_of(images, self.templates, self.name)
            classes = encode_classes(loaded, names, templates, track, self.name, say=phrase_prompt)
            batches = images.labelled(
                loaded.transform(), batch_size=self.batch_size, workers=self.workers
            )
            device, _ = placement(loaded.clip)
            predicted: list[int] = []
            for batch in track(batches, f"{self.name}: predictions", len(batches)):
                found = unit(loaded.clip.image.encode(batch.images.to(device)))
                predicted += (found @ classes.T).argmax(1).tolist()
            told: dict[str, Json] = {
                "class_list_hash": hash_json(names),
                "templates_hash": hash_json(list(templates)),
            }
            return _Classes(classes, images.labels, predicted), told
        if not images.captions:
            raise ValueError(f"{self.name}: the data have no captions; set score=classification")
        pixels, texts, owner = encode_pairs(
            loaded, images, self.batch_size, TEXTS, self.workers, track, self.name
        )
        judge = _Gallery if self.score == "retrieval" else _Cosine
        length: dict[str, Json] = {"context_length": loaded.tokenizer.context_length}
        return judge(pixels, texts, owner, first=self.captions == "first"), length

    def _measure(
        self,
        loaded: LoadedClip,
        supported: Supported,
        judge: _Judge,
        numbers: Sequence[int],
        photos: Sequence[Image.Image],
    ) -> Iterator[dict[str, Any]]:
        """The record of each photo: scores untouched and along the curves of every method.

        All methods explain from one pass; changed photos of all methods share forward passes.
        """
        answers = [judge.answers(number) for number in numbers]
        explained = explain_pictures(
            loaded,
            [see(loaded, photo, self.geometry, self.shortest) for photo in photos],
            [judge.target(rows) for rows in answers],
            supported,
        )
        device, _ = placement(loaded.clip)
        transform = loaded.transform()
        methods = list(supported.methods)

        def changed() -> Iterator[Tensor]:
            for number, photo, one in zip(numbers, photos, explained, strict=True):
                planes = F.pil_to_tensor(photo).to(device)
                random = torch.Generator().manual_seed((self.seed << 32) + number)
                noise = torch.randint(0, 256, planes.shape, generator=random, dtype=torch.uint8)
                counts = [
                    int(planes[0].numel() * self.share * k / self.points)
                    for k in range(1, self.points + 1)
                ]
                yield transform.of_bytes(planes.unsqueeze(0))
                for name in methods:
                    for heat in one.seen.placement.on_photo(one.heat[name].to(device)):
                        yield transform.of_bytes(perturb(planes, noise.to(device), heat, counts))

        embeddings = encoded(loaded, changed(), self.batch_size)
        for number, rows, one in zip(numbers, answers, explained, strict=True):
            start = next(embeddings)
            record: dict[str, Any] = {
                "start": [_plain(judge.score(start, number, row)) for row in rows],
                "curves": {},
                "constant": {},
            }
            for name in methods:
                found = list(islice(embeddings, len(rows)))
                record["curves"][name] = [
                    _plain(judge.score(each, number, row))
                    for row, each in zip(rows, found, strict=True)
                ]
                record["constant"][name] = int(is_constant(one.heat[name]).sum())
            yield record

    def _columns(
        self, judge: _Judge, records: Sequence[Mapping[str, Any]], method: str
    ) -> dict[str, np.ndarray]:
        """Values of a method by column, (B, S): the mean over the answers of an image."""
        columns: dict[str, np.ndarray] = {}
        for group, way in ((g, w) for g in judge.groups for w in range(len(judge.ways))):
            name = "".join(f"_{part}" for part in (group, judge.ways[way]) if part)
            rows = [judge.rows(group, number) for number in range(len(records))]
            pairs = list(zip(records, rows, strict=True))
            start = [np.array(r["start"])[own, way] for r, own in pairs]  # (answers, 1) each
            both = [np.array(r["curves"][method])[own, way] for r, own in pairs]  # (answers, 2S)
            for k in TOPK if judge.ranked else (None,):
                scored = [[v if k is None else v < k for v in vs] for vs in (start, both)]
                first, values = (np.stack([v.mean(0) for v in vs]) for vs in scored)
                deleted, inserted = np.split(values, 2, axis=1)
                if self.include_zero:
                    deleted = np.concatenate([first, deleted], 1)
                end = "" if k is None else f"@{k}"
                columns[f"{DELETION}{name}{end}"] = deleted
                columns[f"{INSERTION}{name}{end}"] = inserted
        return columns


def perturb(
    photo: UInt8[Tensor, "3 H W"],
    noise: UInt8[Tensor, "3 H W"],
    heat: Float[Tensor, "H W"],
    counts: Sequence[int],
) -> UInt8[Tensor, "S 3 H W"]:
    """The photo after deletion of the hottest pixels, then after their insertion into black.

    Args:
        photo: Original pixels.
        noise: What replaces deleted pixels.
        heat: At the size of the photo; NaN, where no method sees the photo, comes last.
        counts: Changed pixels at each of the S / 2 points.
    """
    order = heat.nan_to_num(-torch.inf).flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=heat.device))
    limits = torch.tensor(counts, device=heat.device).view(-1, 1, 1, 1)
    hot = rank.view(1, 1, *heat.shape) < limits
    return torch.cat([torch.where(hot, noise, photo), photo * hot])


def encoded(
    loaded: LoadedClip, stacks: Iterable[Tensor], batch_size: int
) -> Iterator[Float[Tensor, "_ D"]]:
    """Unit embeddings of each stack of pixels, several stacks in one forward pass."""
    waiting: list[Tensor] = []

    def run() -> Iterator[Tensor]:
        if waiting:
            parts = torch.split(torch.cat(waiting), batch_size)
            found = torch.cat([unit(loaded.clip.image.encode(part)) for part in parts])
            require_finite(found)
            yield from torch.split(found, [len(stack) for stack in waiting])
            waiting.clear()

    for stack in stacks:
        if sum(map(len, waiting)) + len(stack) > batch_size:
            yield from run()
        waiting.append(stack)
    yield from run()


class _Judge(Protocol):
    """What is explained in an image, and how an image scores.

    `groups` are columns of answers, `ways` columns of scores; `ranked` scores are numbers of wrong
    items that come first.
    """

    groups: tuple[str, ...]
    ways: tuple[str, ...]
    ranked: bool

    def answers(self, image: int) -> list[int]:
        """Classes or captions to explain."""

    def rows(self, group: str, image: int) -> list[int]:
        """Those of a group, as places in `answers`."""

    def target(self, answers: Sequence[int]) -> Float[Tensor, "P D"]:
        """Their embeddings."""

    def score(
        self, found: Float[Tensor, "S D"], image: int, answer: int
    ) -> Float[Tensor, "W S"] | Int[Tensor, "W S"]:
        """Scores of some embeddings in the place of an image's own, one row for each way."""


class _Classes:
    groups: tuple[str, ...] = ("true", "predicted")
    ways: tuple[str, ...] = ("",)
    ranked = True

    def __init__(self, classes: Tensor, labels: Sequence[int], predicted: Sequence[int]) -> None:
        self.classes, self.labels, self.predicted = classes, labels, predicted

    def answers(self, image: int) -> list[int]:
        return list(dict.fromkeys([self.labels[image], self.predicted[image]]))

    def rows(self, group: str, image: int) -> list[int]:
        # The true class is the first; where it is also predicted, it is the only one.
        return [0 if group == "true" else len(self.answers(image)) - 1]

    def target(self, answers: Sequence[int]) -> Tensor:
        return self.classes[list(answers)]

    def score(self, found: Tensor, image: int, answer: int) -> Tensor:
        labels = torch.full((len(found),), self.labels[image], device=found.device)
        return label_ranks(found @ self.classes.T, labels).unsqueeze(0)


class _Gallery:
    groups: tuple[str, ...] = ("",)
    ways: tuple[str, ...] = ("image", "text")
    ranked = True

    def __init__(self, images: Tensor, texts: Tensor, owner: Tensor, *, first: bool) -> None:
        self.images, self.texts, self.owner = images, texts, owner
        self._first = first
        self._place = torch.arange(len(images), device=images.device)

    def answers(self, image: int) -> list[int]:
        own: list[int] = (self.owner == image).nonzero().flatten().tolist()
        return own[:1] if self._first else own

    def rows(self, group: str, image: int) -> list[int]:
        return list(range(len(self.answers(image))))

    def target(self, answers: Sequence[int]) -> Tensor:
        return self.texts[list(answers)]

    def score(self, found: Tensor, image: int, answer: int) -> Tensor:
        own = (found @ self.texts[answer]).unsqueeze(1)  # (S, 1)
        others = self.images @ self.texts[answer]  # (N,), of equal scores the first wins
        before = (others > own) | ((others == own) & (self._place < image))
        before[:, image] = False
        right = (self.owner == image).expand(len(found), -1)
        ranks, _ = first_hits(found @ self.texts.T, right)
        return torch.stack([before.sum(1), ranks])


class _Cosine(_Gallery):
    ways, ranked = ("",), False

    def score(self, found: Tensor, image: int, answer: int) -> Tensor:
        return (found @ self.texts[answer]).unsqueeze(0)


def _photos(shortest: int, samples: Sequence[tuple[Image.Image, Any]]) -> list[Image.Image]:
    """Photos whose shorter side has at most so many pixels."""
    found = []
    for photo, _ in samples:
        scale = min(1.0, shortest / min(photo.size))
        width, height = (max(1, round(side * scale)) for side in photo.size)
        found.append(photo if scale == 1.0 else photo.resize((width, height)))
    return found


def _plain(values: Tensor) -> list[list[float | int]]:
    """Numbers for the file of progress; of cosines five digits."""
    if values.is_floating_point():
        return [[round(value, 5) for value in row] for row in values.tolist()]
    return [list(row) for row in values.tolist()]
