"""`evaluate` on the packaged model, a run, and its exports, in a small shapes world."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands.cli import run
from gradeclip_ft.commands.config import compose
from gradeclip_ft.commands.evaluate import evaluate
from gradeclip_ft.commands.export import export
from gradeclip_ft.commands.train import train
from gradeclip_ft.models.load import load_clip

SMALL = ["evaluator=[shapes_regions,shapes_retrieval]"] + [
    f"{sign}evaluator.{name}.data.make.{key}={value}"
    for name in ("shapes_regions", "shapes_retrieval")
    for sign, key, value in (("", "train", 8), ("", "val", 24), ("+", "workers", 1))
]
FILES = ("shapes_regions@{}.json", "shapes_retrieval@{}.json")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory whose shapes world is made by the first evaluation."""
    return tmp_path_factory.mktemp("home")


def metrics(path: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads(path.read_text())["metrics"]
    return found


@pytest.mark.slow
def test_the_packaged_model_is_measured_once_and_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    evaluate(compose("evaluate", SMALL))
    folder = home / "evaluations" / "shapes_tiny"
    assert sorted(path.name for path in folder.iterdir()) == [name.format(0) for name in FILES]
    assert "boxes/top1" in capsys.readouterr().out
    found = metrics(folder / "shapes_regions@0.json")
    assert {"boxes/top1", "boxes/top5", "thing_masks/top1", "stuff_masks/top5"} <= set(found)
    assert set(metrics(folder / "shapes_retrieval@0.json")) == {
        f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)
    }
    evaluate(compose("evaluate", SMALL))
    assert capsys.readouterr().out.count("kept; again=true") == 2
    evaluate(compose("evaluate", [*SMALL, "precision=bfloat16", "out=half"]))
    half = metrics(home / "half" / "shapes_regions@0.json")
    assert half["boxes/top5"] == pytest.approx(found["boxes/top5"], abs=0.1)
    with pytest.raises(ValueError, match="precision=half: choose float32, bfloat16, float16"):
        evaluate(compose("evaluate", [*SMALL, "precision=half"]))


@pytest.mark.slow
def test_several_models_and_evaluators_in_one_command(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models by two evaluators, each where its own results go."""
    monkeypatch.chdir(home)
    words = ["model.weights=null,random", "out='sweep/${model.weights}'"]
    assert run(COMMANDS, ["evaluate", "-m", *SMALL, *words]) == 0
    found = {path.relative_to(home / "sweep").as_posix() for path in home.glob("sweep/*/*.json")}
    names = [name.format(0) for name in FILES]
    assert found == {f"{model}/{name}" for model in ("None", "random") for name in names}


@pytest.mark.slow
def test_a_run_is_measured_with_its_own_weights_at_its_own_step(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the run, not the packaged ones of the same model."""
    monkeypatch.chdir(home)
    torch.manual_seed(0)
    model = load_clip("shapes_tiny", "random").clip.model
    run = home / "runs" / "try"
    run.mkdir(parents=True)
    save_file(model.state_dict(), run / "weights.safetensors", metadata={"step": "30"})
    OmegaConf.save({"model": compose("evaluate", []).model}, run / "config.yaml")
    evaluate(compose("evaluate", [*SMALL, "run=try"]))
    names = sorted(path.name for path in (run / "evaluations").iterdir())
    assert names == [name.format(30) for name in FILES]
    result = json.loads((run / "evaluations" / "shapes_regions@30.json").read_text())
    assert result["run"] == "try"
    assert (
        result["weights"]["hash"]
        == load_clip("shapes_tiny", run / "weights.safetensors").weights_hash
    )


def test_a_missing_run_and_weights_without_a_step_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a weights file nor a run"):
        evaluate(compose("evaluate", ["run=nobody"]))
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not say its step"):
        evaluate(compose("evaluate", ["run=a.safetensors"]))
    with pytest.raises(ValueError, match="no evaluator chosen"):
        evaluate(compose("evaluate", ["evaluator=[]"]))


def numbers(*model: str) -> dict[str, dict[str, float]]:
    """All metrics of one model, by evaluator."""
    folder = Path("measured") / str(len(list(Path("measured").glob("*"))))
    evaluate(compose("evaluate", [*SMALL, f"out={folder}", *model]))
    return {path.name: json.loads(path.read_text())["metrics"] for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_every_format_of_a_fine_tuned_model_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run itself, open_clip's file and folder, transformers' names, a wrapped .pt."""
    monkeypatch.chdir(tmp_path)
    train(compose("train", ["+exp=smoke", "name=tuned", "evaluator=[]"]))
    export(compose("export", ["run=tuned", "to=[openclip,huggingface]", "out=out"]))
    state = load_file("runs/tuned/weights.safetensors")
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, "w.pt")
    expected = numbers("run=tuned")
    expected = {name.replace("@4", "@0"): found for name, found in expected.items()}
    assert len(expected) == 2
    ways = (
        ["model=folder", "model.name=out"],
        ["model=folder", "model.name=out-huggingface"],
        ["model.weights=out/open_clip_model.safetensors"],
        ["model.weights=out-huggingface/model.safetensors"],  # transformers' names
        ["model.weights=w.pt"],
        ["model.weights=out"],
    )
    for way in ways:
        assert numbers(*way) == expected, way
    assert numbers() != expected  # the untouched model has other numbers
