"""Mutated shards, samples, weights files and configurations: no unhandled error, no hang.

    python -m tools.fuzz cases=20000 seed=0
    python -m tools.fuzz only=4711 seed=0         one case again, with its traceback

A case depends on seed and number alone. It passes if the input is read, or refused by an error
that this package raises on purpose. It fails by any other error, by more than `seconds` of time or
1 GB of memory, by starting a program, and by opening a file outside its folder for writing. Inputs
of failed cases are kept in `out`. Exit code 1 if any failed.
"""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gradeclip_ft.commands.cli import call
from gradeclip_ft.commands.config import ConfigurationError, is_meant, perform, wants_traceback
from gradeclip_ft.text.phrases import load_tagger
from tools import fuzz_data, fuzz_files

FORBIDDEN = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
)
IDLE = 10
MOST_GROWTH, MOST_MEMORY = 10**9, 6 * 10**9  # bytes: of one case, and of what it may claim
WRITING = ("w", "a", "x", "+")


class Kind(NamedTuple):
    """How inputs of a kind are made, and what is done with them."""

    name: str
    share: int
    make: Callable[[random.Random, Path], Path]
    run: Callable[[Path], str]


KINDS = (
    Kind("sample", 14, fuzz_data.sample_input, fuzz_data.run_sample),
    Kind("shard", 12, fuzz_data.shard_input, fuzz_data.run_shard),
    Kind("checkpoint", 9, fuzz_files.checkpoint_input, fuzz_files.run_checkpoint),
    Kind("config", 4, fuzz_files.config_input, fuzz_files.run_config),
    Kind("override", 1, fuzz_files.override_input, fuzz_files.run_override),
)
DECK = tuple(kind for kind in KINDS for _ in range(kind.share))


class HangError(BaseException):
    """A case takes too long; no `except Exception` can hold it up."""


class BreachError(BaseException):
    """A case does what no input may cause."""


def fuzz(
    *,
    cases: int = 20_000,
    seed: int = 0,
    seconds: float = 10.0,
    only: int | None = None,
    out: Path = Path("fuzz_failures"),
) -> int:
    """Run the cases and print what became of them; see the module.

    cases=20000          how many
    seed=0               of all of them
    seconds=10           of the processor a case may take, and ten times as many of the clock
    only=                number of one case to run again
    out=fuzz_failures    for inputs of failed cases
    """
    watch = _Watch()
    outcomes: dict[str, Counter[str]] = {kind.name: Counter() for kind in KINDS}
    failed, slowest, begun = 0, (0.0, 0), time.perf_counter()
    fuzz_data.batches()
    fuzz_files.model()
    load_tagger("textblob")
    with tempfile.TemporaryDirectory() as place:
        for number in range(cases) if only is None else (only,):
            started = time.perf_counter()
            kind, outcome, report = one(number, Path(place), watch, seed=seed, seconds=seconds)
            slowest = max(slowest, (time.perf_counter() - started, number))
            outcomes[kind][outcome] += 1
            if report is not None:
                failed += 1
                _keep(out, number, kind, Path(place), report)
                print(f"case {number} ({kind}): {outcome}\n{report}", flush=True)
    for kind, counts in outcomes.items():
        print(f"{kind:<11}{counts.total():>7,}  {_in_words(counts)}")
    total = sum(counts.total() for counts in outcomes.values())
    print(f"{total:,} cases, seed {seed}, {time.perf_counter() - begun:.0f} s; {failed} failed")
    print(f"slowest: {slowest[0]:.1f} s, case {slowest[1]}")
    return 1 if failed else 0


def one(
    number: int, folder: Path, watch: _Watch, *, seed: int, seconds: float
) -> tuple[str, str, str | None]:
    """Kind, outcome, and a report if it failed."""
    rng = random.Random(f"{seed}/{number}")
    kind = DECK[number % len(DECK)]
    for old in folder.iterdir():
        old.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = kind.make(rng, folder)
        try:
            with watch(folder), _limited(seconds), _frugal():
                return kind.name, kind.run(path), None
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            meant = isinstance(error, ConfigurationError) or (
                isinstance(error, Exception) and is_meant(error)
            )
            report = None if meant else "".join(traceback.format_exception(error))
            return kind.name, f"refused by {type(error).__name__}" if meant else "FAILED", report


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise HangError(f"more than {seconds:g} s")

    clocks = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, ring) for number in clocks}
    signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor: the machine may be busy
    signal.setitimer(signal.ITIMER_REAL, IDLE * seconds)
    try:
        yield
    finally:
        for number, clock in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])


@contextlib.contextmanager
def _frugal() -> Iterator[None]:
    """The largest memory of the process must not grow by much; claims beyond all reason fail."""
    before, (soft, hard) = _peak(), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if _peak() - before > MOST_GROWTH:
        raise BreachError(f"needs {(_peak() - before) / 1e9:.1f} GB")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Watch:
    """Programs started, connections, and files opened for writing elsewhere are breaches."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        sys.addaudithook(self._hook)  # for good: it cannot be taken off, only look away

    @contextlib.contextmanager
    def __call__(self, folder: Path) -> Iterator[None]:
        self._folder = folder.resolve()
        try:
            yield
        finally:
            self._folder = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        folder = self._folder
        if folder is None:
            return
        if event in FORBIDDEN:
            raise BreachError(f"{event} {arguments}")
        if event != "open" or not isinstance(arguments[1], str):
            return
        path = Path(str(arguments[0]))
        if set(arguments[1]) & set(WRITING) and path.parts[:2] != ("/", "dev"):
            self._folder = None  # resolving must not be watched
            inside = path.resolve().is_relative_to(folder)
            self._folder = folder
            if not inside:
                raise BreachError(f"opens {path} for writing")


def _keep(out: Path, number: int, kind: str, folder: Path, report: str) -> None:
    """Input and report of a failed case."""
    kept = out / f"{number}-{kind}"
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    (kept / "report.txt").write_text(report)


def _in_words(counts: Counter[str]) -> str:
    return ", ".join(f"{outcome} {number:,}" for outcome, number in counts.most_common())


if __name__ == "__main__":
    sys.exit(perform(lambda: call(fuzz, sys.argv[1:]), full=wants_traceback()))
