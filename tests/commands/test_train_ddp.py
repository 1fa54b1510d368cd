"""Two processes, started as on a machine with two GPUs: through `python -m`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradeclip_ft.training.loggers import read_lines

PATIENCE = 500  # seconds; the work itself takes 25 on an idle machine
pytestmark = [pytest.mark.ddp, pytest.mark.slow, pytest.mark.timeout(PATIENCE + 60)]


def python_m(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it; killed with all it started if it hangs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gradeclip_ft", *arguments],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        pytest.fail(f"no end after {PATIENCE} s\n{out}\n{err}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_two_processes_train_evaluate_and_write_once(tmp_path) -> None:
    """A2, A6, H1: lost sub-command, two writers; an evaluator that waits for the other process."""
    command = ("train", "+exp=smoke", "name=two", "trainer=ddp_sim", "trainer.max_steps=2")
    done = python_m(tmp_path, *command, "logger=wandb", "logger.mode=offline")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "two"
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(line["samples_per_second"] > 0 for line in lines if "loss" in line)
    assert len(json.loads((folder / "environment.json").read_text())["starts"]) == 1
    assert {path.name for path in (folder / "evaluations").iterdir()} == {
        f"shapes_{what}@{step}.json" for what in ("regions", "retrieval") for step in (0, 2)
    }
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    assert (folder / "weights.safetensors").exists()
