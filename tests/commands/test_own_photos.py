"""From photos and a table to a model: training, its evaluator, its lengths, and its model."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands.cli import run
from gradeclip_ft.commands.config import ConfigurationError, check, compose
from gradeclip_ft.models.load import usual_weights
from gradeclip_ft.training.optim import warmup_cosine

COLOURS = ("red", "green", "blue", "yellow")
TRAIN = [
    *("train", "data=photos", "model=shapes_tiny", "data.table=t.csv", "data.images=photos"),
    *("data.batch_size=4", "data.workers=0", "+data.tagger=textblob"),
    "evaluator.captions.workers=0",
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 pictures, and a table with a header of its own."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    with Path("t.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(("photo", "description"))
        for number in range(24):
            colour = COLOURS[number % 4]
            Image.new("RGB", (70 + number, 64), colour).save(f"photos/{number}.png")
            writer.writerow((f"{number}.png", f"a {colour} circle and a {colour} square"))
    return tmp_path


def measured(folder: Path) -> dict[str, float]:
    return {
        path.name: json.loads(path.read_text())["metrics"]["image_retrieval_recall@1"]
        for path in sorted((folder / "evaluations").glob("*.json"))
    }


def test_a_start_that_is_refused_leaves_the_name_free(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The length of an epoch is known before the model is measured, so nothing is there to keep."""
    words = [*TRAIN, "name=a", "trainer.max_steps=2", "data.batch_size=64"]
    assert run(COMMANDS, words) == 1
    assert "less than one batch of 64" in capsys.readouterr().err
    assert not (home / "runs" / "a").exists()


@pytest.mark.slow
def test_own_photos_are_trained_on_measured_and_resumed(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten steps just run, also in two parts, and nothing of the shapes world is drawn."""
    assert run(COMMANDS, [*TRAIN, "name=whole", "epochs=2"]) == 0
    whole = home / "runs" / "whole"
    config = OmegaConf.load(whole / "config.yaml")
    assert config.trainer.max_steps == 10  # 22 photos in batches of 4, twice
    assert list(config.evaluator) == ["captions"]
    assert list(measured(whole)) == [f"captions@{step}.json" for step in (0, 10, 2, 4, 6, 8)]
    assert run(COMMANDS, [*TRAIN, "name=part", "trainer.max_steps=10", "trainer.stop_at=3"]) == 0
    resumed = [*TRAIN, "name=part", "trainer.max_steps=10", "resume=auto"]
    assert run(COMMANDS, resumed) == 0
    ends = [load_file(home / "runs" / name / "weights.safetensors") for name in ("whole", "part")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())

    expected = measured(whole)["captions@10.json"]
    (whole / "evaluations" / "captions@10.json").unlink()
    capsys.readouterr()
    assert run(COMMANDS, ["evaluate", "run=whole"]) == 0
    assert "captions, step 10, {'images': 2" in capsys.readouterr().out
    assert measured(whole)["captions@10.json"] == expected
    named = ["evaluate", "run=whole", "evaluator=captions", "evaluator.captions.data.holdout=8"]
    assert run(COMMANDS, [*named, "out=eight"]) == 0
    data = json.loads((home / "eight" / "captions@10.json").read_text())["data"]
    assert data["counts"]["images"] == 8

    assert run(COMMANDS, ["report", "runs/whole", "out=page.html", "scenes=2"]) == 0
    page = Path("page.html").read_text("utf-8")
    held = json.loads((whole / "environment.json").read_text())["data"]["held_out"]
    assert page.count("<article") == held == 2
    assert "Text to image, R@1" in page
    assert re.search(r"t\.csv:\d+\.png", page)  # a photo held out, not a scene of shapes
    assert "in the box" not in page
    assert not (home / "data").exists()


@pytest.mark.slow
def test_doctor_reads_own_photos(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["doctor", *TRAIN[1:], "model.weights=random"]
    assert run(COMMANDS, words) == 0
    assert "22 photos, 2 more held out, 5 steps of 4 an epoch" in capsys.readouterr().out
    assert run(COMMANDS, [*words, "data.images=elsewhere"]) == 1
    assert "no folder elsewhere; set images=" in capsys.readouterr().out


def test_photos_that_are_elsewhere_are_missed_before_the_model_is_built(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights were fetched first, for minutes."""
    monkeypatch.setattr("gradeclip_ft.models.load.load_clip", lambda *args, **options: 1 / 0)
    table = Path("t.csv").read_text()
    (home / "twice.csv").write_text(re.sub(r"(\d+\.png)", r"photos/\1", table))
    for words, told in {
        ("data.images=.",): "22 of 22 photos are not in ., first",
        ("data.table=twice.csv",): "begin with photos already: set data.images=.",
    }.items():
        assert run(COMMANDS, [*TRAIN, *words]) == 1
        assert told in capsys.readouterr().err
    assert not (home / "runs").exists()


def test_own_photos_choose_their_evaluator_and_other_data_theirs() -> None:
    """The shapes are for runs on the shapes; what the command line names always counts."""
    for overrides, names in {
        (): ["shapes_regions", "shapes_retrieval"],
        ("data=photos",): ["captions"],
        ("data=coco_captions",): [],
        ("data=photos", "evaluator=coco_retrieval"): ["coco_retrieval"],
        ("data=shapes", "evaluator=[]"): [],
        ("+exp=smoke",): ["shapes_regions", "shapes_retrieval"],
    }.items():
        cfg = compose("train", ["name=a", *overrides])
        check(cfg, "train")
        assert sorted(cfg.get("evaluator") or {}) == names, overrides


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (["model=ViT-B-32"], {"name": "ViT-B-32-quickgelu", "weights": "openai"}),
        (["model=EVA02-B-16"], {"name": "EVA02-B-16", "weights": "merged2b_s8b_b131k"}),
        (["model=RN50", "model.weights=random"], {"name": "RN50", "weights": "random"}),
        (["model=openai_rn50"], {"name": "RN50-quickgelu", "weights": "openai"}),
    ],
)
def test_a_name_of_open_clip_is_a_model_with_its_usual_weights(
    given: list[str], chosen: dict[str, str]
) -> None:
    for command in ("train", "evaluate"):
        cfg = compose(command, COMMANDS[command].overrides([*given]))
        assert {key: cfg.model[key] for key in chosen} == chosen


def test_a_model_without_weights_is_not_begun_without_a_word() -> None:
    with pytest.raises(ConfigurationError, match=r"no weights of it; add model\.weights"):
        COMMANDS["train"].overrides(["model=ViT-S-32"])
    assert usual_weights("ViT-L-14-336") == ("ViT-L-14-336-quickgelu", "openai")


def test_a_warm_up_that_nobody_set_takes_a_tenth() -> None:
    for steps, warm in ((10, 1), (75, 7), (22702, 1000)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        factor = warmup_cosine(optimizer, steps=steps).lr_lambdas[0]
        assert factor(warm - 1) == 1.0
        assert factor(warm + 1) < 1.0
