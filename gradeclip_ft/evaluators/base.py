"""What an evaluator is, and how several of them run on one model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch

from gradeclip_ft.models.clip import ImageTextModel, LoadedClip, evaluation_mode
from gradeclip_ft.results.masking import masked_texts
from gradeclip_ft.results.record import (
    Json,
    Measured,
    Result,
    hash_file,
    read,
    result_path,
    versions,
)

Item = TypeVar("Item")
Precision = Literal["float32", "bfloat16", "float16"]


@runtime_checkable
class Track(Protocol):
    """Passes the items of a loop through and shows how far it is."""

    def __call__(self, items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
        """The same items."""


def untracked(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """No progress shown."""
    del what, total
    return items


@runtime_checkable
class Evaluator(Protocol):
    """Model to numbers; leaves the model, its mode and the random state as they were.

    It may have a method `prepare`, to make or check what it needs; see the function.

    Some fields mean the same in every evaluator. `name` is that of the result file, `data` is where
    pictures come from. `batch_size` and `text_batch_size` count those per forward pass, `workers`
    the processes that load pictures (0: this one); they do not change the numbers. `explainers` are
    methods by name, `methods` the names of those to measure; None for all. `image_size` is the side
    of the padded square in pixels; None for the model's own size.
    """

    @property
    def name(self) -> str:
        """Name of its result file; carries the image size where that decides the numbers."""

    @property
    def protocol(self) -> dict[str, Json]:
        """The settings that change the numbers, as far as they are known without a model."""

    def __call__(self, loaded: LoadedClip, *, track: Track = untracked) -> Measured:
        """Measure one model."""


def prepare(evaluator: Evaluator) -> None:
    """Make or check its data, by its own `prepare`, else by that of its `data`, if it has one.

    Cheap when all is there, and run by one process only.
    """
    has: Any = evaluator if hasattr(evaluator, "prepare") else getattr(evaluator, "data", None)
    if hasattr(has, "prepare"):
        has.prepare()


def run_all(
    evaluators: Mapping[str, Evaluator],
    loaded: LoadedClip,
    *,
    folder: Path,
    run: str | None = None,
    step: int = 0,
    alpha: float = 1.0,
    command: str | None = None,
    again: bool = True,
    precision: Precision = "float32",
    track: Track = untracked,
    record: Callable[[Any], Any] = masked_texts,
    done: Callable[[Result, bool], None] = lambda result, fresh: None,
) -> list[Result]:
    """Run evaluators on one model and write one JSON each, and the page of those that have one.

    Args:
        evaluators: By any key; the result takes the evaluator's own name.
        loaded: The model.
        folder: Where the results go, `<evaluator>@<step>.json`.
        run: Name of the run the weights come from.
        step: Optimiser steps of the weights.
        alpha: Share of the tuned weights in them; below 1 it is part of the file's name.
        command: Command line for the record.
        again: Replace results that are there; else those of the same weights and protocol are kept.
        precision: Number type that the model computes in; similarities are float32 all the same.
            Other than float32 changes the model.
        track: Shows progress.
        record: What a result file holds of protocol, data and weights, without what is not shared.
        done: Called after each evaluator with its result and whether it was measured now.
    """
    require_names(evaluators)
    weights: dict[str, Json] = {"name": loaded.name, "hash": loaded.weights_hash}
    if loaded.activation_unknown:
        weights["activation"] = "unknown"
    if alpha != 1.0:
        weights["alpha"] = alpha
    weights = record(weights)
    settings: dict[str, Json] = {} if precision == "float32" else {"precision": precision}
    if settings:
        loaded.clip.to(getattr(torch, precision))
    results = []
    for evaluator in evaluators.values():
        path = result_path(folder, evaluator.name, step, alpha)
        fresh = again or not path.exists()
        if fresh:
            start = time.perf_counter()
            with evaluating(loaded.clip):
                measured = evaluator(loaded, track=track)
            result = Result(
                evaluator=evaluator.name,
                metrics=measured.metrics,
                protocol=record({**measured.protocol, **settings}),
                data=record(measured.data),
                weights=weights,
                versions=versions(),
                run=run,
                step=step,
                seconds=round(time.perf_counter() - start, 2),
                command=command,
                details=record(measured.details),
            )
            result.write(folder)
            if measured.page is not None:
                measured.page(path.with_suffix(".html"))
        else:
            wanted = record({"precision": None, **evaluator.protocol, **settings})
            result = _same(path, wanted, weights)
        done(result, fresh)
        results.append(result)
    return results


def require_names(evaluators: Mapping[str, Evaluator]) -> list[str]:
    """Names of their result files.

    Raises:
        ValueError: Two have the same.
    """
    names = [evaluator.name for evaluator in evaluators.values()]
    if len(set(names)) < len(names):
        raise ValueError(
            f"evaluators need different names, got {', '.join(sorted(names))}; set "
            "evaluator.KEY.name= of one of them"
        )
    return names


@contextmanager
def evaluating(clip: ImageTextModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every layer has the mode it had.

    No inference mode: tensors that a model caches there could not be used in training.
    """
    with evaluation_mode(clip), torch.no_grad():
        yield


def placement(clip: ImageTextModel) -> tuple[torch.device, torch.dtype]:
    """Device and type that images must have."""
    parameter = next(clip.model.parameters())
    return parameter.device, parameter.dtype


def _same(path: Path, protocol: Mapping[str, Json], weights: Mapping[str, Json]) -> Result:
    """The result on disk, if it is one of these weights, this protocol and files as they are."""
    result = read(path)
    differing: list[Any] = [key for key in weights if result.weights.get(key) != weights[key]]
    differing += [key for key, value in protocol.items() if result.protocol.get(key) != value]
    files: dict[str, str] = result.data.get("files", {})
    there = {path: digest for path, digest in files.items() if Path(path).is_file()}
    differing += [path for path, digest in there.items() if hash_file(Path(path)) != digest]
    if differing:
        raise ValueError(
            f"{path} exists and differs in {', '.join(differing)}; again=true replaces it, another "
            "out= keeps both"
        )
    return result
