"""Answers class by class: the table and the most frequent mistakes beside an accuracy."""

from __future__ import annotations

from collections.abc import Sequence

from gradeclip_ft.metrics.accuracy import ClassMeanAccuracy
from gradeclip_ft.results.record import Json


def class_table(meter: ClassMeanAccuracy, names: Sequence[str]) -> dict[str, Json]:
    """Number of answers and share of correct ones for each class that occurs."""
    total = meter.total.tolist()
    correct = dict(zip(meter.topk, meter.correct.tolist(), strict=True))
    return {
        name: {
            "samples": int(total[row]),
            **{f"top{k}": round(right[row] / total[row], 4) for k, right in correct.items()},
        }
        for row, name in enumerate(names)
        if total[row]
    }


def most_confused(meter: ClassMeanAccuracy, names: Sequence[str], limit: int = 20) -> list[Json]:
    """Pairs of true class and class that came first instead, with their number, frequent first."""
    mistakes = meter.confusion.clone().fill_diagonal_(0).flatten()
    most = mistakes.sort(descending=True, stable=True)
    return [
        {"is": names[place // len(names)], "taken for": names[place % len(names)], "samples": count}
        for count, place in zip(most.values[:limit].tolist(), most.indices.tolist(), strict=False)
        if count
    ]
