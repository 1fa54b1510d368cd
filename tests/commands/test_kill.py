"""Killed runs and signalled jobs, by the tools whose output docs/scale.md shows, in short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
# Two tasks of SLURM, of which only the second gets a signal.
SIGNALLED = """
import dataclasses, json, os, signal, sys
from tools.kill_ranks import act
os.chdir(sys.argv[1])
end = act(1, signal.SIGUSR1, "signalled", slurm=True)
print(json.dumps(dataclasses.asdict(end)))
"""


def python(*arguments: str) -> str:
    """What a program of the repository prints; it must end well."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=390
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_killed_run_ends_as_if_it_had_not_been() -> None:
    """Also killed while a checkpoint is written: the losses are those of an undisturbed run."""
    printed = python("-m", "tools.kill_test", "kills=2", "steps=14", "seed=1")
    assert "14 of 14 losses logged, 0 differ" in printed


@pytest.mark.ddp
def test_a_signal_to_one_process_ends_both_behind_the_same_step(tmp_path) -> None:
    """Would catch a process that waits for one that has left, or a step that is lost."""
    end = json.loads(python("-c", SIGNALLED, str(tmp_path)))
    assert end["codes"] == [143, 143]
    assert end["seconds"] < 60
    assert end["at"] <= end["saved"] <= end["at"] + 2  # a step may be finished, not yet logged
    assert end["said"] == f"interrupted behind step {end['saved']}; resume=auto goes on"
