"""Runs on disk to table, curves, words, pictures and one page; numbers are written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from gradeclip_ft.commands import report
from gradeclip_ft.commands.config import compose
from gradeclip_ft.data.coco import CocoImage, Region
from gradeclip_ft.data.shapes import make_shapes
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.results.record import Result, read

ORDINARY = {"_target_": "gradeclip_ft.objectives.global_only.GlobalOnly"}
GRAD_ECLIP = {
    "_target_": "gradeclip_ft.objectives.global_local.GlobalLocal",
    "explainer": {"_target_": "gradeclip_ft.explain.grad_eclip.GradEclip", "create_graph": False},
    "local_weight": 0.5,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs lie in a working directory of their own."""
    monkeypatch.chdir(tmp_path)


def make_run(
    name: str,
    objective: Mapping[str, Any],
    boxes: Mapping[int, float],
    *,
    start: str = "start",
    steps: int = 20,
    classes: int = 64,
) -> Path:
    """Writes a run's folder with evaluations at the given steps."""
    folder = Path("runs") / name
    config = {"name": name, "model": {"name": "tiny"}, "objective": dict(objective), "seed": 3}
    lines = [{"step": 1, "global": 4.0, "local": 2.0}, {"step": 2, "global": None}]
    if "explainer" not in objective:
        del lines[0]["local"]
    for step, value in boxes.items():
        evaluate(folder, step, value, name if step else start, classes)
    OmegaConf.save({**config, "trainer": {"max_steps": steps}}, folder / "config.yaml")
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "glo'
    (folder / "metrics.jsonl").write_text(text)
    return folder


def evaluate(folder: Path, step: int, boxes: float, weights: str, classes: int = 64) -> None:
    """Writes one evaluation."""
    Result(
        evaluator="shapes_regions",
        metrics={"boxes/top1": boxes, "stuff_boxes/top1": 0.5},
        protocol={"classes": classes},
        data={"hash": "d"},
        weights={"name": "tiny", "hash": weights},
        versions={},
        run=folder.name,
        step=step,
    ).write(folder / "evaluations")


@pytest.fixture
def pair(home: None) -> list[Path]:
    return [
        make_run("a", ORDINARY, {0: 0.1, 20: 0.125}),
        make_run("b", GRAD_ECLIP, {0: 0.1, 10: 0.4, 20: 0.672}),
    ]


def test_curves_begin_at_the_untouched_model_and_leave_out_what_is_missing(
    pair: list[Path],
) -> None:
    """Catches null values (non-finite losses), half a last line, and curves without their start."""
    found = {chart.title: chart for chart in report.charts(report.read_runs(pair))}
    assert set(found) == {"Global loss (nats)", "Local loss", "Boxes, top-1"}
    assert found["Global loss (nats)"].series["Ordinary"] == [(1.0, 4.0)]
    assert found["Local loss"].series == {"Ordinary": [], "Grad-ECLIP": [(1.0, 2.0)]}
    boxes = found["Boxes, top-1"]
    assert boxes.series["Grad-ECLIP"] == [(0.0, 0.1), (10.0, 0.4), (20.0, 0.672)]
    assert boxes.series["Ordinary"] == [(0.0, 0.1), (20.0, 0.125)]
    assert boxes.percent


def test_the_page_says_what_was_measured_and_how_the_model_began() -> None:
    """100 % of a single photo, after random weights, looked like a result."""
    folder = make_run("a", ORDINARY, {0: 0.1, 20: 0.3})
    for step in (0, 20):
        file = folder / "evaluations" / f"shapes_regions@{step}.json"
        replace(read(file), data={"counts": {"images": 30, "captions": 60}, "hash": "d"}).write(
            folder / "evaluations"
        )
    config = OmegaConf.load(folder / "config.yaml")
    for start, random in (("random", True), ("openai", False)):
        config.model.weights = start
        OmegaConf.save(config, folder / "config.yaml")
        report.report(str(folder), scenes=0)
        html = (folder / "report.html").read_text(encoding="utf-8")
        assert "30 images, 60 captions, one image is 3.3 points" in html
        assert f"<dt>model.weights</dt><dd>{start}</dd>" in html
        assert ("Its weights are random" in html) is random


def test_two_runs_of_one_kind_carry_their_names() -> None:
    runs = [make_run(name, GRAD_ECLIP, {0: 0.1, 20: 0.5}) for name in ("x", "y")]
    assert report.read_runs(runs).methods == ["Untouched", "Grad-ECLIP (x)", "Grad-ECLIP (y)"]


def test_further_terms_are_part_of_a_run_s_name() -> None:
    """The best recipe of the shapes world stood under the name of its maps alone."""
    game = {"_target_": "gradeclip_ft.explain.game.Game"}
    best = {**GRAD_ECLIP, "explainer": game, "terms": {"mosaic": {}, "keep": {}}}
    found = report.read_runs([make_run("a", best, {0: 0.1, 20: 0.7})])
    assert found.methods == ["Untouched", "GAME + mosaic + keep"]
    assert "marks, and further terms: mosaic, keep." in report.introduction(found)


def test_a_run_without_a_start_leaves_its_column_empty() -> None:
    """`evaluation.before=false` writes no step 0."""
    comparison = report.read_runs([make_run("a", ORDINARY, {20: 0.3})])
    table = report.results_table(comparison)
    assert table.rows[0].get("Untouched") is None
    assert table.rows[0]["Ordinary"] == 0.3
    assert comparison.contrast is None


def test_an_evaluator_without_known_metrics_has_its_fractions_in_the_table() -> None:
    """A run that was measured by a plug-in alone had an empty table."""
    folder = make_run("a", ORDINARY, {0: 0.1, 20: 0.3})
    for step, share in ((0, 0.25), (20, 0.75)):
        weights = read(folder / "evaluations" / f"shapes_regions@{step}.json").weights
        metrics = {"share": share, "size": 31.5}
        own = Result("own", metrics, {}, {"hash": "d"}, weights, {}, run="a", step=step)
        own.write(folder / "evaluations")
    table = report.results_table(report.read_runs([folder]))
    labels = ("per cent", "note", "Untouched", "Ordinary")
    found = [tuple(row[key] for key in labels) for row in table.rows]
    assert ("share", "own", 0.25, 0.75) in found
    assert len(found) == 2


def test_other_protocols_are_named() -> None:
    """Catches numbers over 64 and over 80 classes set side by side without a word."""
    runs = [
        make_run("a", ORDINARY, {0: 0.1, 20: 0.2}),
        make_run("b", GRAD_ECLIP, {20: 0.3}, classes=80),
    ]
    assert report.results_table(report.read_runs(runs)).notes == (
        "Not comparable: Grad-ECLIP, shapes_regions: classes 80 instead of 64.",
    )


def test_the_introduction_claims_equal_settings_only_where_they_are_equal(pair: list[Path]) -> None:
    comparison = report.read_runs(pair)
    assert report.same_settings(comparison)
    assert "seed and optimiser are the same" in report.introduction(comparison)
    longer = make_run("c", GRAD_ECLIP, {20: 0.7}, steps=40)
    other = report.read_runs([pair[0], longer])
    assert not report.same_settings(other)
    assert "are the same" not in report.introduction(other)


def test_runs_from_different_starts_or_without_an_end_are_refused() -> None:
    """Catches "before" maps of one model beside "after" maps of another."""
    runs = [
        make_run("a", ORDINARY, {0: 0.1, 20: 0.2}),
        make_run("b", GRAD_ECLIP, {0: 0.2, 20: 0.3}, start="elsewhere"),
    ]
    with pytest.raises(ValueError, match="2 different weights"):
        report.read_runs(runs)
    with pytest.raises(FileNotFoundError, match=r"no evaluation after step 0; .*resume=auto"):
        report.read_runs([make_run("c", ORDINARY, {0: 0.1})])
    with pytest.raises(FileNotFoundError, match="no run in"):
        report.read_runs([runs[0].parent / "nothing"])


def test_a_page_without_pictures_needs_no_weights(
    pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The last evaluation of each run; the last line printed is the page, for scripts."""
    report.report(*map(str, pair), scenes=0)
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
    settings = report.map_settings(report.Comparison((), None), "maskclip")
    assert settings["_target_"] == "gradeclip_ft.explain.maskclip.MaskClip"
    with pytest.raises(ValueError, match=r"explainer=maskclp: did you mean maskclip"):
        report.map_settings(report.Comparison((), None), "maskclp")


@pytest.mark.parametrize(
    ("runs", "scenes", "message"), [((), 1, "no run"), (("a",), -1, "scenes=-1")]
)
def test_senseless_arguments_are_refused(runs: tuple[str, ...], scenes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.report(*runs, scenes=scenes)


NAMES = ["red circle", "blue star", "car"]
PICTURE = CocoImage(
    id=1,
    file_name="1.jpg",
    height=50,
    width=100,
    regions=(
        Region(id=1, label=0, box=(10.0, 5.0, 30.0, 20.0), crowd=False),
        Region(id=2, label=0, box=(60.0, 25.0, 40.0, 25.0), crowd=False),
        Region(id=3, label=2, box=(0.0, 0.0, 100.0, 50.0), crowd=False),
    ),
)


def test_a_phrase_has_the_boxes_of_the_class_that_it_names_in_whole_words() -> None:
    """By hand: catches swapped sides, xywh taken for xyxy, and the car in a carpet."""
    boxes = report.named_boxes("small red circle", PICTURE, NAMES)
    assert boxes == [(0.1, 0.1, 0.4, 0.5), (0.6, 0.5, 1.0, 1.0)]
    counts = {"black cars": 1, "Car": 1, "carpet": 0, "blue star": 0, "red": 0}
    assert {text: len(report.named_boxes(text, PICTURE, NAMES)) for text in counts} == counts


def test_the_share_of_positive_heat_inside_boxes_is_counted_on_the_picture() -> None:
    """By hand: even heat gives the area of the union; overlapping boxes count once."""
    even = np.ones((4, 4), dtype=np.float32)
    assert report.inside_share(even, [(0.0, 0.0, 0.5, 0.5)]) == pytest.approx(0.25)
    twice = [(0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.5, 0.5)]
    assert report.inside_share(even, twice) == pytest.approx(0.25)

    heat = np.array([[4.0, -1.0], [4.0, -1.0]], dtype=np.float32)
    assert report.inside_share(heat, [(0.8, 0.0, 1.0, 1.0)]) == 0
    assert report.inside_share(heat, [(0.0, 0.0, 0.5, 1.0)]) > 0.8
    assert report.inside_share(np.zeros((2, 2), dtype=np.float32), [(0.0, 0.0, 1.0, 1.0)]) == 0


def write_coco(folder: Path, captions: list[str]) -> tuple[Path, Path, Path]:
    """One picture per caption, each with a red circle on the left and a blue star on the right."""
    images = [
        {"id": k, "file_name": f"{k}.png", "height": 32, "width": 32} for k in range(len(captions))
    ]
    for image in images:
        Image.new("RGB", (32, 32), (image["id"], 0, 0)).save(folder / str(image["file_name"]))
    annotations = [
        {"id": 2 * k + label, "image_id": k, "category_id": label, "bbox": [16 * label, 0, 16, 32]}
        | {"area": 512, "iscrowd": 0, "segmentation": []}
        for k in range(len(captions))
        for label in (0, 1)
    ]
    categories = [{"id": k, "name": name} for k, name in enumerate(NAMES[:2])]
    words = [{"id": k, "image_id": k, "caption": text} for k, text in enumerate(captions)]
    files = folder / "captions.json", folder / "instances.json"
    files[0].write_text(json.dumps({"images": images, "annotations": words}))
    files[1].write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return folder, *files


def split(caption: str) -> list[str]:
    return caption.split(", ")


def test_pictures_are_chosen_by_their_captions_alone(tmp_path: Path) -> None:
    """The first that name two true things, in file order; phrases without a box are left out."""
    captions = [
        "red circle, sky",
        "small red circle, background, blue star",
        "nothing",
        "blue star, red circle",
        "blue star, big red circle",
    ]
    found = report.find_cases(*write_coco(tmp_path, captions), split, 2)
    assert [case.caption for case in found] == [captions[1], captions[3]]
    assert found[0].phrases == ["small red circle", "blue star"]
    assert found[0].boxes == [[(0.0, 0.0, 0.5, 1.0)], [(0.5, 0.0, 1.0, 1.0)]]
    assert found[0].image[0, 0].tolist() == [1, 0, 0]


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    files = write_coco(tmp_path, ["a dog, a cat"])
    with pytest.raises(ValueError, match="names 2 things"):
        report.find_cases(*files, split, 3)


def test_maps_follow_phrases_and_leave_the_model_alone(tmp_path: Path) -> None:
    """Maps of a phrase do not depend on its neighbours: catches a mixed-up order of texts."""
    torch.manual_seed(0)
    loaded = load_clip("shapes_tiny", "random")
    files = write_coco(tmp_path, ["red circle, blue star", "blue star, red circle"])
    first, second = report.find_cases(*files, split, 2)
    pair = [first, replace(second, image=first.image)]
    one, two = report.add_maps(pair, "a", loaded, GradEclip(), "a photo of the {}")
    assert one.heat["a"].shape == (2, 8, 8)
    np.testing.assert_allclose(one.heat["a"], two.heat["a"][::-1], rtol=1e-4, atol=1e-7)
    assert one.values["cosine"]["a"] == two.values["cosine"]["a"][::-1]
    assert one.values["in the box"]["a"][1].endswith(" %")
    assert all(parameter.grad is None for parameter in loaded.clip.parameters())
    (both, _) = report.add_maps([one, two], "b", load_clip("shapes_tiny"), GradEclip(), "a {}")
    assert [*both.heat] == [*both.values["cosine"]] == ["a", "b"]
    np.testing.assert_array_equal(both.heat["a"], one.heat["a"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "shapes"
    make_shapes(folder, train=8, val=12, seed=0, workers=1)
    return folder


def make_real_run(folder: Path, seed: int | None, experiment: str, world: Path) -> Path:
    """A run of the packaged model whose weights are drawn at random, or are the packaged ones."""
    folder.mkdir(parents=True)
    overrides = [f"+exp={experiment}", f"name={folder.name}", f"data.make.folder={world}"]
    OmegaConf.save(compose("train", overrides), folder / "config.yaml", resolve=True)
    (folder / "environment.json").write_text('{"data": {"tagger": "textblob"}}')
    torch.manual_seed(seed or 0)
    start = load_clip("shapes_tiny")
    loaded = start if seed is None else load_clip("shapes_tiny", "random")
    save_file(loaded.clip.model.state_dict(), folder / "weights.safetensors")
    evaluate(folder, 0, 0.1, start.weights_hash)
    evaluate(folder, 7, 0.2, loaded.weights_hash)
    return folder


def files_of(world: Path) -> dict[str, Path]:
    return {
        "images": world / "images_val",
        "captions": world / "annotations" / "captions_val.json",
        "instances": world / "annotations" / "instances_val.json",
    }


def test_maps_of_start_and_runs_come_from_their_own_weights(world: Path, tmp_path: Path) -> None:
    """A run that holds the start's weights shows the start's maps; other weights show others."""
    runs = [
        make_real_run(tmp_path / "same", None, "shapes_ordinary", world),
        make_real_run(tmp_path / "other", 1, "shapes", world),
    ]
    still = tmp_path / "pictures" / "still.png"
    page = tmp_path / "out" / "page.html"
    report.report(*map(str, runs), out=str(page), scenes=2, picture=str(still), **files_of(world))
    html = page.read_text(encoding="utf-8")
    assert html.count("<article") == 2
    values = re.findall(r'class="heat"[^>]*data-values="([^"]*)"', html)
    untouched, ordinary, other = values[0::3], values[1::3], values[2::3]
    assert len(untouched) >= 4
    assert untouched == ordinary
    assert all(one != two for one, two in zip(untouched, other, strict=True))
    assert "gradeclip_ft.explain.grad_eclip.GradEclip" in html
    with Image.open(still) as picture:
        assert picture.width > picture.height > 300


def test_weights_that_were_not_evaluated_are_refused(world: Path, tmp_path: Path) -> None:
    """Catches maps of a checkpoint beside numbers of a later step."""
    run = make_real_run(tmp_path / "stale", 1, "shapes", world)
    torch.manual_seed(2)
    state = load_clip("shapes_tiny", "random").clip.model.state_dict()
    save_file(state, run / "weights.safetensors")
    with pytest.raises(ValueError, match="not what was evaluated at step 7"):
        report.report(str(run), scenes=1, **files_of(world))
    assert not (run / "report.html").exists()
