"""Segmentation without training: every pixel gets the class whose words its patch is nearest to.

The protocol of SCLIP and those after it (ClearCLIP, NACLIP, ProxyCLIP), and that of TIPS. Several
methods, which differ in what the last layer attends to and in how the picture is cut, run over the
same pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate, pad

from gradeclip_ft.data.files import Source
from gradeclip_ft.data.segmentation import (
    Resize,
    SegmentationImages,
    SegmentationSample,
    hash_queries,
)
from gradeclip_ft.evaluators.base import Track, evaluating, placement, untracked
from gradeclip_ft.evaluators.embed import encode_classes
from gradeclip_ft.metrics import SegmentationMatrix, most_confused, require_finite
from gradeclip_ft.models.clip import IMAGENET_TEMPLATES, LoadedClip
from gradeclip_ft.ops.attention import DensePath
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.report.segmentation import Segmented, write_segmented
from gradeclip_ft.results.record import Json, Measured, data_fingerprint, hash_json
from gradeclip_ft.text.prompts import TCL, phrase_prompt

CHUNK = 16  # queries at a time at the full size of a picture: bounds memory, not the result
CONFUSED = 20  # pairs in the details

Geometry: TypeAlias = tuple[Resize, int | None, int | None]


@dataclass(frozen=True)
class Segmenter:
    """What is published of a method beside the weights.

    Attributes:
        dense: What patches attend to in the last layer.
        side: Shorter side of the resized picture in pixels; None for the model's own.
        interpolation: Of that resize.
        window: Side of the square windows that the model sees; None for the whole picture.
        stride: From one window to the next; the last one is shifted back to the edge.
        templates: "imagenet" for OpenAI's 80, "tcl" for TCL's 9, or sentences with `{}`.
        scale: Factor of the cosines before the softmax over all queries.
        average: What overlapping windows average: cosines, or softmax probabilities (TIPS).
        threshold: Pixels whose highest probability is lower become background; 0 for none.
        least_area: Classes that cover no more of what is not background are given up for their
            next best, by picture (SCLIP on VOC21); 0 for none.
    """

    dense: DensePath = "value"
    side: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    window: int | None = None
    stride: int | None = None
    templates: Literal["imagenet", "tcl"] | Sequence[str] = "imagenet"
    scale: float = 40.0
    average: Literal["cosines", "probabilities"] = "cosines"
    threshold: float = 0.0
    least_area: float = 0.0

    def __post_init__(self) -> None:
        """Refuse half a window."""
        if (self.window is None) != (self.stride is None):
            raise ValueError(
                f"window={self.window} and stride={self.stride}: give both, or null for the whole "
                "picture"
            )

    @property
    def sentences(self) -> tuple[str, ...]:
        """The templates themselves."""
        known = {"imagenet": IMAGENET_TEMPLATES, "tcl": TCL}
        return tuple(known[self.templates] if isinstance(self.templates, str) else self.templates)


@dataclass(frozen=True)
class SegmentationEvaluator:
    """Mean intersection over union of each method, from counts over the whole set.

    Beside the numbers there are the classes one by one, the worst confusions, and a page with
    pictures.

    Attributes:
        segmenters: Methods by name.
        pictures: Shown on the page: the first ones.
        batch_size: Pictures per forward pass, or windows where there are some.
    """

    name: str
    data: Source[SegmentationImages]
    segmenters: Mapping[str, Segmenter]
    methods: Sequence[str] | None = None
    pictures: int = 6
    batch_size: int = 16
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuse a method that is not there."""
        unknown = set(self.methods or ()) - set(self.segmenters)
        if unknown or not self.chosen:
            raise ValueError(
                f"methods={list(self.methods or ())}: choose from {', '.join(self.segmenters)}"
            )

    @property
    def chosen(self) -> dict[str, Segmenter]:
        """The methods to measure."""
        names = self.segmenters if self.methods is None else self.methods
        return {name: self.segmenters[name] for name in names}

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        settings: dict[str, Json] = {}
        for name, method in self.chosen.items():
            templates = method.templates if isinstance(method.templates, str) else "own"
            told = {**asdict(method), "templates": templates}
            settings |= {f"{name}.{key}": value for key, value in told.items()}
            settings[f"{name}.templates_hash"] = hash_json(list(method.sentences))
        return {
            "task": "segmentation",
            "metric": "intersections and unions over the whole set, mean over classes",
            "labels": "at the original size, enlarged bilinearly",
            **settings,
            **self.data.protocol,
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model.

        Raises:
            ValueError: A threshold without a background, or a size that the model cannot take.
            UnsupportedTowerError: The tower has no dense features, or the value path alone.
        """
        images, methods = self.data(), self.chosen
        self._require(loaded, images)
        device, _ = placement(loaded.clip)
        owner = torch.tensor([n for n, words in enumerate(images.queries.values()) for _ in words])
        groups: dict[Geometry, dict[str, Segmenter]] = {}
        for name, method in methods.items():
            side = min(loaded.image_size) if method.side is None else method.side
            geometry = Resize(side, method.interpolation), method.window, method.stride
            groups.setdefault(geometry, {})[name] = method
        sizes = list(dict.fromkeys(size for size, _, _ in groups))
        batches = images.batches(
            sizes, loaded.mean, loaded.std, batch_size=self.batch_size, workers=self.workers
        )
        matrices = {name: SegmentationMatrix(len(images.classes), device) for name in methods}
        shown: list[Segmented] = []
        with evaluating(loaded.clip):
            queries = self._queries(loaded, images, track)
            for batch in track(batches, f"{self.name}: images", len(batches)):
                found: list[dict[str, Tensor]] = [{} for _ in batch]
                for geometry, group in groups.items():
                    for row, name, labels in self._labels(
                        loaded, batch, geometry, group, queries, owner.to(device)
                    ):
                        matrices[name].update(batch[row].truth.to(device), labels)
                        found[row][name] = labels
                for sample, labels_of in zip(batch, found, strict=True):
                    if len(shown) < self.pictures:
                        shown.append(_to_show(images, len(shown), sample, labels_of, methods))
        return self._measured(loaded, images, matrices, shown, sizes)

    def _require(self, loaded: LoadedClip, images: SegmentationImages) -> None:
        tower = loaded.clip.image
        if tower.unexplained is not None:
            raise ValueError(f"{self.name} needs dense features, but {tower.unexplained}")
        for name, method in self.chosen.items():
            if (method.threshold or method.least_area) and not images.has_background:
                raise ValueError(
                    f"{name} makes pixels background (threshold={method.threshold}, least_area="
                    f"{method.least_area}), and the first class of {self.name} is "
                    f"{images.classes[0]!r}; set both to 0 for a set without background"
                )
            if method.window is not None and method.window % tower.patch:
                raise ValueError(
                    f"{name}: windows of {method.window} pixels are not a multiple of the model's "
                    f"patch size {tower.patch}; set window and stride to "
                    f"{method.window // tower.patch * tower.patch or tower.patch}, for example"
                )

    def _queries(
        self, loaded: LoadedClip, images: SegmentationImages, track: Track
    ) -> dict[tuple[str, ...], Float[Tensor, "Q D"]]:
        """Unit embeddings of the words of all classes, by the sentences around them."""
        words = [word for words in images.queries.values() for word in words]
        return {
            sentences: encode_classes(loaded, words, sentences, track, self.name, say=phrase_prompt)
            for sentences in dict.fromkeys(method.sentences for method in self.chosen.values())
        }

    def _labels(
        self,
        loaded: LoadedClip,
        batch: Sequence[SegmentationSample],
        geometry: Geometry,
        methods: Mapping[str, Segmenter],
        queries: Mapping[tuple[str, ...], Float[Tensor, "Q D"]],
        owner: Int[Tensor, " Q"],
    ) -> list[tuple[int, str, Int[Tensor, "_ _"]]]:
        """Labels of each picture by each method that cuts pictures in this way."""
        (device, dtype), (size, window, stride) = placement(loaded.clip), geometry
        patch, tower = loaded.patch, loaded.clip.image
        cuts = [Cut.of(sample.pixels[size], window, stride, patch) for sample in batch]
        # Windows of equal size go through the model together, whichever picture they are from.
        by_shape: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for row, cut in enumerate(cuts):
            for number, pixels in enumerate(cut.windows):
                by_shape.setdefault(tuple(pixels.shape), []).append((row, number))
        cosines: dict[tuple[int, int, str], Tensor] = {}
        for places in by_shape.values():
            for start in range(0, len(places), self.batch_size):
                part = places[start : start + self.batch_size]
                pixels = torch.stack([cuts[row].windows[number] for row, number in part])
                trace = tower.trace(pixels.to(device, dtype))
                for name, method in methods.items():
                    dense = unit(trace.dense(method.dense))  # (n, h, w, D)
                    products = dense @ queries[method.sentences].T  # (n, h, w, Q)
                    for place, product in zip(part, products.permute(0, 3, 1, 2), strict=True):
                        cosines[*place, name] = product
        found = []
        for row, (cut, sample) in enumerate(zip(cuts, batch, strict=True)):
            target = sample.truth.shape[0], sample.truth.shape[1]
            for name, method in methods.items():
                maps = [cosines.pop((row, n, name)) for n in range(len(cut.windows))]
                found.append((row, name, segment(maps, cut, target, method, owner)))
        return found

    def _measured(
        self,
        loaded: LoadedClip,
        images: SegmentationImages,
        matrices: Mapping[str, SegmentationMatrix],
        shown: Sequence[Segmented],
        sizes: Sequence[Resize],
    ) -> Measured:
        means = {name: matrix.mean() for name, matrix in matrices.items()}
        by_class: dict[str, Any] = {}
        for name, matrix in matrices.items():
            rows = zip(images.classes, matrix.by_class.T.tolist(), strict=True)
            by_class[name] = {
                key: {"IoU": _digits(overlap), "accuracy": _digits(share), "pixels": int(true)}
                for key, (overlap, share, true) in rows
            }
        confused = {
            name: most_confused(matrix.pixels.cpu(), images.classes, CONFUSED, "pixels")
            for name, matrix in matrices.items()
        }
        sides = [size.side for size in sizes]
        told = {"Model": loaded.name, "Weights": loaded.weights_hash[:16], "Set": self.name}
        facts = {"Measured": {**told, "Images": str(len(images))}}
        return Measured(
            metrics={f"{name}/{key}": v for name, mean in means.items() for key, v in mean.items()},
            protocol={
                **self.protocol,
                "image_size": sides[0] if len(sides) == 1 else sides,
                "classes": len(images.classes),
                "class_list_hash": hash_queries(images.queries),
            },
            data=data_fingerprint(images.files, images.listed, images.counts),
            details={"by_class": by_class, "most_confused": confused},
            page=partial(
                write_segmented, shown, images.classes, means, by_class, confused, facts=facts
            ),
        )


@dataclass(frozen=True)
class Cut:
    """Windows of a picture, row by row, and where they are.

    Attributes:
        windows: Their pixels.
        size: (height, width) of the picture.
        starts: First row of each row of windows, and first column of each column.
        sides: (height, width) of a window without padding.
        before: Padding above and left of it.
        padded: (height, width) of a window with padding.
    """

    windows: Sequence[Float[Tensor, "3 h w"]]
    size: tuple[int, int]
    starts: tuple[list[int], list[int]]
    sides: tuple[int, int]
    before: tuple[int, int]
    padded: tuple[int, int]

    @classmethod
    def of(
        cls, pixels: Float[Tensor, "3 H W"], window: int | None, stride: int | None, patch: int
    ) -> Cut:
        """Squares that overlap, or the whole; one that the patch does not divide is padded.

        The padding is that of ClearCLIP's program: the mean colour on all sides.
        """
        height, width = pixels.shape[1], pixels.shape[2]
        high, wide = (min(side, window or side) for side in (height, width))
        tops, lefts = window_starts(height, high, stride), window_starts(width, wide, stride)
        spare = [-side % patch for side in (high, wide)]
        above, left = spare[0] // 2, spare[1] // 2
        around = (left, spare[1] - left, above, spare[0] - above)
        parts = [pixels[:, y : y + high, x : x + wide] for y in tops for x in lefts]
        return cls(
            windows=[pad(part, around) for part in parts] if any(spare) else parts,
            size=(height, width),
            starts=(tops, lefts),
            sides=(high, wide),
            before=(above, left),
            padded=(high + spare[0], wide + spare[1]),
        )


def window_starts(length: int, window: int, stride: int | None) -> list[int]:
    """Where windows begin, the last one shifted back to end at the edge.

    >>> window_starts(336, 224, 112), window_starts(500, 224, 112), window_starts(64, 64, None)
    ([0, 112], [0, 112, 224, 276], [0])
    """
    if stride is None:
        return [0]
    count = -(-max(length - window, 0) // stride) + 1
    return [min(number * stride, length - window) for number in range(count)]


def bilinear(cells: int, length: int) -> Float[Tensor, "length cells"]:
    """The matrix of linear interpolation along one axis, corners not aligned."""
    line = interpolate(torch.eye(cells)[None], size=length, mode="linear", align_corners=False)
    return line[0].T


def along(
    starts: Sequence[int],
    *,
    side: int,
    before: int,
    padded: int,
    cells: int,
    length: int,
    target: int,
) -> Float[Tensor, "target N"]:
    """From the cells of all windows along one axis to the pixels of the original picture.

    Enlarging a window to its pixels, averaging windows and enlarging the average are all linear,
    and apply to rows and columns apart. So one matrix for each axis does what the published
    programs do with a canvas of all classes at the resized and again at the original size.
    """
    enlarge = bilinear(cells, padded)[before : before + side]
    canvas = torch.zeros(length, len(starts) * cells)
    for number, start in enumerate(starts):
        canvas[start : start + side, number * cells : (number + 1) * cells] += enlarge
    seen = torch.zeros(length)
    for start in starts:
        seen[start : start + side] += 1
    return bilinear(length, target) @ (canvas / seen[:, None])


def segment(
    maps: Sequence[Float[Tensor, "Q h w"]],
    cut: Cut,
    target: tuple[int, int],
    method: Segmenter,
    owner: Int[Tensor, " Q"],
) -> Int[Tensor, "H W"]:
    """Labels of a picture at its original size.

    Args:
        maps: Cosines of patches and queries, for each window in the order of the cut.
        cut: How the picture was cut.
        target: Original (height, width).
        method: Scale, threshold and the like.
        owner: Class of each query; queries of a class are neighbours, classes in order.
    """
    cells = (maps[0].shape[1], maps[0].shape[2])
    before, padded = cut.before, cut.padded
    if method.average == "probabilities":
        # A softmax is not linear: it wants the pixels of a window, and these are then the cells.
        top, left = before
        maps = [
            (method.scale * interpolate(one[None], padded, mode="bilinear")[0]).softmax(0)[
                :, top : top + cut.sides[0], left : left + cut.sides[1]
            ]
            for one in maps
        ]
        cells, before, padded = cut.sides, (0, 0), cut.sides
    down, across = (
        along(
            cut.starts[axis],
            side=cut.sides[axis],
            before=before[axis],
            padded=padded[axis],
            cells=cells[axis],
            length=cut.size[axis],
            target=target[axis],
        ).to(maps[0])
        for axis in (0, 1)
    )
    columns = len(cut.starts[1])
    bands = [torch.cat(list(maps[n : n + columns]), 2) for n in range(0, len(maps), columns)]
    joined = torch.cat(bands, 1)  # (Q, N, M): the cells of all windows side by side
    require_finite(joined.flatten(1))

    def best_of(allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Best value and query of each pixel among the allowed, and Σ exp over all queries."""
        best = joined.new_full(target, -torch.inf)
        which = torch.zeros(target, dtype=torch.long, device=joined.device)
        total = joined.new_zeros(target)
        for start in range(0, len(joined), CHUNK):
            part = down @ joined[start : start + CHUNK] @ across.T  # (q, H, W)
            if method.threshold:  # cosines are at most 1, so nothing overflows
                total += (method.scale * (part - 1)).exp().sum(0)
            part = part.masked_fill(~allowed[start : start + CHUNK, None, None], -torch.inf)
            value, place = part.max(0)
            higher = value > best  # of equal ones the first
            best, which = torch.where(higher, value, best), which.where(~higher, place + start)
        return best, which, total

    # The softmax rises with its argument, so the best class is that of the best query.
    best, which, total = best_of(torch.ones_like(owner, dtype=torch.bool))
    labels = owner[which]
    if method.least_area:
        areas = labels.flatten().bincount(minlength=int(owner.max()) + 1)
        areas[0] = 0
        kept = areas > method.least_area * areas.sum()
        kept[0] = True
        best, which, total = best_of(kept[owner])
        labels = owner[which]
    if method.threshold:
        certain = method.average == "probabilities"
        probability = best if certain else (method.scale * (best - 1)).exp() / total
        labels = labels.masked_fill(probability < method.threshold, 0)
    return labels


def _to_show(
    images: SegmentationImages,
    number: int,
    sample: SegmentationSample,
    labels: Mapping[str, Tensor],
    methods: Mapping[str, Segmenter],
) -> Segmented:
    return Segmented(
        name=images.names[number],
        photo=np.asarray(sample.photo),
        truth=sample.truth.numpy(),
        labels={name: labels[name].cpu().numpy().astype(np.uint8) for name in methods},
    )


def _digits(value: float) -> float | None:
    """Four digits; None for a class without a value, since JSON has no NaN."""
    return None if value != value else round(value, 4)
