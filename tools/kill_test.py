"""Kills a run again and again and asks what came of it; docs/scale.md holds what this printed.

    python -m tools.kill_test                    # 20 kills of one process
    python -m tools.kill_test kills=3 steps=40
    python -m tools.kill_test ranks=true         # two processes: killed and signalled

The first part trains `+exp=smoke` with a checkpoint every 2 steps, once undisturbed and once under
SIGKILL: while starting, between two steps, or while a checkpoint is being written. `resume=auto`
goes on each time; the losses and the weights must be those of the first run, to the last bit.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from gradeclip_ft.commands.cli import call
from gradeclip_ft.training.ledger import CHECKPOINT, WEIGHTS
from tools.kill_ranks import kill_ranks
from tools.lives import SMOKE, live, losses, saved_step, until

MOMENTS = ("start", "step", "write", "write", "step")


@dataclass(frozen=True)
class Kill:
    """One life that was ended.

    Attributes:
        aim: When the kill was meant to fall.
        hit: Where it fell: "write" if a file was left half-written, "start" if no step was logged.
        logged: Last step in the metrics afterwards.
        saved: Step of the newest good checkpoint; 0 without one.
        start: Seconds up to its first step; None where that was not waited for.
    """

    aim: str
    hit: str
    logged: int
    saved: int
    start: float | None


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
    with tempfile.TemporaryDirectory() as home, inside(Path(home)):
        return kill_ranks() if ranks else kill_one(kills, steps, random.Random(seed))


def kill_one(kills: int, steps: int, draw: random.Random) -> int:
    """The first part, in the present folder."""
    line = [*SMOKE, f"trainer.max_steps={steps}"]
    if code := live([*line, "name=whole"]).wait():
        return code
    again = [*line, "name=killed", "resume=auto"]
    print("| kill | aimed at | fell into | last step logged | goes on from |\n|--|--|--|--|--|")
    inside_writes, start = 0, 1.0
    for number in range(1, kills + 1):
        done = kill(again, MOMENTS[number % len(MOMENTS)], draw, start)
        start = done.start or start
        inside_writes += done.hit == "write"
        print(f"| {number} | {done.aim} | {done.hit} | {done.logged} | {done.saved} |", flush=True)
    code = live(again).wait()
    whole, killed = losses("whole"), losses("killed")
    apart = [step for step in whole if whole[step] != killed.get(step)]
    print(
        f"\n{kills} kills, {inside_writes} of them inside a write. The last life ended with code "
        f"{code}. Against the undisturbed run: {len(killed)} of {steps} losses logged, "
        f"{len(apart)} differ{f' from step {apart[0]} on' if apart else ''}; largest difference of "
        f"a loss {furthest(whole, killed):.1e}, weights "
        f"{'equal to the last bit' if same_weights('whole', 'killed') else 'not equal'}"
    )
    return 0 if code == 0 and whole.keys() == killed.keys() and not apart else 1


def kill(line: list[str], aim: str, draw: random.Random, start: float) -> Kill:
    """One life and its end; a run that finishes before leaves nothing to kill.

    Args:
        line: The command.
        aim: When to kill: while it starts, between two steps, or while it writes.
        draw: Of the moment.
        start: Seconds that an earlier life took up to its first step.
    """
    folder = Path("runs/killed")
    before, begun = max(losses("killed"), default=0), time.monotonic()
    one, started = live(line), None
    if aim == "start":
        time.sleep(draw.uniform(0, start))
    else:
        until(lambda: not one.alive() or max(losses("killed"), default=0) > before, one)
        started = time.monotonic() - begun
        goal = before + draw.randint(1, 4)
        until(lambda: not one.alive() or max(losses("killed"), default=0) >= goal, one)
        if aim == "write":
            until(lambda: not one.alive() or writing(folder), one, every=0.0)
            time.sleep(draw.uniform(0, 0.03))
        else:
            time.sleep(draw.uniform(0, 0.1))
    one.send(signal.SIGKILL)
    if one.wait() != -signal.SIGKILL:
        raise SystemExit(f"ended by itself with {one.code}: {one.said()}; give more steps")
    logged = max(losses("killed"), default=0)
    early = logged <= before  # a file left by the life before may still lie there
    hit = "start" if early else "write" if writing(folder) else "step"
    return Kill(aim, hit, logged, saved_step("killed"), started)


def writing(folder: Path) -> bool:
    """Whether a checkpoint is half-written, or between its names."""
    aside = next(folder.glob(f".{CHECKPOINT}.*"), None) or next(folder.glob(f".{WEIGHTS}.*"), None)
    return aside is not None


def furthest(whole: dict[int, float], killed: dict[int, float]) -> float:
    """Largest relative difference of two losses of one step."""
    return max(abs(killed.get(step, float("inf")) / loss - 1) for step, loss in whole.items())


def same_weights(*names: str) -> bool:
    """Whether two runs ended with equal weights; the files may name their metadata in any order."""
    first, second = (load_file(Path("runs") / name / WEIGHTS) for name in names)
    return first.keys() == second.keys() and all(
        np.array_equal(value, second[name]) for name, value in first.items()
    )


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    sys.exit(call(kill_test, sys.argv[1:]))
