"""`export` from the command line, on a run of the packaged model."""

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands.cli import run
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.results.record import Result

MODEL = {
    "_target_": "gradeclip_ft.models.load.load_clip",
    "name": "shapes_tiny",
    "weights": None,
    "image_size": None,
}


def make_run(folder: Path, changes: dict[str, object] | None = None) -> None:
    """A finished run whose text tower has changed."""
    folder.mkdir(parents=True)
    config = {"model": MODEL, "init_from": None, "runs_dir": "runs", **(changes or {})}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    state = {
        key: value.clone()
        for key, value in load_clip("shapes_tiny").clip.model.state_dict().items()
    }
    state["text_projection"] += 0.01
    save_file(state, folder / "weights.safetensors", metadata={"format": "pt", "step": "5"})
    for step in (0, 5):
        weights = {"name": "shapes_tiny", "hash": "unknown"}
        Result("regions", {"top1": 0.1 + step / 10}, {}, {}, weights, {}, step=step).write(
            folder / "evaluations"
        )


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `export` in a working directory with the run `mine`; the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gradeclip_ft"])
    make_run(tmp_path / "runs" / "mine")
    return lambda *options: run(COMMANDS, ["export", *options])


def test_every_format_gets_its_own_folder(export, tmp_path, capsys) -> None:
    assert export("run=mine") == 0
    assert export("run=mine", "to=[huggingface,class_embed]", "half=true", "alpha=0.5") == 0
    assert export("run=mine", "to=[openclip,class_embed]", "out=there") == 0
    assert [path.name for path in sorted(Path().glob("there*"))] == ["there", "there-class_embed"]
    assert Path("there/open_clip_config.json").is_file()
    folders = sorted(path.name for path in (tmp_path / "exports").iterdir())
    assert folders == ["mine", *(f"mine-alpha0.5-half-{k}" for k in ("class_embed", "huggingface"))]
    assert "open_clip from the folder: loads again" in capsys.readouterr().out
    model = open_clip.create_model("local-dir:exports/mine")
    weights = load_file("runs/mine/weights.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_runs_and_files_whose_names_begin_alike_get_folders_of_their_own(export, tmp_path) -> None:
    """`lr_1.0` and `lr_1.5` shared the folder `lr_1`."""
    for name in ("lr_1.0", "lr_1.5"):
        make_run(tmp_path / "runs" / name)
        assert export(f"run={name}", "to=[class_embed]") == 0
    assert export("weights=runs/mine/weights.safetensors", "to=[class_embed]") == 0
    folders = sorted(path.name for path in (tmp_path / "exports").iterdir())
    assert folders == [f"{name}-class_embed" for name in ("lr_1.0", "lr_1.5", "weights")]


def test_the_note_holds_run_step_settings_and_results(export) -> None:
    assert export("run=mine", "out=there") == 0
    note = json.loads(Path("there/gradeclip_ft.json").read_text())
    assert (note["run"], note["step"], note["start_weights"]) == ("mine", 5, "packaged")
    assert len(note["config_hash"]) == 16
    scores = note["metrics"]["regions"]
    assert (scores["before"]["metrics"]["top1"], scores["after"]["step"]) == (0.1, 5)
    assert scores["of_these_weights"] is False
    assert export("weights=runs/mine/weights.safetensors", "out=file") == 0  # without a run
    note = json.loads(Path("file/gradeclip_ft.json").read_text())
    assert (note["run"], note["metrics"]) == (None, {})


def test_start_weights_are_found_through_a_chain_of_runs(export, tmp_path) -> None:
    """The licence is that of the first weights, not of the run in between."""
    make_run(tmp_path / "runs" / "second", {"init_from": "mine"})
    assert export("run=second", "out=there") == 0
    note = json.loads(Path("there/gradeclip_ft.json").read_text())
    assert (note["start_weights"], note["start_weights_licence"]) == ("packaged", "apache-2.0")


def test_a_chain_of_runs_that_names_itself_has_no_known_start(export, tmp_path) -> None:
    """A run of an earlier name was made again from its successor."""
    make_run(tmp_path / "runs" / "second", {"init_from": "third"})
    make_run(tmp_path / "runs" / "third", {"init_from": "second"})
    assert export("run=third", "out=there") == 0
    note = json.loads(Path("there/gradeclip_ft.json").read_text())
    assert note["start_weights_licence"] == "unknown"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run=mine", "to=[openclip,onnx]"], "there is openclip, huggingface, evaclip"),
        (["run=mine", "to=[]"], "write to=[openclip]"),
        (["run=mine", "weights=x.pt"], "either run=NAME or weights=FILE"),
        (["run=nobody"], "neither a weights file nor a run"),
        (["run=mine", "alpha=1.5"], "alpha=1.5 is outside of 0 to 1"),
        (["run=mine", "to=[evaclip]"], "has a VisionTransformer"),
        (["run=mine", "format=onnx"], "use safetensors or pt"),
        (["run=mine", "pixels=nowhere"], "no photo in pixels=nowhere"),
        (["run=mine", "out=runs"], "choose another folder"),
        (
            ["weights=runs/mine/weights.safetensors", "alpha=0.5", "model.weights=random"],
            "drawn at random",
        ),
    ],
)
def test_an_export_that_cannot_be_says_why_and_leaves_nothing(
    export, tmp_path, capsys, options, message
) -> None:
    assert export(*options) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) in (["runs"], ["exports", "runs"])
    assert not list((tmp_path / "exports").glob("*"))
