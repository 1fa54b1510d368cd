"""Explainers side by side in an evaluation: which of them, and with which settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from gradeclip_ft.evaluators.base import placement
from gradeclip_ft.explain.base import Explainer
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.results.record import Json


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


def _settings(method: Explainer) -> dict[str, Json]:
    values = {entry.name: getattr(method, entry.name) for entry in fields(method)}  # type: ignore[arg-type]
    kept = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
    return {"method": type(method).__name__, **kept}
