"""Two processes of one job, however they are started: one run, written by the first alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gradeclip_ft.training.run_files import read_lines

PATIENCE = 500  # seconds; the work itself takes 25 on an idle machine
pytestmark = [pytest.mark.ddp, pytest.mark.slow, pytest.mark.timeout(PATIENCE + 60)]
SMOKE = ("-m", "gradeclip_ft", "train", "+exp=smoke", "trainer=ddp_sim")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# Python runs this at its start; every opening for writing, renaming and removing below runs/ is
# noted with the rank of the process.
WATCH = """
import os, sys
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
BEFORE, RUNS = os.environ["WRITERS"], os.path.abspath("runs") + os.sep
def note(event, given):
    if event == "open" and not (given[2] or 0) & WRITES:
        return
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
        path = given[0] if isinstance(given[0], (str, os.PathLike)) else ""
        if (os.path.abspath(path) + os.sep).startswith(RUNS):
            rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
            handle = os.open(BEFORE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, (rank + "\\n").encode())
            os.close(handle)
sys.addaudithook(note)
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[[Sequence[str]], subprocess.CompletedProcess[str]]:
    """Python with some arguments, watched; killed with all it started if it hangs."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)

    def start(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WRITERS": str(tmp_path / "writers"),
            "PYTHONPATH": os.pathsep.join(
                [str(tmp_path / "watch"), os.environ.get("PYTHONPATH", "")]
            ),
        }
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=tmp_path,
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

    return start


def assert_one_run(home: Path, name: str, steps: int) -> Path:
    """Every step once, one start, nothing written by the second process."""
    assert [path.name for path in (home / "runs").iterdir()] == [name]
    folder = home / "runs" / name
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert all(line["samples_per_second"] > 0 for line in lines)
    assert len(json.loads((folder / "environment.json").read_text())["starts"]) == 1
    assert set((home / "writers").read_text().split()) == {"0"}
    assert (folder / "weights.safetensors").exists()
    return folder


def test_two_processes_train_evaluate_and_write_once(start, tmp_path) -> None:
    """A2, A6, H1: lost sub-command, two writers; an evaluator that waits for the other process."""
    done = start([*SMOKE, "name=two", "logger=wandb", "logger.mode=offline"])
    assert done.returncode == 0, done.stderr
    folder = assert_one_run(tmp_path, "two", steps=4)
    assert {path.name for path in (folder / "evaluations").iterdir()} == {
        f"shapes_{what}@{step}.json" for what in ("regions", "retrieval") for step in (0, 4)
    }
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1


def test_torchrun_starts_the_processes_of_one_run(start, tmp_path) -> None:
    """A6: two processes that both take themselves for the first, or each train a run of its own."""
    quiet = ("evaluation.before=false", "evaluation.after=false")
    done = start([*TORCHRUN, *SMOKE, "name=torchrun", *quiet])
    assert done.returncode == 0, done.stderr
    assert_one_run(tmp_path, "torchrun", steps=4)
