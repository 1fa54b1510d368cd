"""Times of maps: what is counted, how often, and in which order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gradeclip_ft.evaluators.maps import TimingEvaluator
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.explain.rollout import Rollout
from gradeclip_ft.models.load import load_clip
from tests.evaluators.conftest import Load, Unable

CALLS: list[float] = []
TICK = 0.001  # what every look at the clock takes, and so every call


@dataclass(frozen=True)
class Sleeping:
    """A method that takes a known time."""

    naps: float = 0.01
    images_only: ClassVar[bool] = True

    def from_input(self, tower: Any, x: Tensor, target: Tensor, owner: Tensor) -> Tensor:
        CALLS.append(self.naps)
        return torch.zeros(len(owner), 4, 4)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only naps and looks at it move, so that a busy machine changes nothing."""
    CALLS.clear()
    looks = itertools.count()
    monkeypatch.setattr(
        "gradeclip_ft.evaluators.maps.time.perf_counter",
        lambda: TICK * next(looks) + sum(CALLS),
    )


def test_times_are_those_of_the_calls_by_picture_and_by_map(load: Load) -> None:
    timing = TimingEvaluator(
        "timing", {"nap": Sleeping(0.02)}, batch_size=2, phrases=5, warm_up=2, rounds=3
    )
    measured = timing(load(64, 16))
    found = measured.metrics
    assert found == pytest.approx(
        {
            "encode_image/seconds": 0.0005,  # a tick for two pictures
            "encode_image/times_encode_image": 1.0,
            "nap/seconds": 0.0105,
            "nap/seconds_per_map": 0.0021,
            "nap/times_encode_image": 21.0,
        }
    )
    assert len(CALLS) == 5
    chosen = ("batch_size", "phrases_per_image", "image_size", "device", "threads", "pictures")
    assert [measured.protocol[key] for key in chosen] == [
        *(2, 5, [64, 64], "cpu"),
        *(torch.get_num_threads(), "random pixels"),
    ]


def test_methods_take_turns(load: Load) -> None:
    """A machine that slows down meanwhile must not slow down one method alone."""
    methods = {"a": Sleeping(0.001), "b": Sleeping(0.002)}
    TimingEvaluator("timing", methods, warm_up=1, rounds=3)(load(64, 16))
    assert CALLS == [0.001, 0.002] * 4


def test_slow_methods_have_fewer_rounds_and_at_least_one(load: Load) -> None:
    methods = {"fast": Sleeping(0.001), "slow": Sleeping(0.09), "slowest": Sleeping(0.25)}
    timing = TimingEvaluator("timing", methods, warm_up=2, rounds=4, budget=0.2)
    measured = timing(load(64, 16))
    rounds = measured.details["rounds"]
    assert isinstance(rounds, dict)
    assert rounds == {"encode_image": 4, "fast": 4, "slow": 2, "slowest": 1}
    assert [CALLS.count(nap) for nap in (0.001, 0.09, 0.25)] == [6, 3, 1]
    assert measured.metrics["slowest/seconds"] == pytest.approx(0.251)


def test_what_a_tower_cannot_do_is_left_out_and_said(load: Load) -> None:
    methods = {"unable": Unable(), "nap": Sleeping(0.001)}
    measured = TimingEvaluator("timing", methods, rounds=1)(load(64, 16))
    assert measured.details["left_out"] == {"unable": "this tower has no such layer"}
    assert "unable/seconds" not in measured.metrics


def test_real_methods_are_timed_at_another_size() -> None:
    methods = {"grad_eclip": GradEclip(), "rollout": Rollout()}
    timing = TimingEvaluator("timing", methods, image_size=32, phrases=2, warm_up=1, rounds=2)
    measured = timing(load_clip("shapes_tiny"))
    assert measured.protocol["image_size"] == [32, 32]
    assert all(value > 0 for value in measured.metrics.values())
