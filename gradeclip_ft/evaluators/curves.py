"""Deletion and insertion curves: their areas, what a result keeps of them, and resuming.

An area is the mean of a curve over its points, that is, the fraction axis scaled to length 1: some
of Grad-ECLIP's printed areas exceed the integral over 0 to 0.5. IMD is insertion minus deletion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from gradeclip_ft.results.record import AREA_SCALE, Json, as_text, hash_json, write_atomically

Rule = Literal["mean", "trapezoid"]
Curves = Mapping[str, Mapping[str, Float[ndarray, "B S"]]]
"""By method and column (deletion_true@1), the score of every image at every point of the curve."""

DELETION, INSERTION, IMD = "deletion", "insertion", "imd"


def area(values: Float[ndarray, "B S"], rule: Rule) -> Float[ndarray, " B"]:
    """Mean height of curves with equally spaced points.

    >>> curve = np.array([[1.0, 0.0, 0.5]])
    >>> area(curve, "mean"), area(curve, "trapezoid")
    (array([0.5]), array([0.375]))
    """
    if rule == "trapezoid" and values.shape[1] > 1:
        values = (values[:, 1:] + values[:, :-1]) / 2
    found: Float[ndarray, " B"] = values.mean(1)
    return found


def summarise(curves: Curves, rule: Rule) -> tuple[dict[str, float], dict[str, Json]]:
    """Areas and IMD by `method/column`, and the details that tests and pictures need.

    `curves` has the mean and the standard error of every point, `areas` the area of every image
    times 10,000.
    """
    areas: dict[str, Float[ndarray, " B"]] = {}
    points: dict[str, Json] = {}
    for method, columns in curves.items():
        told: dict[str, Json] = {}
        for column, values in columns.items():
            error = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
            told[column] = {
                "mean": [round(float(v), 5) for v in values.mean(0)],
                "error": [round(float(v), 5) for v in error / len(values) ** 0.5],
            }
            areas[f"{method}/{column}"] = area(values, rule)
        points[method] = told
        for column in columns:
            if column.startswith(INSERTION):
                rest = column.removeprefix(INSERTION)
                inserted, deleted = (
                    areas[f"{method}/{kind}{rest}"] for kind in (INSERTION, DELETION)
                )
                areas[f"{method}/{IMD}{rest}"] = inserted - deleted
    kept: dict[str, Json] = {
        metric: as_text(np.rint(AREA_SCALE * values).astype(int))
        for metric, values in areas.items()
    }
    metrics = {metric: float(values.mean()) for metric, values in areas.items()}
    return metrics, {"curves": points, "areas": kept}


class Finished:
    """What an evaluation knows of finished images, in a file by which it goes on after a stop.

    The name of the file is a hash of weights, protocol and data, so no other evaluation reads it.

    Attributes:
        values: By number of the image.
    """

    def __init__(self, folder: str | None, identity: Sequence[Json]) -> None:
        self.values: dict[int, Any] = {}
        self._path = None if folder is None else Path(folder) / f"{hash_json(list(identity))}.jsonl"
        if self._path is None:
            return
        lines = self._path.read_text("utf-8").splitlines() if self._path.is_file() else []
        for line in lines:
            try:
                number, value = json.loads(line)
            except ValueError:  # cut off when it stopped
                break
            self.values[number] = value
        whole = [json.dumps(pair) + "\n" for pair in self.values.items()]
        write_atomically(self._path, "".join(whole))

    def add(self, number: int, value: Any) -> None:
        """Keep the values of an image: lists and mappings of numbers."""
        self.values[number] = value
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([number, value]) + "\n")

    def close(self) -> None:
        """Delete the file, once the result is complete."""
        if self._path is not None:
            self._path.unlink()
