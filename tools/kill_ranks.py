"""Two processes of one job, of which one is killed or gets a signal; part of `tools.kill_test`."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass

from tools.lives import SMOKE, Life, losses, saved_step, two_ranks, until

STEPS = 24
LINE = (*SMOKE, "trainer=ddp_sim", f"trainer.max_steps={STEPS}")
# Process, signal, and whether SLURM has started both instead of torchrun.
ACTS = (
    (1, signal.SIGKILL, False),
    (0, signal.SIGKILL, False),
    (1, signal.SIGTERM, False),
    (0, signal.SIGUSR1, True),
)


@dataclass(frozen=True)
class End:
    """What became of a job.

    Attributes:
        codes: Exit code of each process.
        seconds: From the signal to the end of the last process.
        at: Step in the metrics when the signal was sent.
        saved: Step of the newest good checkpoint afterwards.
        said: Last line of a process that was not killed.
    """

    codes: tuple[int, ...]
    seconds: float
    at: int
    saved: int
    said: str


def kill_ranks() -> int:
    """Each act on a job of its own, then `resume=auto`; prints a table.

    Returns:
        0 if every job ended and went on to the losses of an undisturbed one.
    """
    if any(one.wait() for one in two_ranks([*LINE, "name=whole"])):
        return 1
    lost = 0
    print("| sent to | started by | ended | codes | step then, saved | resume=auto | said |")
    print("|--|--|--|--|--|--|--|")
    for rank, number, slurm in ACTS:
        name = f"{number.name}_{rank}"
        end = act(rank, number, name, slurm=slurm)
        again = two_ranks([*LINE, f"name={name}", "resume=auto"], slurm=slurm)
        codes = [one.wait() for one in again]
        same = codes == [0, 0] and losses(name) == losses("whole")
        lost += not same
        print(
            f"| {rank}: {number.name} | {'srun' if slurm else 'torchrun'} | {end.seconds:.1f} s | "
            f"{', '.join(map(str, end.codes))} | {end.at}, {end.saved} | "
            f"{'the same losses' if same else 'OTHER LOSSES'} | {end.said} |",
            flush=True,
        )
    return 1 if lost else 0


def act(rank: int, number: signal.Signals, name: str, *, slurm: bool) -> End:
    """A job that loses a process, or gets a signal in one, behind some step."""
    job = two_ranks([*LINE, f"name={name}"], slurm=slurm)
    until(lambda: max(losses(name), default=0) >= 5 or not all(map(Life.alive, job)), *job)
    at, begun = max(losses(name), default=0), time.monotonic()
    job[rank].send(number)
    codes = tuple(one.wait() for one in job)
    seconds = time.monotonic() - begun
    witness = job[0] if codes[0] != -number else job[1]
    return End(codes, seconds, at, saved_step(name), witness.said())
