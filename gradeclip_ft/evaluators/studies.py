"""What a model understands: attributes of objects, and whether maps of words add up.

Attributes are the journal's Table IX, addibility its Table VIII.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import stats
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gradeclip_ft.data.files import Source, require_images
from gradeclip_ft.data.objects import ATTRIBUTES, ObjectImages
from gradeclip_ft.evaluators.base import Track, evaluating, untracked
from gradeclip_ft.evaluators.maps import PIXELS, chosen, require_float32, settings
from gradeclip_ft.evaluators.regions import square_side
from gradeclip_ft.explain.base import Explainer, shared_pass
from gradeclip_ft.explain.driver import Supported, explain_pictures, heat_maps, see
from gradeclip_ft.metrics import is_constant
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.heatmap import to_pixels
from gradeclip_ft.results.record import Json, Measured, data_fingerprint
from gradeclip_ft.text.prompts import phrase_prompt

EPS = 1e-8
COMBINE = {"sum": np.add, "product": np.multiply, "maximum": np.maximum}


@dataclass(frozen=True)
class AttributesEvaluator:
    """Does the map of an attribute word cover the objects that have the attribute?

    Every word of a picture (red, circle, large, left) is a phrase, and its objects together are the
    mask. `METHOD/ATTRIBUTE_MEASURE` is a mean over pictures and words: cosine and Pearson's
    correlation of map and mask; `otd`, the 1-Wasserstein distance on a grid of cells, in sides of
    the picture; Kullback-Leibler and Jensen-Shannon divergence in nats. The maps are positive
    parts. The journal does not define its measures.

    Attributes:
        prompt: Sentence with `{}` for the word.
        cells: Side of the grid of `otd`.
    """

    name: str
    data: Source[ObjectImages]
    explainers: Mapping[str, Explainer]
    methods: Sequence[str] | None = None
    image_size: int | None = None
    prompt: str = "{}"
    cells: int = 14
    batch_size: int = 8
    workers: int = 0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "attributes of objects",
            **({"image_size": self.image_size} if self.image_size else {}),
            "prompt": self.prompt,
            "map": "positive part, enlarged bilinearly to the padded square",
            "cells": self.cells,
            "eps": EPS,
            "methods": settings(chosen(self.explainers, self.methods)),
            **self.data.protocol,
        }

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        require_float32(loaded.clip, self.name)
        side = square_side(loaded, self.image_size, self.name)
        data = self.data(image_size=side, patch=PIXELS, mean=loaded.mean, std=loaded.std)
        words = sorted({word for some in data.attributes for one in some for word in one.values()})
        said = loaded.encode_texts([phrase_prompt(self.prompt, word) for word in words])
        embedding = dict(zip(words, said, strict=True))
        batches = data.pictures.batches(self.batch_size, self.workers)
        found: dict[str, list[float]] = defaultdict(list)
        counts: dict[str, int] = defaultdict(int)
        device, start = loaded.clip.device, 0
        with evaluating(loaded.clip):
            supported = Supported(chosen(self.explainers, self.methods), loaded)
            for batch in track(batches, f"{self.name}: images", len(batches)):
                some = data.attributes[start : start + len(batch.images)]
                start += len(batch.images)
                phrases = [
                    (row, attribute, word)
                    for row, objects in enumerate(some)
                    for attribute in ATTRIBUTES
                    for word in sorted({one[attribute] for one in objects if attribute in one})
                ]
                assert batch.masks is not None
                assert batch.ignored is not None
                # Padding is below and to the right, so what counts of a square is a rectangle.
                high, wide = ((~batch.ignored).any(axis).sum(1).tolist() for axis in (2, 1))
                masks = torch.stack([_mask(batch.masks, batch.owner, some, *p) for p in phrases])
                target = torch.stack([embedding[word] for *_, word in phrases]).to(device)
                owner = torch.tensor([row for row, *_ in phrases], device=device)
                with shared_pass(loaded.clip, loaded.clip.image, batch.images.to(device)) as shared:
                    maps = heat_maps(supported, shared, target, owner)
                for name, grid in maps.items():
                    heat = to_pixels(grid.float().clamp(min=0), (side, side)).cpu()
                    for (row, attribute, _), square, where in zip(
                        phrases, heat, masks, strict=True
                    ):
                        one, mask = (each[: high[row], : wide[row]] for each in (square, where))
                        if not mask.any():
                            counts["phrases without a pixel"] += 1
                            continue
                        counts[f"maps of zeros, {name}"] += int(not one.any())
                        for measure, value in distances(one, mask, self.cells).items():
                            found[f"{name}/{attribute}_{measure}"].append(value)
        return Measured(
            metrics={key: float(np.mean(values)) for key, values in found.items()},
            protocol={**self.protocol, "image_size": side},
            data=data_fingerprint(data.pictures.files, data.pictures.listed, data.pictures.counts),
            details={
                "words": words,
                "counted": {key: count for key, count in counts.items() if count},
                "standard_error": {
                    key: round(float(np.std(values, ddof=1)) / len(values) ** 0.5, 5)
                    for key, values in found.items()
                    if len(values) > 1
                },
                "left_out": {**supported.left_out},
            },
        )


def _mask(
    masks: Tensor,
    owner: Tensor,
    attributes: Sequence[Sequence[Mapping[str, str]]],
    row: int,
    attribute: str,
    word: str,
) -> Bool[Tensor, "H W"]:
    """Union of the objects of a picture that have an attribute."""
    own = masks[owner == row]
    has = torch.tensor([one.get(attribute) == word for one in attributes[row]])
    return (own[has] > 0).any(0)


def distances(
    heat: Float[Tensor, "H W"], mask: Bool[Tensor, "H W"], cells: int
) -> dict[str, float]:
    """Cosine, correlation, otd, kld and jsd of a map and a mask; a map of zeros is uniform."""
    if not heat.any():
        heat = torch.ones_like(heat)
    m, g = heat.double().flatten().numpy(), mask.double().flatten().numpy()
    varies = not bool(is_constant(heat[None])) and not bool(mask.all())
    p, q = m / m.sum(), g / g.sum()
    middle = (p + q) / 2
    return {
        "cosine": float(m @ g / np.linalg.norm(m) / np.linalg.norm(g)),
        "correlation": float(np.corrcoef(m, g)[0, 1]) if varies else 0.0,
        "otd": transport(heat, mask.float(), cells),
        "kld": _relative_entropy(q, p + EPS),
        "jsd": (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2,
    }


def _relative_entropy(p: Float[ndarray, " n"], q: Float[ndarray, " n"]) -> float:
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


def transport(heat: Float[Tensor, "H W"], other: Float[Tensor, "H W"], cells: int) -> float:
    """1-Wasserstein distance of two maps on a grid over the unit square, by linear programming."""
    grids = [adaptive_avg_pool2d(each[None].double(), cells)[0].flatten() for each in (heat, other)]
    steps = (np.arange(cells) + 0.5) / cells
    points = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
    some = [(grid > 0).numpy() for grid in grids]
    weights = [grid.numpy()[where] for grid, where in zip(grids, some, strict=True)]
    return float(stats.wasserstein_distance_nd(points[some[0]], points[some[1]], *weights))


@dataclass(frozen=True)
class AddibilityEvaluator:
    """Is the map of a phrase the sum of the maps of its words?

    A row of the list names a picture, a base word, a matched and a mismatched word ("dog", "black",
    "red"). The maps of word and base are combined by sum, product or maximum and compared with that
    of the phrase by the cosine. `METHOD, COMBINATION/matched_KIND` are means over rows.

    Attributes:
        concepts: CSV with the columns file, base, matched, mismatched and kind.
        images: Folder of the pictures.
        prompt: Sentence with `{}` for words and phrases.
    """

    name: str
    concepts: str
    images: str
    explainers: Mapping[str, Explainer]
    methods: Sequence[str] | None = None
    prompt: str = "{}"

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        return {
            "task": "addibility of concepts",
            "prompt": self.prompt,
            "map": "positive part, scaled to a maximum of 1, on the grid of the patches",
            "methods": settings(chosen(self.explainers, self.methods)),
        }

    def prepare(self) -> None:
        """Check list and pictures."""
        self._rows()

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""
        require_float32(loaded.clip, self.name)
        rows = self._rows()
        found: dict[str, list[float]] = defaultdict(list)
        scores: dict[str, list[float]] = defaultdict(list)
        zeros: dict[str, int] = defaultdict(int)
        with evaluating(loaded.clip):
            supported = Supported(chosen(self.explainers, self.methods), loaded)
            for row in track(rows, f"{self.name}: pictures", len(rows)):
                base, fits = row["base"], (row["matched"], row["mismatched"])
                texts = [base, *fits, *(f"{word} {base}" for word in fits)]
                said = loaded.encode_texts([phrase_prompt(self.prompt, text) for text in texts])
                seen = see(loaded, Path(self.images) / row["file"])
                (one,) = explain_pictures(loaded, [seen], [said], supported)
                cosine = one.score.tolist()
                for place, which in enumerate(("matched", "mismatched"), start=1):
                    key = f"{which}_{row['kind']}"
                    scores[f"word / base, {key}"].append(cosine[place] / cosine[0])
                    scores[f"phrase / base, {key}"].append(cosine[place + 2] / cosine[0])
                    for name, heat in one.heat.items():
                        maps = [_unit_maximum(heat[n]) for n in (0, place, place + 2)]
                        zeros[name] += sum(not each.any() for each in maps)
                        for how, combine in COMBINE.items():
                            mixed = combine(maps[0], maps[1])
                            norm = np.linalg.norm(mixed) * np.linalg.norm(maps[2])
                            value = float((mixed * maps[2]).sum() / norm) if norm else 0.0
                            found[f"{name}, {how}/{key}"].append(value)
        return Measured(
            metrics={key: float(np.mean(values)) for key, values in found.items()},
            protocol={**self.protocol, "image_size": list(loaded.image_size)},
            data=data_fingerprint(
                [Path(self.concepts)],
                [Path(self.images) / name for name in sorted({row["file"] for row in rows})],
                {"images": len({row["file"] for row in rows}), "rows": len(rows)},
            ),
            details={
                "maps_of_zeros": {name: count for name, count in zeros.items() if count},
                "relative_scores": {key: round(float(np.mean(v)), 4) for key, v in scores.items()},
                "p_of_paired_t_test": _pairs(found),
                "left_out": {**supported.left_out},
            },
        )

    def _rows(self) -> list[dict[str, str]]:
        path = Path(self.concepts)
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.name}: no list {path}; write a CSV with the columns file, base, matched, "
                "mismatched, kind (docs/evaluation.md)"
            )
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = ("file", "base", "matched", "mismatched", "kind")
        for number, row in enumerate(rows, start=2):
            if empty := [name for name in columns if not (row.get(name) or "").strip()]:
                raise ValueError(f"{path}, line {number}: no {', '.join(empty)}; fill the row")
        if not rows:
            raise ValueError(f"{path} has no row")
        require_images(Path(self.images), list(enumerate(row["file"] for row in rows)))
        return rows


def _unit_maximum(heat: Float[Tensor, "h w"]) -> Float[ndarray, "h w"]:
    """Positive part over its maximum; zeros stay zeros."""
    positive = heat.clamp(min=0).double()
    scaled: Float[ndarray, "h w"] = (positive / positive.max().clamp(min=1e-12)).numpy()
    return scaled


def _pairs(found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Paired t-tests over rows between the combinations of one method and kind."""
    told = {}
    for one, other in combinations(sorted(found), 2):
        (first, _, kind), (second, _, same) = one.rpartition("/"), other.rpartition("/")
        if kind == same and first.rpartition(", ")[0] == second.rpartition(", ")[0]:
            p = float(stats.ttest_rel(found[one], found[other]).pvalue)
            told[f"{first} - {second.rpartition(', ')[2]}/{kind}"] = p if np.isfinite(p) else 1.0
    return told
