"""Runs on disk to tables: rows, groups, marks, files."""

import csv
import io
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradeclip_ft.commands.compare import compare
from gradeclip_ft.results.collect import collect
from gradeclip_ft.results.record import Result
from gradeclip_ft.results.table import (
    Row,
    Table,
    grouped,
    metrics_table,
    render,
    select,
    tabulate,
)

GRAD_ECLIP = {
    "_target_": "gradeclip_ft.explain.grad_eclip.GradEclip",
    "heads": "one",
    "create_graph": True,
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a run: `write("name", top1, seed=0, explainer={...})`."""
    monkeypatch.chdir(tmp_path)

    def write(
        name: str,
        top1: float,
        *,
        seed: int = 0,
        explainer: dict[str, Any] | None = None,
        kind: str = "focal",
        size: int = 64,
        steps: tuple[int, ...] = (0, 300),
    ) -> Path:
        folder = tmp_path / "runs" / name
        for step in steps:
            regions, pairs = {"boxes/top1": top1 if step else 0.1}, {"text_retrieval_recall@1": 0.3}
            _result(name, "regions", regions, size, step).write(folder / "evaluations")
            _result(name, "pairs", pairs, size, step).write(folder / "evaluations")
        objective: dict[str, Any] = {"_target_": "gradeclip_ft.objectives.global_only.GlobalOnly"}
        if explainer is not None:
            objective = {"explainer": explainer, "alignment": {"kind": kind}}
        config = {"seed": seed, "objective": objective, "optim": {"lr": 1e-3}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        command = f"python -m gradeclip_ft train +exp=shapes name={name} 'shards=a b'"
        (folder / "environment.json").write_text(json.dumps({"command": command}))
        return folder

    return write


def _result(run: str, evaluator: str, metrics: dict[str, float], size: int, step: int) -> Result:
    return Result(
        evaluator=evaluator,
        metrics=metrics,
        protocol={"image_size": size},
        data={"hash": "abc", "counts": {"images": 5}},
        weights={"name": "tiny", "hash": run if step else "start"},
        versions={},
        run=run,
        step=step,
    )


def test_rows_say_what_each_run_was(write: Write) -> None:
    write("ordinary", 0.11)
    write("eclip", 0.5, seed=2, explainer=GRAD_ECLIP, kind="contrastive")
    table = tabulate(collect(["runs/ordinary", "runs/eclip"]))
    facts = ("run", "step", "map", "heads", "stop_gradient", "loss", "seed")
    assert table.facts == facts
    assert [tuple(row[key] for key in facts) for row in table.rows] == [
        ("tiny", 0, "untouched", None, None, None, None),
        ("ordinary", 300, "ordinary", None, None, None, 0),
        ("eclip", 300, "grad_eclip", "one", False, "contrastive", 2),
    ]
    assert [row["boxes/top1"] for row in table.rows] == [0.1, 0.11, 0.5]
    assert table.rows[2]["command"] == (
        "python -m gradeclip_ft train +exp=shapes name=eclip 'shards=a b'"
    )


def test_groups_have_mean_and_sample_deviation_over_seeds(write: Write) -> None:
    values = [0.50, 0.46, 0.57]
    for seed, value in enumerate(values):
        write(f"maps_{seed}", value, seed=seed, explainer=GRAD_ECLIP)
    table = grouped(tabulate(collect(["runs/maps_*"])), ["map", "heads"])
    untouched, eclip = table.rows
    assert (untouched["rows"], eclip["rows"]) == (1, 3)
    assert eclip["boxes/top1"] == pytest.approx(sum(values) / 3)
    assert eclip["boxes/top1 sd"] == pytest.approx(statistics.stdev(values))
    text = render(select(table), "text")
    assert "51.0 ± 5.6" in text
    assert not table.notes


def test_groups_that_mix_settings_say_so(write: Write) -> None:
    """A mean over one and all heads would look like a result."""
    write("a", 0.5, explainer=GRAD_ECLIP)
    write("b", 0.6, explainer={**GRAD_ECLIP, "heads": "all"})
    table = grouped(tabulate(collect(["runs/a", "runs/b"])), ["map"])
    assert table.notes == ("groups mix different heads; add it to by=",)


def test_rows_of_another_protocol_are_marked(write: Write) -> None:
    """Numbers at other image sizes must not stand side by side unmarked."""
    write("a", 0.5)
    write("b", 0.7, size=128, steps=(300,))
    text = render(select(tabulate(collect(["runs/a", "runs/b"]))), "markdown")
    marked = [line for line in text.splitlines() if "≠" in line]
    assert len(marked) == 1
    assert marked[0].startswith("| b |")
    assert "regions: image_size 128 instead of 64" in text


def test_metrics_of_two_evaluators_with_one_name_stay_apart(write: Write) -> None:
    folder = write("a", 0.5, steps=(0, 100, 300))
    assert [len(collect(["runs/a"], steps=s)) for s in ("last", "ends", "all")] == [1, 2, 3]
    _result("a", "other", {"boxes/top1": 0.9}, 64, 300).write(folder / "evaluations")
    table = tabulate(collect(["runs/a"], steps="last"))
    (row,) = csv.DictReader(io.StringIO(render(table, "csv")))
    assert row["regions:boxes/top1"] == "0.5"
    assert row["other:boxes/top1"] == "0.9"


def test_compare_writes_markdown_and_one_json_row_per_run(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        write(f"maps_{seed}", 0.5 + seed / 100, seed=seed, explainer=GRAD_ECLIP)
    compare("runs/maps_*", by=("map", "heads"), fields=("lr=optim.lr",), out="results/shapes_maps")
    text = Path("results/shapes_maps.md").read_text()
    assert (
        "    python -m gradeclip_ft compare 'runs/maps_*' 'by=[map,heads]' "
        "'fields=[lr=optim.lr]' out=results/shapes_maps\n"
    ) in text
    assert "| grad_eclip | one | 2 | 50.5 ± 0.7 | 30.0 ± 0.0 |" in text
    assert "- regions: 64 px, 5 images, data abc." in text
    rows = json.loads(Path("results/shapes_maps.json").read_text())
    assert [row["seed"] for row in rows] == [None, 0, 1]
    wanted = {"map", "heads", "stop_gradient", "loss", "seed", "boxes/top1", "command", "lr"}
    assert wanted <= set(rows[1])
    assert rows[1]["lr"] == 1e-3
    assert "grad_eclip" in capsys.readouterr().out


def test_wrong_words_are_named(write: Write) -> None:
    write("a", 0.5)
    with pytest.raises(FileNotFoundError, match="no folder runs/b"):
        compare("runs/b")
    with pytest.raises(FileNotFoundError, match="no folder to compare"):
        compare()
    Path("empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no result in empty"):
        compare("empty")
    with pytest.raises(ValueError, match="no column mapp; choose from run, step, map"):
        compare("runs/a", by=("mapp",))
    with pytest.raises(ValueError, match="no metric matches nothing"):
        compare("runs/a", metrics=("nothing",))
    with pytest.raises(ValueError, match="write column=key"):
        compare("runs/a", fields=("lr",))


def test_a_folder_of_results_without_a_run_can_be_compared(write: Write) -> None:
    _result("x", "regions", {"boxes/top1": 0.2}, 64, 0).write(Path("evaluations/tiny"))
    (row,) = tabulate(collect(["evaluations/tiny"])).rows
    assert (row["run"], row["map"], row["boxes/top1"]) == ("tiny", "untouched", 0.2)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]"])
def test_side_files_that_a_crash_emptied_are_left_out(write: Write, content: str) -> None:
    """Would catch a traceback of a parser where the results themselves are whole."""
    write("a", 0.5)
    for name in ("config.yaml", "environment.json"):
        Path("runs/a", name).write_text(content)
    (last,) = collect(["runs/a"], steps="last")
    assert (last.run, last.command) == ("a", None)


def test_a_detector_s_row_says_what_its_frozen_model_was(write: Write) -> None:
    """Would catch detectors that are all called ordinary, since their objective has no map."""
    write("start", 0.5, explainer={"_target_": "a.grad_eclip.GradEclip", "heads": "one"})
    folder = write("found", 0.5, seed=7)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"model": {"settings": {"side": 64}}, "runs_dir": "runs"}
    found = []
    for start in ("start", "runs/start", "weights.pt", None):
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, "init_from": start}))
        (last,) = collect(["runs/found"], steps="last")
        found.append((last.facts["map"], last.facts["heads"], last.facts["seed"]))
    assert found[:2] == [("grad_eclip", "one", 7)] * 2
    assert found[2:] == [("weights.pt", None, 7), ("untouched", None, 7)]


def test_comparing_does_not_import_torch(write: Write, repository: Path) -> None:
    write("a", 0.5)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from gradeclip_ft.commands.compare import compare\n"
        "compare('runs/a')\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(repository)], check=True, capture_output=True)


@pytest.fixture
def maps(write: Write) -> Path:
    """A run whose maps were measured before and after, and its regions in between."""
    folder = write("try", 0.3, steps=(3,)) / "evaluations"
    before = {"chance/pointing": 0.1, "a/pointing": 0.25, "a/energy": 0.2}
    after = {"chance/pointing": 0.1, "a/pointing": 0.5, "a/energy": 0.3, "b/pointing": 0.4}
    _result("try", "pointing", before, 64, 0).write(folder)
    _result("try", "pointing", after, 64, 7).write(folder)
    return folder


def test_methods_are_rows_and_weights_columns(
    maps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = ("*/pointing", "*/energy")
    compare("runs/try", rows="methods", format="csv", steps="all", metrics=metrics, out="methods")
    assert capsys.readouterr().out.splitlines()[:4] == [
        "method,tiny/pointing,try/pointing,tiny/energy,try/energy,differs",
        "chance,0.1,0.1,,,",
        "a,0.25,0.5,0.2,0.3,",
        "b,,0.4,,,",
    ]
    text = Path("methods.md").read_text()
    assert "| a | 25.0 | 50.0 | 20.0 | 30.0 |" in text
    assert "rows=methods" in text
    assert "Metrics in percent." in text
    rows = json.loads(Path("methods.json").read_text())
    assert [row["a/pointing"] for row in rows if row.get("a/pointing")] == [0.25, 0.5]


def test_weights_of_one_name_are_told_apart_by_their_step(
    maps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _result("try", "pointing", {"a/pointing": 0.3}, 64, 4).write(maps)
    compare("runs/try", rows="methods", steps="all", metrics=("a/pointing",))
    names = ["tiny/pointing", "try step 4/pointing", "try step 7/pointing"]
    header = capsys.readouterr().out.splitlines()[0]
    assert re.split(r" {2,}", header) == ["method", *names]
    with pytest.raises(ValueError, match=r"no metric of a method among text_"):
        compare("runs/try", rows="methods", steps="all", metrics=("text_*",))


def test_seconds_and_multiples_are_not_percentages(
    maps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"rise/seconds": 6.2376, "rise/times_encode_image": 533.14}
    _result("x", "timing", times, 64, 0).write(Path("times"))
    compare("times", rows="methods", metrics=("rise/*",), out="times")
    assert re.search(r"6\.2376 +533\.14\n", capsys.readouterr().out)
    assert "Metrics in seconds" in Path("times.md").read_text()


def test_what_train_and_evaluate_print_has_the_unit_of_each_metric() -> None:
    table = metrics_table({"before": {"boxes/top1": 0.069}, "after": {"rise/seconds": 2.0}})
    lines = [line.split() for line in render(table).splitlines()[2:]]
    assert lines == [["boxes/top1", "%", "6.9"], ["rise/seconds", "s", "2.0000"]]


def test_a_metric_beyond_1_is_a_number_and_not_a_fraction(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plug-in's mean rank of 7.25 was 725.0 per cent."""
    numbers = {"mean_rank": 0.5, "colour/size": 31.25, "share": 0.25}
    _result("x", "own", numbers, 64, 0).write(Path("own"))
    compare("own", metrics=("*",))
    assert re.search(r" 0\.5000 +31\.25 +25\.0\n", capsys.readouterr().out)
    units = [row["unit"] for row in metrics_table({"value": numbers}).rows]
    assert units == ["places", "", "%"]


def test_values_of_one_metric_have_one_unit() -> None:
    """Beside 31.25 a size of 0.75 was 75.0 per cent, and a deviation of 0.5 was 50.0."""
    rows: list[Row] = [{"run": "a", "size": 0.75}, {"run": "b", "size": 31.25, "size sd": 0.5}]
    lines = render(Table(("run",), ("size",), tuple(rows))).splitlines()[2:]
    assert [line.split()[1:] for line in lines] == [["0.75"], ["31.25", "±", "0.5"]]
    table = metrics_table({"before": {"size": 0.75}, "after": {"size": 31.25}})
    assert render(table).splitlines()[2].split() == ["size", "0.75", "31.25"]
    share = Table(("run",), ("share",), ({"run": "a", "share": 0.5, "share sd": 0.01},))
    assert "50.0 ± 1.0" in render(share)


def test_the_page_of_a_table_has_its_cells_notes_and_command(write: Write) -> None:
    """Every cell once, escaped, in a file that refers to nothing outside."""
    write("a<b", 0.5)
    write("b", 0.6, size=32)
    compare("runs/*", steps="last", out="page.html")
    page = Path("page.html").read_text()
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    assert cells == ["a&lt;b", "300", "ordinary", "0", "50.0", "30.0", "", *cells[7:]]
    assert cells[7:] == ["b", "300", "ordinary", "0", "60.0", "30.0", "≠"]
    assert "compare &#39;runs/*&#39; steps=last out=page.html" in page
    assert "image_size 32 instead of 64" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_weights_mixed_with_the_start_have_a_row_each(write: Write) -> None:
    """The whole run first, then by share; runs without mixed weights have no such column."""
    folder = write("a", 0.5)
    for alpha, top1 in ((0.7, 0.4), (0.85, 0.45)):
        result = _result("a", "regions", {"boxes/top1": top1}, 64, 300)
        replace(result, weights={**result.weights, "alpha": alpha}).write(folder / "evaluations")
    assert (folder / "evaluations" / "regions@300_alpha0.85.json").exists()
    entries = collect([str(folder)])
    told = [
        (e.step, e.facts.get("alpha"), e.results["regions"].metrics["boxes/top1"]) for e in entries
    ]
    assert told == [(0, None, 0.1), (300, 1.0, 0.5), (300, 0.85, 0.45), (300, 0.7, 0.4)]
    assert "alpha" not in tabulate(collect([str(write("b", 0.5))])).facts
