"""Runs on disk to table, curves and words; every number is written here by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from gradeclip_ft.commands import report as command
from gradeclip_ft.commands.report import introduction, read_runs, report, same_settings
from gradeclip_ft.results.record import Result

ORDINARY = {"_target_": "gradeclip_ft.objectives.global_only.GlobalOnly"}
GRAD_ECLIP = {
    "_target_": "gradeclip_ft.objectives.global_local.GlobalLocal",
    "explainer": {"_target_": "gradeclip_ft.explain.grad_eclip.GradEclip", "create_graph": False},
    "local_weight": 0.5,
}
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run's folder with evaluations at the given steps."""

    def make(
        name: str,
        objective: Mapping[str, Any],
        boxes: Mapping[int, float],
        *,
        start: str = "start",
        settings: Mapping[str, Any] = {"trainer": {"max_steps": 20}, "seed": 3},
        protocol: Mapping[str, Any] = {"classes": 64},
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        config = {"name": name, "model": {"name": "tiny"}, "objective": dict(objective), **settings}
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
        lines = [{"step": 1, "global": 4.0, "local": 2.0}, {"step": 2, "global": None}]
        if "explainer" not in objective:
            del lines[0]["local"]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "glo'
        (folder / "metrics.jsonl").write_text(text)
        environment = {
            "command": f"python -m gradeclip_ft train name={name}",
            "data": {"tagger": "nltk"},
        }
        (folder / "environment.json").write_text(json.dumps(environment))
        for step, value in boxes.items():
            Result(
                evaluator="shapes_regions",
                metrics={"boxes/top1": value, "stuff_boxes/top1": 0.5},
                protocol=dict(protocol),
                data={"hash": "d"},
                weights={"name": "tiny", "hash": name if step else start},
                versions={},
                run=name,
                step=step,
            ).write(folder / "evaluations")
        return folder

    return make


@pytest.fixture
def pair(make_run: MakeRun) -> list[Path]:
    return [
        make_run("a", ORDINARY, {0: 0.1, 20: 0.125}),
        make_run("b", GRAD_ECLIP, {0: 0.1, 10: 0.4, 20: 0.672}),
    ]


def test_curves_begin_at_the_untouched_model_and_leave_out_what_is_missing(
    pair: list[Path],
) -> None:
    """Catches null values (non-finite losses), half a last line, and curves without their start."""
    found = {chart.title: chart for chart in command.charts(read_runs(pair))}
    assert set(found) == {"Global loss (nats)", "Local loss", "Boxes, top-1"}
    assert found["Global loss (nats)"].series["Ordinary"] == [(1.0, 4.0)]
    assert found["Local loss"].series == {"Ordinary": [], "Grad-ECLIP": [(1.0, 2.0)]}
    boxes = found["Boxes, top-1"]
    assert boxes.series["Grad-ECLIP"] == [(0.0, 0.1), (10.0, 0.4), (20.0, 0.672)]
    assert boxes.series["Ordinary"] == [(0.0, 0.1), (20.0, 0.125)]
    assert boxes.percent


def test_two_runs_of_one_kind_carry_their_names(make_run: MakeRun) -> None:
    runs = [make_run(name, GRAD_ECLIP, {0: 0.1, 20: 0.5}) for name in ("x", "y")]
    assert read_runs(runs).methods == ["Untouched", "Grad-ECLIP (x)", "Grad-ECLIP (y)"]


def test_a_run_without_a_start_leaves_its_column_empty(make_run: MakeRun) -> None:
    """`evaluation.before=false` writes no step 0."""
    comparison = read_runs([make_run("a", ORDINARY, {20: 0.3})])
    table = command.results_table(comparison)
    assert table.rows[0].get("Untouched") is None
    assert table.rows[0]["Ordinary"] == 0.3
    assert comparison.contrast is None


def test_other_protocols_are_named(make_run: MakeRun) -> None:
    """Catches numbers over 64 and over 80 classes set side by side without a word."""
    runs = [
        make_run("a", ORDINARY, {0: 0.1, 20: 0.2}),
        make_run("b", GRAD_ECLIP, {20: 0.3}, protocol={"classes": 80}),
    ]
    assert command.results_table(read_runs(runs)).notes == (
        "Not comparable: Grad-ECLIP, shapes_regions: classes 80 instead of 64.",
    )


def test_the_introduction_claims_equal_settings_only_where_they_are_equal(
    pair: list[Path], make_run: MakeRun
) -> None:
    comparison = read_runs(pair)
    assert same_settings(comparison)
    assert "seed and optimiser are the same" in introduction(comparison)
    longer = make_run(
        "c", GRAD_ECLIP, {20: 0.7}, settings={"trainer": {"max_steps": 40}, "seed": 3}
    )
    other = read_runs([pair[0], longer])
    assert not same_settings(other)
    assert "are the same" not in introduction(other)


def test_runs_from_different_starts_or_without_an_end_are_refused(make_run: MakeRun) -> None:
    """Catches "before" maps of one model beside "after" maps of another."""
    runs = [
        make_run("a", ORDINARY, {0: 0.1, 20: 0.2}),
        make_run("b", GRAD_ECLIP, {0: 0.2, 20: 0.3}, start="elsewhere"),
    ]
    with pytest.raises(ValueError, match="2 different weights"):
        read_runs(runs)
    with pytest.raises(FileNotFoundError, match=r"no evaluation after step 0; .*resume=auto"):
        read_runs([make_run("c", ORDINARY, {0: 0.1})])
    with pytest.raises(FileNotFoundError, match="no run in"):
        read_runs([runs[0].parent / "nothing"])


def test_a_page_without_pictures_needs_no_weights(
    pair: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last evaluation of each run; the last line printed is the page, for scripts."""
    report(*map(str, pair), scenes=0)
    printed = capsys.readouterr().out.splitlines()
    cells = [re.split(r" {2,}", line) for line in printed]
    names = ["per cent", "Untouched", "Ordinary", "Grad-ECLIP", "Grad-ECLIP - Ordinary"]
    assert cells[0] == names
    assert cells[2] == ["Boxes, top-1", "10.0", "12.5", "67.2", "+54.7"]
    assert printed[-1] == str(pair[1] / "report.html")
    html = Path(printed[-1]).read_text(encoding="utf-8")
    assert "<dt>objective.local_weight</dt><dd>0.5</dd>" in html
    assert "tiny before and after fine-tuning" in html
    assert "67.2" in html
    assert 'id="cases"' not in html


def test_an_explainer_can_be_chosen_by_its_name_in_conf() -> None:
    settings = command.map_settings(command.Comparison((), None), "maskclip")
    assert settings["_target_"] == "gradeclip_ft.explain.maskclip.MaskClip"
    with pytest.raises(ValueError, match=r"explainer=maskclp: did you mean maskclip"):
        command.map_settings(command.Comparison((), None), "maskclp")


@pytest.mark.parametrize(
    ("runs", "scenes", "message"), [((), 1, "no run"), (("a",), -1, "scenes=-1")]
)
def test_senseless_arguments_are_refused(runs: tuple[str, ...], scenes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report(*runs, scenes=scenes)
