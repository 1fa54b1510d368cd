"""Killed runs and signalled jobs, by the tools whose output docs/scale.md shows, in short."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.ddp, pytest.mark.timeout(500)]
# One process for both, which imports the program and draws the shapes once. Of the two tasks of
# SLURM in the second part, only task 1 gets a signal.
BOTH = """
import json, random, signal
from tools.kill_test import act, kill_one
kill_one(2, 12, random.Random(1))
print(json.dumps(act(1, signal.SIGUSR1, "signalled", slurm=True)))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Lines of the kills, then the end of the signalled job."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", BOTH],
        cwd=tmp_path_factory.mktemp("lives"),
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=490,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


def test_a_killed_run_ends_as_if_it_had_not_been(printed: list[str]) -> None:
    """Also killed while a checkpoint is written: the losses are those of an undisturbed run."""
    assert "ended with code 0" in printed[-2]
    assert "12 of 12 losses logged, 0 differ" in printed[-2]
    assert printed[-2].endswith("weights equal to the last bit")


def test_a_signal_to_one_process_ends_both_behind_the_same_step(printed: list[str]) -> None:
    """Would catch a process that waits for one that has left, or a step that is lost."""
    end = json.loads(printed[-1])
    assert end["codes"] == [143, 143]
    assert end["seconds"] < 120  # 3 on an idle machine
    assert end["at"] <= end["saved"] <= end["at"] + 2  # a step may be finished, not yet logged
    assert end["said"] == f"interrupted after step {end['saved']}; continue with resume=auto"
