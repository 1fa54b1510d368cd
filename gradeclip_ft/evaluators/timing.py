"""What a map costs: seconds per picture of every method, side by side on the same machine.

Table 5 of the paper; its hardware is not stated, so compare ratios, not seconds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradeclip_ft.evaluators.base import Track, evaluating, untracked
from gradeclip_ft.evaluators.methods import chosen, require_float32, settings
from gradeclip_ft.explain.able import Able
from gradeclip_ft.explain.base import Explainer, explain_image
from gradeclip_ft.explain.pictures import prepared
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.results.fingerprint import data_fingerprint
from gradeclip_ft.results.record import Json, Measured

REFERENCE = "encode_image"
SEED = 0


@dataclass(frozen=True)
class TimingEvaluator:
    """Median seconds of every method, and of `encode_image` alone on the same pictures.

    Pictures are random pixels of the model's size and text vectors are random, which cost what real
    ones cost. A time is that from pixels and text vectors to finished maps; encoding texts is not
    part of it. The methods take turns, so that a machine that slows down slows all of them.

    Attributes:
        name: Of the result file.
        explainers: Methods by name.
        methods: Names of those to time; None for all.
        image_size: Side in pixels; None for the model's own size.
        batch_size: Pictures per call.
        phrases: Texts per picture.
        warm_up: Calls before the first that counts; slow methods (see `budget`) have one.
        rounds: Calls that count, at most.
        budget: Seconds for the calls of a method that count. A method of which only k calls fit has
            k rounds; where not even one fits, its warm-up is its time. `details.rounds` says so.
    """

    name: str
    explainers: Mapping[str, Explainer]
    methods: Sequence[str] | None = None
    image_size: int | None = None
    batch_size: int = 1
    phrases: int = 1
    warm_up: int = 3
    rounds: int = 20
    budget: float = 20.0

    @property
    def protocol(self) -> dict[str, Json]:
        """Settings that change the numbers, without those that need the model."""
        size: dict[str, Json] = {} if self.image_size is None else {"image_size": self.image_size}
        return {
            "task": "time of heat maps",
            **size,
            "pictures": "random pixels",
            "batch_size": self.batch_size,
            "phrases_per_image": self.phrases,
            "from": "pixels and text vectors on the device",
            "to": "maps at the patch grid",
            "time": "median, methods in turns",
            "warm_up": self.warm_up,
            "rounds": self.rounds,
            "budget": self.budget,
            "methods": settings(chosen(self.explainers, self.methods)),
        }

    def prepare(self) -> None:
        """No data are needed."""

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Time one model, where it is.

        Raises:
            ValueError: The model can do none of the methods, or is in half precision.
        """
        require_float32(loaded.clip, self.name)
        size = loaded.image_size if self.image_size is None else (self.image_size,) * 2
        device = loaded.clip.device
        with evaluating(loaded.clip):
            images, target, owner = self._inputs(loaded, size)
            able = Able(prepared(chosen(self.explainers, self.methods), loaded))

            def call(method: Explainer) -> Callable[[], object]:
                return lambda: explain_image(method, loaded.clip, images, target, owner)

            first = able.each(lambda method: seconds(call(method), device))
            calls = {name: call(able.methods[name]) for name in first}
            calls = {REFERENCE: lambda: loaded.clip.image.encode(images), **calls}
            first = {REFERENCE: seconds(calls[REFERENCE], device), **first}
            times = self._in_turns(calls, first, device, track)
        return Measured(
            metrics=self._metrics(times),
            protocol={
                **self.protocol,
                "image_size": list(size),
                "device": _name_of(device),
                "threads": torch.get_num_threads(),
            },
            data=data_fingerprint([], [], {"images": self.batch_size}),
            details={
                "rounds": {name: len(each) for name, each in times.items()},
                "quartiles": {name: _quartiles(each) for name, each in times.items()},
                "left_out": {**able.left_out},
            },
        )

    def _inputs(self, loaded: LoadedClip, size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, text vectors, and the picture of each."""
        device = loaded.clip.device
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randn(self.batch_size, 3, *size, generator=generator).to(device)
        owner = torch.arange(self.batch_size).repeat_interleave(self.phrases)
        width = loaded.clip.image.encode(images).shape[1]
        target = unit(torch.randn(len(owner), width, generator=generator))
        return images, target.to(device), owner.to(device)

    def _in_turns(
        self,
        calls: Mapping[str, Callable[[], object]],
        first: Mapping[str, float],
        device: torch.device,
        track: Track,
    ) -> dict[str, list[float]]:
        """Seconds of every call that counts, by method."""
        left = {name: min(self.rounds, int(self.budget / first[name])) for name in calls}
        times: dict[str, list[float]] = {
            name: [] if count else [first[name]] for name, count in left.items()
        }
        for name, count in left.items():
            for _ in range(self.warm_up - 1 if count == self.rounds else 0):
                seconds(calls[name], device)
        for turn in track(range(self.rounds), f"{self.name}: rounds", self.rounds):
            for name, count in left.items():
                if turn < count:
                    times[name].append(seconds(calls[name], device))
        return times

    def _metrics(self, times: Mapping[str, Sequence[float]]) -> dict[str, float]:
        bare = statistics.median(times[REFERENCE])
        found: dict[str, float] = {}
        for name, each in times.items():
            median = statistics.median(each)
            found[f"{name}/seconds"] = median / self.batch_size
            if name != REFERENCE:
                found[f"{name}/seconds_per_map"] = median / (self.batch_size * self.phrases)
            found[f"{name}/times_encode_image"] = median / bare
        return found


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of one call, waiting for the device before and behind it."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _quartiles(times: Sequence[float]) -> Any:
    """First and third quartile of a call in seconds."""
    ends = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times
    return [round(ends[0], 6), round(ends[-1], 6)]
