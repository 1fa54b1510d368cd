"""Loaders inside processes that somebody else started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event

import pytest
import torch
from torch.utils.data import Dataset

from gradeclip_ft.data import loading
from gradeclip_ft.images import ImageError
from gradeclip_ft.ops.distributed import (
    SIGNALS,
    ignore_scheduler_signals,
    scheduler_signals_held,
)


class Numbers(Dataset[int]):
    """Five numbers."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        if index >= 5:
            raise IndexError
        return index


@pytest.mark.parametrize("foreign", [True, False])
def test_workers_start_also_below_joblib(foreign: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start method of joblib cannot start a loader's workers: a sweep with evaluators died."""
    import multiprocessing

    if foreign:
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "loky")
    loader = loading.evaluation_loader(Numbers(), torch.tensor, batch_size=2, workers=2)
    context = loader.multiprocessing_context
    assert (context is not None) == foreign
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4]]


class Broken(Numbers):
    """The third of them cannot be read, for a reason that cannot be pickled."""

    def __getitem__(self, index: int) -> int:
        if index == 3:
            raise ImageError("broken_image", "3.jpg cannot be read")
        return super().__getitem__(index)


class Killed(Numbers):
    """The system ends the worker at the third of them."""

    def __getitem__(self, index: int) -> int:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_workers_are_as_short_as_those_of_the_process(workers: int) -> None:
    """Eighty lines of torch hid one line about a broken picture."""
    loader = loading.evaluation_loader(Broken(), torch.tensor, batch_size=2, workers=workers)
    with pytest.raises(ValueError, match=r"^3\.jpg cannot be read$"):
        list(loader)


def test_a_worker_that_is_killed_during_a_step_says_what_to_do() -> None:
    """Torch's signal handler raises in the middle of it, far from the loader."""
    loader = loading.evaluation_loader(Killed(), torch.tensor, batch_size=2, workers=1)

    def step() -> None:
        with loading.naming_killed_workers():
            for _ in loader:
                time.sleep(20)

    with pytest.raises(RuntimeError, match=r"lower workers= .*resume=auto"):
        step()


class Signalled(Numbers):
    """Each worker gets the signals of a scheduler and Ctrl-C, not from its parent."""

    def __getitem__(self, index: int) -> int:
        for number in (*SIGNALS, signal.SIGINT):
            os.kill(os.getpid(), number)
        return super().__getitem__(index)


def test_workers_go_on_when_a_scheduler_signals_every_process() -> None:
    """Would catch a job that ends with 1 instead of 143, and is not requeued."""
    loader = loading.evaluation_loader(Signalled(), torch.tensor, batch_size=2, workers=2)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4]]


def busy(begun: Event) -> None:
    """A worker that reads for a long time."""
    ignore_scheduler_signals(0)
    begun.set()
    time.sleep(60)


def test_a_worker_still_ends_when_its_parent_says_so() -> None:
    """Would catch a run that waits at its end for a worker that reads from a slow remote.

    Libraries start threads in forks, which must not take the signal.
    """
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    process = fork.Process(target=busy, args=(begun,))
    with scheduler_signals_held():
        process.start()
    assert begun.wait(60)
    process.terminate()
    process.join(20)
    assert process.exitcode == 0
