"""The laboratory: masks for phrases, and the table of runs that are on disk."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from gradeclip_ft.data.shapes import PROMPT, make_sample
from gradeclip_ft.models.load import load_clip
from tests.results.test_intervals import result
from tools import lab


def test_true_maps_are_the_masks_of_what_a_phrase_names() -> None:
    """Each phrase's map sums to the cells of its object; what names nothing gets no map."""
    sample = make_sample(0, "train", 7)
    thing = sample.scene.things[0]
    texts = [thing.name, f"{sample.scene.background.texture} background", "left side"]
    batch = SimpleNamespace(
        images=torch.zeros(1, 3, 64, 64),
        keys=("shapes-train-0000.tar:000000008",),
        distinct=load_clip("shapes_tiny").tokenizer([PROMPT.format(text) for text in texts]),
        phrase=torch.arange(3),
        owner=torch.zeros(3, dtype=torch.long),
    )
    step: Any = SimpleNamespace(batch=batch, dense=torch.zeros(1, 8, 8, 4))
    maps = lab.true_maps(None, step)  # type: ignore[arg-type]
    owner = torch.from_numpy(sample.drawing.owner)
    expected = [(owner == number).float().view(8, 8, 8, 8).mean((1, 3)) for number in (1, 0)]
    torch.testing.assert_close(maps[0], expected[0])
    torch.testing.assert_close(maps[1], expected[1])
    assert maps[2].abs().sum() == 0


def finished(runs: Path, values: dict[str, tuple[float, ...]]) -> None:
    """Runs of the shapes world with these values of one metric, by recipe and seed."""
    for recipe, numbers in values.items():
        for seed, number in enumerate(numbers):
            folder = runs / f"lab_shapes_{recipe}_{seed}"
            for step in (0, 10):
                one = result(seed=seed, step=step)
                metrics = {"boxes/top1": number if step else 0.1}
                replace(one, metrics=metrics, run=folder.name).write(folder / "evaluations")
            (folder / "config.yaml").write_text(
                yaml.safe_dump({"seed": seed, "trainer": {"accelerator": "cpu"}})
            )
            facts = {"patch_cosine": 0.9, "step_seconds": 1.0 if recipe == "ordinary" else 1.5}
            (folder / "done").write_text(json.dumps(facts))


def test_rows_are_means_over_seeds_beside_ordinary_fine_tuning(tmp_path: Path) -> None:
    """Two seeds of two recipes: mean, deviation, and the difference from ordinary."""
    finished(tmp_path / "runs", {"ordinary": (0.4, 0.5), "game": (0.6, 0.8)})
    lab.write(tmp_path / "runs", tmp_path / "recipes")
    rows = json.loads((tmp_path / "recipes.json").read_text())
    told = {row["recipe"]: row for row in rows if row["part"].endswith("reported split")}
    assert told["untouched"]["boxes/top1"] == 0.1
    assert told["game"]["boxes/top1"] == pytest.approx(0.7)
    assert told["game"]["boxes/top1 sd"] == pytest.approx(0.1 * 2**0.5)
    assert (told["game"]["seeds"], told["game"]["time"]) == (2, "1.50")
    assert told["- ordinary"]["boxes/top1"] == pytest.approx(0.25)
    assert told["- ordinary"]["boxes/top1 low"] <= told["- ordinary"]["boxes/top1 high"]
    assert (
        "| game | 1.0 | 2 | cpu | 1.50 | 0.900 | 70.0 ± 14.1 ["
        in (tmp_path / "recipes.md").read_text()
    )


def test_rows_of_another_machine_stay_where_no_run_replaces_them(tmp_path: Path) -> None:
    """There: focal, game, mosaic and a recipe that has gone since. Here: game, and clim alone."""
    there = {"ordinary": (0.4,), "focal": (0.3,), "game": (0.6, 0.8), "mosaic": (0.2,)}
    finished(tmp_path / "there", there)
    lab.write(tmp_path / "there", tmp_path / "recipes")
    rows = json.loads((tmp_path / "recipes.json").read_text())
    gone = {"world": "shapes", "part": rows[0]["part"], "recipe": "gone", "alpha": 1.0}
    (tmp_path / "recipes.json").write_text(json.dumps([gone, *rows]))
    finished(tmp_path / "here", {"game": (0.7,), "clim": (0.1,)})
    lab.write(tmp_path / "here", tmp_path / "recipes")
    merged = json.loads((tmp_path / "recipes.json").read_text())
    told = [row for row in merged if row["part"] == rows[0]["part"]]
    named = [(row["recipe"], round(row["boxes/top1"], 6)) for row in told]
    assert named == [
        *(("untouched", 0.1), ("ordinary", 0.4), ("clim", 0.1)),
        *(("focal", 0.3), ("- ordinary", -0.1)),
        ("game", 0.7),  # its difference needs the draws of ordinary, which is not here
        *(("mosaic", 0.2), ("- ordinary", -0.2)),
    ]
    table = (tmp_path / "recipes.md").read_text()
    assert table.count("| mosaic |") == 2  # of both splits
    assert "gone" not in table
    finished(tmp_path / "here", {"ordinary": (0.5,)})
    lab.write(tmp_path / "here", tmp_path / "recipes")
    merged = json.loads((tmp_path / "recipes.json").read_text())
    found = [
        (row["recipe"], round(row["boxes/top1"], 6))
        for row in merged
        if row["part"] == rows[0]["part"]
    ]
    assert found == [  # those of focal and mosaic were from another ordinary row
        *(("untouched", 0.1), ("ordinary", 0.5), ("clim", 0.1), ("- ordinary", -0.4)),
        *(("focal", 0.3), ("game", 0.7), ("- ordinary", 0.2), ("mosaic", 0.2)),
    ]


def test_a_run_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two at a time: the third starts although the first failed, and each has its own process."""

    def train(run: lab.Run, common: list[str], alone: bool) -> None:
        if run.recipe == "clim":
            raise SystemExit(3)
        run.folder.write_text(f"{os.getpid()} {common} {alone}")

    monkeypatch.setattr(lab, "train", train)
    recipes = ["clim", "game", "focal"]
    runs = [lab.Run("shapes", recipe, "0", tmp_path / recipe) for recipe in recipes]
    ended = [run.recipe for run in lab.in_parallel(runs, ["trainer=cpu"], 2)]
    assert sorted(ended) == sorted(recipes)
    told = [(tmp_path / recipe).read_text().split(" ", 1) for recipe in ("game", "focal")]
    assert len({str(os.getpid()), *(process for process, _ in told)}) == 3
    assert {rest for _, rest in told} == {"['trainer=cpu'] False"}
    printed = capfd.readouterr().out
    assert "clim: ended with 3, see" in printed
    assert "focal: done in" in printed
    monkeypatch.setattr(lab, "prepare", lambda *given: None)
    monkeypatch.setattr(lab, "write", lambda *given: None)
    with pytest.raises(SystemExit, match="lab_shapes_clim_0 ended early"):
        lab.lab(rows=("clim",), worlds=("shapes",), seeds=("0",), runs_dir=tmp_path)


def test_longer_rows_stand_beside_ordinary_fine_tuning_of_their_length() -> None:
    assert lab.ordinary_beside("best_600") == "ordinary_600"
    assert lab.ordinary_beside("game_crops") == "ordinary"


def test_a_step_takes_as_long_as_in_the_fastest_window_without_its_data(tmp_path: Path) -> None:
    """Windows of 10 and 5 steps, with a line of an evaluation between them."""
    lines = [
        {"step": 10, "seconds": 9.0, "data_seconds": 1.0},
        {"step": 10, "boxes/top1": 0.5},
        {"step": 15, "seconds": 3.0, "data_seconds": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert lab.step_seconds(tmp_path) == pytest.approx(0.5)


def test_other_settings_do_not_mix_with_the_published_rows(tmp_path: Path) -> None:
    """Rows of 60 steps would stand among those of 200, and never be trained again."""
    for given in ({}, {"runs_dir": tmp_path}, {"out": tmp_path / "table"}):
        with pytest.raises(ValueError, match=r"trainer\.max_steps=60 .*give a runs_dir="):
            lab.lab("trainer.max_steps=60", rows=("game",), worlds=("shapes",), **given)


def test_an_unknown_recipe_is_named_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match=r"no recipe gmae; there are .*ordinary"):
        lab.lab(rows=("gmae",), worlds=("shapes",))
