"""One row per method: columns of every set of weights, in their units."""

import json
import re
from pathlib import Path

import pytest

from gradeclip_ft.commands.compare import compare
from gradeclip_ft.results.record import Result, written


def result(folder: Path, metrics: dict[str, float], step: int, name: str = "pointing") -> None:
    Result(
        evaluator=name,
        metrics=metrics,
        protocol={"image_size": 64},
        data={"hash": "abc", "counts": {"images": 5}},
        weights={"name": "tiny", "hash": str(step)},
        versions={},
        run="try",
        step=step,
    ).write(folder / "evaluations")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose maps were measured before and after, and its regions in between."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "try"
    result(run, {"chance/pointing": 0.1, "a/pointing": 0.25, "a/energy": 0.2}, 0)
    after = {"chance/pointing": 0.1, "a/pointing": 0.5, "a/energy": 0.3, "b/pointing": 0.4}
    result(run, after, 7)
    result(run, {"boxes/top1": 0.3}, 3, "regions")
    return tmp_path


def test_methods_are_rows_and_weights_columns(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(
        "runs/try",
        rows="methods",
        format="csv",
        steps="all",
        metrics=("*/pointing", "*/energy"),
        out="results/methods",
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "method,tiny/pointing,try/pointing,tiny/energy,try/energy,differs",
        "chance,0.1,0.1,,,",
        "a,0.25,0.5,0.2,0.3,",
        "b,,0.4,,,",
    ]
    text = (home / "results" / "methods.md").read_text()
    assert "| a | 25.0 | 50.0 | 20.0 | 30.0 |" in text
    assert "rows=methods" in text
    assert "Metrics in percent." in text
    rows = json.loads((home / "results" / "methods.json").read_text())
    assert [row["a/pointing"] for row in rows if row.get("a/pointing")] == [0.25, 0.5]


def test_weights_of_one_name_are_told_apart_by_their_step(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result(home / "runs" / "try", {"a/pointing": 0.3}, 4)
    compare("runs/try", rows="methods", steps="all", metrics=("a/pointing",))
    header = capsys.readouterr().out.splitlines()[0]
    assert re.split(r" {2,}", header) == [
        "method",
        "tiny/pointing",
        "try step 4/pointing",
        "try step 7/pointing",
    ]


def test_seconds_and_multiples_are_no_percentages(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = home / "runs" / "times"
    result(run, {"rise/seconds": 6.2376, "rise/times_encode_image": 533.14}, 0, "timing")
    compare("runs/times", rows="methods", metrics=("rise/*",), out="results/times")
    shown = capsys.readouterr().out
    assert "6.2376" in shown
    assert "533.14" in shown
    assert "Metrics in seconds" in (home / "results" / "times.md").read_text()
    assert written("boxes/top1", 0.4142) == "41.4"


def test_a_table_without_methods_is_refused(home: Path) -> None:
    result(home / "runs" / "plain", {"mean": 0.3}, 0, "choice")
    with pytest.raises(ValueError, match="no metric of a method among mean"):
        compare("runs/plain", rows="methods", metrics=("mean",))
