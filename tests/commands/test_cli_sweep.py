"""Sweeps: every job is checked before the first, has a name and processes of its own."""

import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands.cli import Command, jobs, run


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], DictConfig]]:
    """Jobs that were started; a job with seed 1 fails."""
    calls: list[tuple[list[str], DictConfig]] = []

    def record(cfg: DictConfig) -> None:
        calls.append((list(sys.argv), cfg))
        if cfg.seed == 1:
            raise ValueError("seed 1 is bad")

    monkeypatch.setattr(Command, "function", lambda self: record)
    monkeypatch.setattr(sys, "argv", ["prog"])
    monkeypatch.chdir(tmp_path)
    return calls


def test_each_job_has_its_own_values_and_command_line(
    started: list[tuple[list[str], DictConfig]], tmp_path: Path
) -> None:
    """Would catch a child process that repeats the whole sweep (it would see -m)."""
    assert run(COMMANDS, ["train", "-m", "+exp=smoke", "seed=2,3"]) == 0
    assert [(cfg.name, cfg.seed) for _, cfg in started] == [("smoke_2", 2), ("smoke_3", 3)]
    for argv, cfg in list(started):
        assert "-m" not in argv
        assert run(COMMANDS, argv[1:]) == 0
        assert started[-1][1] == cfg
    assert sys.argv[0] == "prog"
    assert not (tmp_path / "multirun").exists()


def test_a_failed_job_does_not_stop_the_others(
    started: list[tuple[list[str], DictConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch a night's sweep that ends with its second job, or an exit code of 0."""
    assert run(COMMANDS, ["train", "-m", "seed=0,1,2", "name=a_${seed}"]) == 1
    assert [cfg.seed for _, cfg in started] == [0, 1, 2]
    assert "seed 1 is bad" in capsys.readouterr().err


def test_lists_ranges_and_globs_are_expanded() -> None:
    """Would catch jobs that Hydra runs and the check never saw."""
    line = ["seed=range(0,3)", "trainer=cpu,gpu", "name=a"]
    assert len(jobs("train", line)) == 6
    rows = jobs("train", ["+exp/maps=glob(*)", "seed=0"])
    assert [job[0] for job in rows][-1] == "+exp/maps=uniform"
    assert all(job[1] == "seed=0" for job in rows)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seed=0,1 name=a", "2 jobs of the sweep are called a"),
        ("name=a,b objective=global_only,globl", "there is no globl"),
        ("name=a,b +optim.typo=1", "takes no typo"),
        ("name=a,b trainer=ddp_sim", "trainer.devices=2"),
        ("name=a,b trainer.num_nodes=2", "trainer.num_nodes=2"),
        ("name=a,b trainer.devices=-1", "start the jobs one by one"),
        ("name=a,b trainer=ddp hydra/launcher=joblib", "hydra/launcher=joblib"),
    ],
)
def test_a_sweep_that_cannot_work_does_not_begin(
    started: list[tuple[list[str], DictConfig]],
    capsys: pytest.CaptureFixture[str],
    line: str,
    words: str,
) -> None:
    """Would catch a mistake in the last job that shows after hours, or children of a sweep."""
    assert run(COMMANDS, ["train", "-m", *line.split()]) == 2
    assert words in capsys.readouterr().err
    assert not started
