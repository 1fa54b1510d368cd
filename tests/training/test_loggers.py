"""Metrics reach their files, whatever else goes wrong."""

import csv
import json
from pathlib import Path

import pytest
import wandb

from gradeclip_ft.training.loggers import FileLogger, files_and_wandb
from gradeclip_ft.training.run_files import read_lines


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_metric_that_comes_later_gets_its_column(tmp_path) -> None:
    """Evaluations bring other metrics than steps; a fixed header would drop or shift them."""
    logger = FileLogger(tmp_path)
    logger.log_metrics({"boxes/top1": 0.1}, step=0)
    logger.log_metrics({"loss": 2.0}, step=1)
    logger.log_metrics({"loss": 1.5, "boxes/top1": 0.2}, step=2)
    assert table(tmp_path) == [
        {"step": "0", "boxes/top1": "0.1", "loss": ""},
        {"step": "1", "boxes/top1": "", "loss": "2.0"},
        {"step": "2", "boxes/top1": "0.2", "loss": "1.5"},
    ]


def test_lines_are_valid_json_also_where_a_number_is_not_finite(tmp_path) -> None:
    logger = FileLogger(tmp_path)
    logger.log_metrics({"loss": float("nan"), "rate": float("inf")}, step=1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "rate": None}


@pytest.mark.parametrize("ended", [False, True])
def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path, ended) -> None:
    text = '{"step": 1, "loss": 2.0}\n{"step": 2, "lo' + ("\n" if ended else "")
    (tmp_path / "metrics.jsonl").write_text(text)
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_a_long_run_does_not_rewrite_its_table(tmp_path, monkeypatch) -> None:
    """The cost of a line must not grow with the run."""
    logger = FileLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, step=1)
    monkeypatch.setattr(logger, "_rewrite_table", lambda: pytest.fail("rewritten"))
    for step in range(2, 5):
        logger.log_metrics({"loss": 1.0}, step=step)
    assert [row["step"] for row in table(tmp_path)] == ["1", "2", "3", "4"]


def test_wandb_offline_gets_every_line_and_ends_with_its_job(tmp_path) -> None:
    """H2: without finish() the second job of a sweep logs into the first one's run."""
    identifiers = []
    for name in ("first", "second"):
        _, logger = files_and_wandb(tmp_path / name, {"seed": 0}, mode="offline")
        logger.log_metrics({"loss": 1.0}, step=1)
        identifiers.append(wandb.run.id)
        assert wandb.run.name == name
        logger.finalize("success")
        assert wandb.run is None
        assert list((tmp_path / name / "wandb").glob("offline-run-*/*.wandb"))
    assert identifiers[0] != identifiers[1]


def test_a_resumed_run_finds_its_identifier_again(tmp_path) -> None:
    first, second = (files_and_wandb(tmp_path / "run", {})[1].version for _ in range(2))
    assert first == second != files_and_wandb(tmp_path / "other", {})[1].version


@pytest.mark.parametrize(("option", "files"), [(None, 1), ("disabled", 0)])
def test_the_environment_decides_where_the_option_does_not(
    tmp_path, monkeypatch, option, files
) -> None:
    """WANDB_MODE=offline on a machine without a network; a default of `online` overruled it."""
    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, logger = files_and_wandb(tmp_path, {}, mode=option)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.finalize("success")
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == files


def refuse(**settings: object) -> None:
    raise ConnectionError("api_key=0123456789 refused by https://me:word@host")


class BrokenRun:
    """A tracker that loses its network after it started."""

    def log(self, metrics: dict) -> None:
        raise ConnectionError("no route to host")

    finish = log


@pytest.mark.parametrize(
    ("init", "words"), [(refuse, "refused by"), (lambda **_: BrokenRun(), "no route to host")]
)
def test_a_failing_tracker_is_reported_once_and_stops_nothing(
    small_run, monkeypatch, init, words
) -> None:
    """Its own words are shown without keys and passwords."""
    monkeypatch.setattr(wandb, "init", init)
    run = small_run()
    with pytest.warns(UserWarning, match="Biases") as seen:
        run.train(loggers=files_and_wandb(run.folder, {}), max_steps=3)
    (said,) = (str(one.message) for one in seen if "Biases" in str(one.message))
    assert words in said
    assert "WANDB_MODE=offline" in said
    assert "0123456789" not in said
    assert "word@" not in said
    assert list(run.losses) == [1, 2, 3]
