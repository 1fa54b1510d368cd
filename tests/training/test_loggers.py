"""Metrics reach their files, whatever else goes wrong."""

import csv
import json
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import wandb

from gradeclip_ft.training import loggers
from gradeclip_ft.training.loggers import FileLogger, files_and_wandb, read_lines


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


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
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


def test_a_resumed_run_finds_its_identifier_again(tmp_path, monkeypatch) -> None:
    started = []
    monkeypatch.setattr(
        loggers, "_start_wandb", lambda settings: (started.append(settings), Mock())[1]
    )
    for _ in range(2):
        _, logger = files_and_wandb(tmp_path / "run", {}, mode="offline")
        logger.log_metrics({}, step=1)
    assert started[0]["id"] == started[1]["id"]


class BrokenRun:
    """A tracker without a network."""

    def log(self, metrics: dict) -> None:
        raise ConnectionError("no route to host")


def test_a_failing_tracker_is_reported_once_and_stops_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loggers, "_start_wandb", lambda settings: BrokenRun())
    files, tracker = files_and_wandb(tmp_path / "run", {})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in (1, 2):
            files.log_metrics({"loss": 1.0}, step=step)
            tracker.log_metrics({"loss": 1.0}, step=step)
        tracker.finalize("success")
    (warning,) = seen
    assert "no route to host" in str(warning.message)
    assert "logger.mode=offline" in str(warning.message)
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_a_missing_tracker_stops_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pip install 'gradeclip_ft\[wandb\]'"):
        (only,) = files_and_wandb(tmp_path, {})
    assert isinstance(only, FileLogger)


def test_what_a_tracker_says_in_failing_shows_no_key(tmp_path, monkeypatch) -> None:
    def refuse(settings: dict) -> None:
        raise ConnectionError("api_key=0123456789 refused by https://me:word@host")

    monkeypatch.setattr(loggers, "_start_wandb", refuse)
    _, tracker = files_and_wandb(tmp_path / "run", {})
    with pytest.warns(UserWarning, match="refused by") as seen:
        tracker.log_metrics({"loss": 1.0}, step=1)
    assert "0123456789" not in str(seen[0].message)
    assert "word" not in str(seen[0].message)
