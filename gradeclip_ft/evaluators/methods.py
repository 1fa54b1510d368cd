"""Explainers side by side in an evaluation: which of them, with which settings, and who cannot."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from gradeclip_ft.evaluators.base import placement
from gradeclip_ft.explain.base import Explainer
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.tower import UnsupportedTowerError
from gradeclip_ft.results.record import Json

Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


def chosen(
    explainers: Mapping[str, Explainer], methods: Sequence[str] | None
) -> dict[str, Explainer]:
    """The methods that are asked for, in that order; all for None.

    Raises:
        ValueError: There is none of a name, or none at all.
    """
    names = list(explainers) if methods is None else list(methods)
    unknown = [name for name in names if name not in explainers]
    if unknown or not names:
        raise ValueError(
            f"methods={names}: {', '.join(unknown) or 'none asked for'}; choose from "
            f"{', '.join(explainers)}"
        )
    return {name: explainers[name] for name in names}


def settings(explainers: Mapping[str, Explainer]) -> dict[str, Json]:
    """What each method was told, as it stands in a JSON file."""
    told = {name: _settings(method) for name, method in explainers.items()}
    plain: dict[str, Json] = json.loads(json.dumps(told))
    return plain


def require_float32(clip: Clip, name: str) -> None:
    """Refuse a model in half precision, whose gradients are no reference.

    Raises:
        ValueError: It is one.
    """
    _, dtype = placement(clip)
    if dtype != torch.float32:
        raise ValueError(f"{name} explains in float32, the model is {dtype}; set precision=float32")


class Able:
    """Methods that this model can do; the others are left out at their first failure, with a word.

    Attributes:
        methods: Those left, by name.
        left_out: Why the others are not.
    """

    def __init__(self, methods: Mapping[str, Explainer]) -> None:
        self.methods = dict(methods)
        self.left_out: dict[str, Json] = {}

    def each(self, work: Callable[[Explainer], Answer]) -> dict[str, Answer]:
        """Answers of all methods that this model can do.

        Raises:
            UnsupportedTowerError: It can do none.
        """
        return {name: answer for name in list(self.methods) for answer in self.one(name, work)}

    def one(self, name: str, work: Callable[[Explainer], Answer]) -> list[Answer]:
        """The answer of one method, or none."""
        try:
            return [work(self.methods[name])]
        except UnsupportedTowerError as error:
            log.warning("%s is left out: %s", name, error)
            self.left_out[name] = str(error)
            del self.methods[name]
            if not self.methods:
                raise
            return []


def _settings(method: Explainer) -> dict[str, Json]:
    values = {entry.name: getattr(method, entry.name) for entry in fields(method)}  # type: ignore[arg-type]
    kept = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
    return {"method": type(method).__name__, **kept}
