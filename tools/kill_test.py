"""Kills a run again and again and asks what came of it; results/campaigns.md holds what it printed.

    python -m tools.kill_test                    # 20 kills of one process
    python -m tools.kill_test kills=3 steps=40
    python -m tools.kill_test ranks=true         # two processes: killed and signalled

The first part trains `+exp=smoke` with a checkpoint every 2 steps, once undisturbed and once under
SIGKILL: while starting, between two steps, or while a checkpoint is being written. `resume=auto`
continues each time; the losses and the weights must be those of the first run, to the last bit.

The runs are forks of this process, which imports the program once and computes nothing: every life
starts in a second, and no kill falls into the start of Python, where there is nothing to lose.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands.cli import call, run
from gradeclip_ft.training.run_files import CHECKPOINT, WEIGHTS, newest_good, read_lines

PATIENCE = 900.0  # seconds that anything may take
# What `train` imports late, and we before the first fork only: workers that are spawned to draw
# shapes import this file as well.
LATE = ("commands.build", "training.trainer", "models.load", "data.captions", "data.shapes")
QUIET = ("evaluation.before=false", "evaluation.after=false", "trainer.log_every=1")
SMOKE = ("train", "+exp=smoke", *QUIET, "trainer.checkpoint_every=2")
MOMENTS = ("start", "step", "write", "write", "step")
JOB = (*SMOKE, "trainer=ddp_sim", "trainer.max_steps=24")
# Process, signal, and whether SLURM has started both instead of torchrun.
ACTS = (
    (1, signal.SIGKILL, False),
    (0, signal.SIGKILL, False),
    (1, signal.SIGTERM, False),
    (0, signal.SIGUSR1, True),
)


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

    def ended(self) -> bool:
        """Whether it has."""
        if self.code is None:
            process, status = os.waitpid(self.process, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if process else None
        return self.code is not None

    def wait(self) -> int:
        """Its exit code."""
        until(self.ended)
        assert self.code is not None
        return self.code

    def said(self) -> str:
        """Its last line."""
        return self.log.read_text(errors="replace").strip().rpartition("\n")[2]


def live(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Life:
    """Start `python -m gradeclip_ft` with these arguments in a process of its own."""
    for name in LATE:
        importlib.import_module(f"gradeclip_ft.{name}")
    log = Path(f"life-{time.monotonic_ns()}.log")
    if process := os.fork():
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
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    if slurm:
        common |= {"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "b16", "SLURM_NODEID": "0"}
        common |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
        common |= {"SLURM_NODELIST": "localhost"}
    else:
        common |= {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "lives"}
    names = ("SLURM_PROCID", "SLURM_LOCALID") if slurm else ("RANK", "LOCAL_RANK")
    return [live(arguments, common | dict.fromkeys(names, str(rank))) for rank in range(2)]


def until(condition: Callable[[], bool], *, every: float = 0.005) -> None:
    """Wait for something.

    Raises:
        TimeoutError: It does not happen.
    """
    limit = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"nothing happened for {PATIENCE} s; see life-*.log in {Path.cwd()}")
        time.sleep(every)


def losses(name: str) -> dict[int, float]:
    """Loss of each logged step of a run."""
    path = Path("runs") / name / "metrics.jsonl"
    lines = read_lines(path) if path.exists() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def last_step(name: str) -> int:
    """The last logged one."""
    return max(losses(name), default=0)


def saved_step(name: str) -> int:
    """Step of the newest good checkpoint; 0 without one."""
    import torch  # not before the first fork

    path = newest_good(Path("runs") / name)
    return int(torch.load(path, weights_only=True)["global_step"]) if path else 0


def kill_test(*, kills: int = 20, steps: int = 120, seed: int = 0, ranks: bool = False) -> int:
    """Run one part and print its table.

    Args:
        kills: Of the first part.
        steps: Of its run.
        seed: Of the moments.
        ranks: The second part, two processes, instead.

    Returns:
        0 if nothing was lost.
    """
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        return kill_ranks() if ranks else kill_one(kills, steps, random.Random(seed))


def kill_one(kills: int, steps: int, draw: random.Random) -> int:
    """The first part, in the present folder."""
    line = [*SMOKE, f"trainer.max_steps={steps}"]
    if code := live([*line, "name=whole"]).wait():
        return code
    again = [*line, "name=killed", "resume=auto"]
    print("| kill | aimed at | fell into | last step logged | continues from |\n|--|--|--|--|--|")
    inside, start = 0, 1.0
    for number in range(1, kills + 1):
        aim = MOMENTS[number % len(MOMENTS)]
        hit, start = kill(again, aim, draw, start)
        inside += hit == "write"
        row = (number, aim, hit, last_step("killed"), saved_step("killed"))
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    code = live(again).wait()
    whole, killed = losses("whole"), losses("killed")
    apart = [step for step in whole if whole[step] != killed.get(step)]
    furthest = max(abs(killed.get(step, float("inf")) / loss - 1) for step, loss in whole.items())
    first, second = (load_file(Path("runs") / name / WEIGHTS) for name in ("whole", "killed"))
    equal = first.keys() == second.keys() and all(
        np.array_equal(value, second[name]) for name, value in first.items()
    )
    print(
        f"\n{kills} kills, {inside} of them inside a write. The last life ended with code {code}. "
        f"Against the undisturbed run: {len(killed)} of {steps} losses logged, {len(apart)} differ"
        f"{f' from step {apart[0]} on' if apart else ''}; largest difference of a loss "
        f"{furthest:.1e}, weights {'equal to the last bit' if equal else 'not equal'}"
    )
    return 0 if code == 0 and whole.keys() == killed.keys() and not apart and equal else 1


def kill(line: list[str], aim: str, draw: random.Random, start: float) -> tuple[str, float]:
    """One life and its end; a run that finishes before leaves nothing to kill.

    Args:
        line: The command.
        aim: When to kill: while it starts, between two steps, or while it writes.
        draw: Of the moment.
        start: Seconds that an earlier life took up to its first step.

    Returns:
        Where it fell: "start" if no step was logged, "write" if a file was left half-written; and
        the seconds up to the first step of this life, if it got that far.
    """

    def writing() -> bool:
        """Whether a checkpoint is half-written, or between its names."""
        folder = Path("runs/killed")
        return any(next(folder.glob(f".{name}.*"), None) for name in (CHECKPOINT, WEIGHTS))

    before, begun = last_step("killed"), time.monotonic()
    one = live(line)
    if aim == "start":
        time.sleep(draw.uniform(0, start))
    else:
        until(lambda: one.ended() or last_step("killed") > before)
        start = time.monotonic() - begun
        goal = before + draw.randint(1, 4)
        until(lambda: one.ended() or last_step("killed") >= goal)
        if aim == "write":
            until(lambda: one.ended() or writing(), every=0.0)
        time.sleep(draw.uniform(0, 0.03 if aim == "write" else 0.1))
    if one.ended():
        raise SystemExit(f"ended by itself with {one.code}: {one.said()}; give more steps")
    os.kill(one.process, signal.SIGKILL)
    one.wait()
    early = last_step("killed") <= before  # a file left by the life before may still be there
    return ("start" if early else "write" if writing() else "step"), start


def kill_ranks() -> int:
    """Each act on a job of its own, then `resume=auto`; prints a table.

    Returns:
        0 if every job ended and went on to the losses of an undisturbed one.
    """
    if any(one.wait() for one in two_ranks([*JOB, "name=whole"])):
        return 1
    lost = 0
    print("| sent to | started by | ended | codes | step then, saved | resume=auto | said |")
    print("|--|--|--|--|--|--|--|")
    for rank, number, slurm in ACTS:
        name = f"{number.name}_{rank}"
        end = act(rank, number, name, slurm=slurm)
        again = two_ranks([*JOB, f"name={name}", "resume=auto"], slurm=slurm)
        same = [one.wait() for one in again] == [0, 0] and losses(name) == losses("whole")
        lost += not same
        print(
            f"| {rank}: {number.name} | {'srun' if slurm else 'torchrun'} | {end['seconds']:.1f} s "
            f"| {', '.join(map(str, end['codes']))} | {end['at']}, {end['saved']} | "
            f"{'the same losses' if same else 'OTHER LOSSES'} | {end['said']} |",
            flush=True,
        )
    return 1 if lost else 0


def act(rank: int, number: signal.Signals, name: str, *, slurm: bool) -> dict[str, Any]:
    """A job that loses a process, or gets a signal in one, after some step.

    Returns:
        Exit codes, seconds from the signal to the end of both, step in the metrics at the signal,
        step of the newest good checkpoint, and the last line of a process that was not killed.
    """
    job = two_ranks([*JOB, f"name={name}"], slurm=slurm)
    until(lambda: last_step(name) >= 5 or any(one.ended() for one in job))
    at, begun = last_step(name), time.monotonic()
    os.kill(job[rank].process, number)
    codes = [one.wait() for one in job]
    seconds = time.monotonic() - begun
    said = job[0 if codes[0] != -number else 1].said()
    return {"codes": codes, "seconds": seconds, "at": at, "saved": saved_step(name), "said": said}


if __name__ == "__main__":
    sys.exit(call(kill_test, sys.argv[1:]))
