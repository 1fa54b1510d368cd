"""The checks for authors: our own classes pass them, and each fault that they know is caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from gradeclip_ft.commands.build import build_explainers, make
from gradeclip_ft.commands.config import compose, options
from gradeclip_ft.data.pairs import CaptionFile
from gradeclip_ft.evaluators.pairs import RetrievalEvaluator
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.objectives.base import LossTerms
from gradeclip_ft.objectives.global_only import GlobalOnly
from gradeclip_ft.results.record import Measured
from gradeclip_ft.testing import check_evaluator, check_explainer, check_objective

FASTER = {"rise": {"masks": 16}, "integrated_gradients": {"steps": 2}, "m2ib": {"steps": 2}}

OTHERS = {"detection", "iclip"}  # for detectors, and for a frozen image tower


@pytest.fixture(scope="module")
def tiny() -> LoadedClip:
    return load_clip("shapes_tiny")


@pytest.mark.parametrize("name", [n for n in options("explainer") if n != "grad_eclip_text"])
def test_our_explainers_pass(name: str, tiny: LoadedClip) -> None:
    (explainer,) = build_explainers([name]).values()
    check_explainer(replace(explainer, **FASTER.get(name, {})), tiny)


@pytest.mark.parametrize("name", sorted({*options("objective")} - OTHERS))
def test_our_objectives_pass(name: str, tiny: LoadedClip) -> None:
    check_objective(make(compose("train", [f"objective={name}"]).objective, "objective"), tiny)


def test_an_evaluator_of_ours_passes(tmp_path: Path, tiny: LoadedClip) -> None:
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(3)]
    texts = [{"id": n, "image_id": n, "caption": f"a {c} star"} for n, c in enumerate("abc")]
    for n, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{n}.png")
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": texts}))
    data = CaptionFile(str(tmp_path / "captions.json"), str(tmp_path), "three")
    check_evaluator(RetrievalEvaluator("three", data), tiny)


@dataclass(frozen=True)
class Broken:
    """Grad-ECLIP, but for one fault."""

    _fault: Callable[[Tensor, Any], Tensor]
    create_graph: bool = False

    def from_trace(self, trace: Any, target: Tensor, owner: Tensor) -> Tensor:
        return self._fault(GradEclip().from_trace(trace, target, owner), trace)


def spoiled(heat: Tensor, trace: Any) -> Tensor:
    torch.rand(1)
    return heat


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda heat, trace: heat[:, :-1], "shape|size"),
        (lambda heat, trace: heat * torch.nan, "not finite"),
        (lambda heat, trace: heat / heat.amax(), "without the other phrases"),
        (spoiled, "changes torch's random state"),
        (lambda heat, trace: heat * len(heat), "without the other phrases"),
    ],
)
def test_a_fault_of_an_explainer_is_caught(fault: Any, message: str, tiny: LoadedClip) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_explainer(Broken(fault), tiny)


@dataclass
class Counts:
    """An evaluator with one fault."""

    metrics: Callable[[int], dict[str, float]]
    name: str = "counts"
    told: dict[str, Any] = field(default_factory=dict)
    calls: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        return {"a": 1}

    def prepare(self) -> None: ...

    def __call__(self, loaded: LoadedClip, *, track: Any) -> Measured:
        self.calls += 1
        return Measured(self.metrics(self.calls), {**self.protocol, **self.told}, {})


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        (Counts(lambda call: {}), "has no metrics"),
        (Counts(lambda call: {"x": float("nan")}), "x is nan"),
        (Counts(lambda call: {"x": 37.0}), "x is 37.0, which is not a fraction; end its name"),
        (Counts(lambda call: {"x": call / 10}), "x is 0.1, then 0.2"),
        (Counts(lambda call: {"x": 0.5}, name="a/b"), "results are files of that name"),
        (Counts(lambda call: {"x": 0.5}, told={"a": 2}), "protocol has another a"),
    ],
)
def test_a_fault_of_an_evaluator_is_caught(
    evaluator: Counts, message: str, tiny: LoadedClip
) -> None:
    with pytest.raises(AssertionError, match=message):
        check_evaluator(evaluator, tiny)


NUMBERS = count(1)


@dataclass(frozen=True)
class Bent:
    """Ordinary fine-tuning with one fault."""

    fault: Callable[[LossTerms, Any], LossTerms]

    def check(self, clip: Any) -> None: ...

    def __call__(self, clip: Any, batch: Any) -> LossTerms:
        return self.fault(GlobalOnly()(clip, batch), clip)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda terms, clip: LossTerms(terms.total / 0), "total is not finite"),
        (lambda terms, clip: LossTerms(terms.total, {"a": terms.total}), "a is logged with its"),
        (lambda terms, clip: LossTerms(terms.total * next(NUMBERS)), "another loss the second"),
        (lambda terms, clip: LossTerms(clip.log_scale * 2), "no gradient reaches a tower"),
        (lambda terms, clip: LossTerms(terms.total.detach() + clip.train().log_scale), "mode of"),
    ],
)
def test_a_fault_of_an_objective_is_caught(fault: Any, message: str, tiny: LoadedClip) -> None:
    with pytest.raises(AssertionError, match=message):
        check_objective(Bent(fault), tiny)
