"""The weights with the best evaluation so far, kept beside the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from gradeclip_ft.training.run_files import write_weights

BEST = "best.safetensors"


class Best:
    """Keeps the weights whose chosen metric is highest; of equal ones the first.

    The file says its metric, value and step, so a resumed run goes on from it.

    Args:
        folder: Of the run.
        metric: As the loggers name it, `EVALUATOR/METRIC`.
    """

    def __init__(self, folder: Path, metric: str) -> None:
        self._path = folder / BEST
        self._metric = metric

    def offer(
        self, numbers: Mapping[str, float], weights: Mapping[str, Tensor], *, step: int
    ) -> None:
        """Keep these weights if they are better than those on disk.

        Raises:
            ValueError: The evaluators do not measure the metric.
        """
        if self._metric not in numbers:
            raise ValueError(
                f"evaluation.best is {self._metric}, which no evaluator measures; choose from "
                f"{', '.join(sorted(numbers))}"
            )
        value = numbers[self._metric]
        before = self._value()
        if before is None or value > before:
            note = {"metric": self._metric, "value": repr(value)}
            write_weights(self._path, weights, step=step, note=note)

    def _value(self) -> float | None:
        """The metric of the weights on disk; None where they were chosen by another one."""
        if not self._path.is_file():
            return None
        with safe_open(self._path, framework="pt") as file:
            note: dict[str, str] = file.metadata() or {}
        return float(note["value"]) if note.get("metric") == self._metric else None
