"""Runs of the program in forked processes that can be killed at a chosen moment.

This process imports the program once and computes nothing, so every life starts in a second and a
kill never falls into the start of Python, where there is nothing to lose.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands.cli import run
from gradeclip_ft.training.ledger import newest_good

# What `train` imports late, and we before the first fork only: workers that are spawned to draw
# shapes import this file as well.
LATE = ("commands.build", "training.trainer", "models.factory", "data.captions", "data.shapes")
PATIENCE = 900.0  # seconds that anything may take
QUIET = ("evaluation.before=false", "evaluation.after=false", "trainer.log_every=1")
SMOKE = ("train", "+exp=smoke", *QUIET, "trainer.checkpoint_every=2")


@dataclass
class Life:
    """A forked run of the program.

    Attributes:
        process: Its number.
        log: What it prints.
        code: Exit code once it has ended; negative for a signal.
    """

    process: int
    log: Path
    code: int | None = None

    def alive(self) -> bool:
        """Whether it has not ended."""
        if self.code is None:
            ended, status = os.waitpid(self.process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code is None

    def wait(self) -> int:
        """Its exit code.

        Raises:
            TimeoutError: It hangs; it is killed.
        """
        until(lambda: not self.alive(), self)
        assert self.code is not None
        return self.code

    def send(self, number: signal.Signals) -> None:
        """A signal, if it can still get one."""
        if self.alive():
            os.kill(self.process, number)

    def said(self) -> str:
        """Its last line."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def live(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Life:
    """Start `python -m gradeclip_ft` with these arguments in a process of its own."""
    for name in LATE:
        importlib.import_module(f"gradeclip_ft.{name}")
    log = Path(f"life-{time.monotonic_ns()}.log")
    process = os.fork()
    if process:
        return Life(process, log)
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment or {})
        sys.argv = ["gradeclip_ft"]
        code = run(COMMANDS, arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def two_ranks(arguments: Sequence[str], *, slurm: bool = False) -> list[Life]:
    """The two processes of one job, as torchrun or srun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        live(arguments, common | (srun(rank) if slurm else torchrun(rank))) for rank in range(2)
    ]


def torchrun(rank: int) -> dict[str, str]:
    """What torchrun tells a process."""
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "lives", **own}


def srun(rank: int) -> dict[str, str]:
    """What SLURM tells a task."""
    job = {"JOB_ID": "1234", "JOB_NAME": "b16", "NTASKS": "2", "NTASKS_PER_NODE": "2"}
    place = {"NNODES": "1", "NODELIST": "localhost", "NODEID": "0"}
    own = {"PROCID": str(rank), "LOCALID": str(rank)}
    return {f"SLURM_{name}": value for name, value in {**job, **place, **own}.items()}


def until(condition: Callable[[], bool], *lives: Life, every: float = 0.005) -> None:
    """Wait for something.

    Raises:
        TimeoutError: It does not happen; the lives are killed.
    """
    limit = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > limit:
            for one in lives:
                one.send(signal.SIGKILL)
            raise TimeoutError(f"nothing happened for {PATIENCE} s; see {[x.log for x in lives]}")
        time.sleep(every)


def losses(name: str) -> dict[int, float]:
    """Loss of each logged step of a run."""
    path = Path("runs") / name / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def saved_step(name: str) -> int:
    """Step of the newest good checkpoint; 0 without one."""
    import torch

    path = newest_good(Path("runs") / name)
    return int(torch.load(path, weights_only=True)["global_step"]) if path else 0
