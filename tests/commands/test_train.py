"""`train` from the command line, on the experiment `smoke`."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands import runs
from gradeclip_ft.commands.cli import run
from gradeclip_ft.training.callbacks import MetricsRecorder
from gradeclip_ft.training.module import FineTuneModule
from gradeclip_ft.training.run_files import read_lines

SMOKE = ("train", "+exp=smoke", "data.workers=0")
QUIET = ("evaluation.before=false", "evaluation.after=false")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory whose shapes world is made by the first run."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def train(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `train +exp=smoke` with overrides; the exit code."""
    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.argv", ["gradeclip_ft"])
    return lambda *overrides: run(COMMANDS, [*SMOKE, *overrides])


@pytest.fixture(scope="module")
def origin(home: Path) -> Path:
    """A finished run called `origin`, which no test changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr("sys.argv", ["gradeclip_ft"])
        assert run(COMMANDS, [*SMOKE, "name=origin", *QUIET]) == 0
    return home / "runs" / "origin"


def losses(folder: Path) -> dict[int, float]:
    lines = read_lines(folder / "metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_leaves_the_files_that_others_rely_on(train, home, capsys) -> None:
    """The names of the interface, and what stands in them."""
    assert train("name=whole") == 0
    folder = home / "runs" / "whole"
    files = {path.name for path in folder.iterdir()}
    assert files == {
        *(".lock", "config.yaml", "environment.json", "evaluations", "metrics.csv"),
        *("metrics.jsonl", "last.ckpt", "step-00000002.ckpt", "weights.safetensors"),
    }
    assert {path.name for path in (folder / "evaluations").iterdir()} == {
        f"shapes_{what}@{step}.json" for what in ("regions", "retrieval") for step in (0, 4)
    }
    result = json.loads((folder / "evaluations" / "shapes_regions@4.json").read_text())
    assert {"metrics", "protocol", "data", "weights", "versions"} <= result.keys()
    assert result["run"] == "whole"
    assert "train +exp=smoke" in result["command"]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["data"]["tagger"] == "textblob"
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["loss"]] == ["1", "2", "3", "4"]
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("shapes_regions/boxes/top1", "before", "after"))


def test_an_existing_run_is_never_overwritten(train, origin, capsys) -> None:
    before = (origin / "last.ckpt").read_bytes()
    assert train("name=origin", *QUIET) == 1
    assert "already holds a run; continue it with resume=auto" in capsys.readouterr().err
    assert (origin / "last.ckpt").read_bytes() == before


def test_two_halves_give_the_losses_of_the_whole(train, home) -> None:
    """4 + 4 steps equal 8, in the middle of an epoch of 3 batches, with the real data."""
    eight = ("trainer.max_steps=8", "data.samples_per_epoch=48", *QUIET)
    assert train("name=eight", *eight) == 0
    assert train("name=halves", *eight, "trainer.stop_at=4") == 0
    assert train("name=halves", *eight, "resume=auto") == 0
    assert list(losses(home / "runs" / "halves")) == list(range(1, 9))
    # Equal to the last bit with one thread; several threads may add in another order.
    expected = pytest.approx(losses(home / "runs" / "eight"), rel=1e-5)
    assert losses(home / "runs" / "halves") == expected


def test_a_resumed_run_that_missed_its_last_evaluation_makes_it_up(train, home, capsys) -> None:
    """A crash in the evaluation after training must not cost the result."""
    assert train("name=missed", *QUIET) == 0
    capsys.readouterr()
    again = ("resume=auto", "evaluation.before=false", "evaluator=shapes_retrieval")
    assert train("name=missed", *again) == 0
    assert (home / "runs" / "missed" / "evaluations" / "shapes_retrieval@4.json").exists()
    assert "step 4/4" not in capsys.readouterr().out


def test_init_from_takes_the_weights_of_a_run_and_nothing_else(train, home, origin) -> None:
    assert train("name=next", "init_from=origin", "optim.optimizer.lr=0.0", *QUIET) == 0
    before, after = (
        load_file(folder / "weights.safetensors") for folder in (origin, home / "runs" / "next")
    )
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert read_lines(home / "runs" / "next" / "metrics.jsonl")[0]["step"] == 1


def test_one_step_of_an_experiment_to_see_whether_it_fits(train, home) -> None:
    """The experiment is laid over the option and must not undo it."""
    assert train("name=fits", "debug=one_step") == 0
    assert list(losses(home / "runs" / "fits")) == [1]
    assert not (home / "runs" / "fits" / "evaluations").exists()


def test_a_start_that_fails_leaves_no_run_behind(train, home, capsys) -> None:
    """Else the name is taken, and a second try with the mistake corrected is refused."""
    assert train("name=typo", "model.weights=/nowhere.pt") == 1
    assert "does not exist" in capsys.readouterr().err
    assert not (home / "runs" / "typo").exists()


def test_what_a_first_step_that_failed_left_stays(train, home, origin, capsys, monkeypatch) -> None:
    """Would catch a message that names samples in a file that is removed with the folder."""
    step = FineTuneModule.training_step

    def broken(*args, **named):
        found = step(*args, **named)
        return {**found, "loss": found["loss"] * float("nan")}

    monkeypatch.setattr(FineTuneModule, "training_step", broken)
    stop = ("name=evidence", "trainer.max_non_finite=0", *QUIET)
    assert train(*stop) == 1
    assert (home / "runs" / "evidence" / "non_finite.jsonl").read_text()
    monkeypatch.setattr(FineTuneModule, "training_step", step)
    assert train(*stop) == 1
    assert "continue it with resume=auto" in capsys.readouterr().err
    assert train(*stop, "resume=auto") == 0
    assert losses(home / "runs" / "evidence") == losses(origin)


def test_a_job_that_is_refused_leaves_the_folder_of_the_other(train, home, monkeypatch) -> None:
    """Two jobs of one name start at once: the second sees no folder, and then finds one."""

    def late(folder: Path, *args: object, **options: object) -> str:
        if folder.is_dir():  # at the second look, when the folder is claimed
            (folder / "config.yaml").write_text("of the other")
        return "begins"

    monkeypatch.setattr(runs, "would_begin_or_continue", late)
    assert train("name=race", *QUIET) == 1
    assert (home / "runs" / "race" / "config.yaml").read_text() == "of the other"


def test_a_loss_that_is_not_finite_ends_the_run_with_a_message(train, home, capsys) -> None:
    steep = ("name=broken", "optim.optimizer.lr=1e30", "trainer.max_non_finite=0")
    assert train(*steep, "trainer.gradient_clip=null", *QUIET) == 1
    message = capsys.readouterr().err
    assert "is not finite, training stopped before the update" in message
    assert "last good checkpoint: runs/broken/last.ckpt" in message
    assert "Traceback" not in message
    saved = load_file(home / "runs" / "broken" / "weights.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


def test_a_terminated_run_says_how_to_go_on(train, home, capsys, monkeypatch) -> None:
    """A cluster that takes the node away must not read an exit code of 0."""
    record = MetricsRecorder.on_train_batch_end

    def terminate(self, trainer, *rest) -> None:
        record(self, trainer, *rest)
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsRecorder, "on_train_batch_end", terminate)
    with pytest.raises(SystemExit) as ended:
        train("name=terminated", *QUIET)
    assert ended.value.code == 143
    assert "interrupted after step 3; continue with resume=auto" in capsys.readouterr().out
    monkeypatch.setattr(MetricsRecorder, "on_train_batch_end", record)
    assert train("name=terminated", "resume=auto", *QUIET) == 0
    assert list(losses(home / "runs" / "terminated")) == [1, 2, 3, 4]


def test_ctrl_c_ends_with_the_code_that_shells_expect(train, monkeypatch) -> None:
    """Lightning turns it into an exit code of 1."""

    def interrupt(self, trainer, *rest) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MetricsRecorder, "on_train_batch_end", interrupt)
    with pytest.raises(SystemExit) as ended:
        train("name=interrupted", *QUIET)
    assert ended.value.code == 130


@pytest.mark.slow
def test_jobs_of_a_sweep_may_run_side_by_side(tmp_path: Path) -> None:
    """Each in a process of its own, as typed: a run per job, other losses for another seed."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    line = "train -m +exp=smoke seed=0,1 name=s_${seed} evaluator=[] hydra/launcher=joblib"
    done = subprocess.run(
        [sys.executable, "-m", "gradeclip_ft", *line.split(), "hydra.launcher.n_jobs=2"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, second = (losses(tmp_path / "runs" / f"s_{seed}") for seed in (0, 1))
    assert first.keys() == second.keys() == {1, 2, 3, 4}
    assert first[4] != second[4]
    assert (tmp_path / "runs" / "s_1" / "weights.safetensors").is_file()
