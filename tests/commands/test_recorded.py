"""What enters a run's record, and what a record may build."""

import json
import os
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gradeclip_ft.commands import runs
from gradeclip_ft.commands.build import make
from gradeclip_ft.commands.config import (
    ConfigurationError,
    as_written,
    perform,
    recorded,
    targets,
)
from gradeclip_ft.results.masking import masked_output, secrets_of_environment

SECRET = "correct-horse-battery"


def test_variables_stand_as_written_and_are_looked_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The record of a run is shared; its author's environment is not."""
    monkeypatch.setenv("PLACE", SECRET)
    cfg = OmegaConf.create(
        {
            "shards": "${oc.env:PLACE}/x.tar",
            "again": "${shards}",
            "other": "${oc.env:NOT_SET,here}",
            "decoded": "${oc.decode:${oc.env:PLACE}}",
            "seed": 3,
            "sum": ["${seed}", "a"],
        }
    )
    plain = recorded(cfg)
    assert plain == {
        "shards": "${oc.env:PLACE}/x.tar",
        "again": "${oc.env:PLACE}/x.tar",
        "other": "${oc.env:NOT_SET,here}",
        "decoded": "${oc.env:PLACE}",
        "seed": 3,
        "sum": [3, "a"],
    }
    assert OmegaConf.create(plain).again == f"{SECRET}/x.tar"
    assert OmegaConf.create(plain).other == "here"
    assert recorded(OmegaConf.create(plain)) == plain
    assert cfg.again == f"{SECRET}/x.tar"


def test_a_result_holds_options_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a path of its author's machine in every shared evaluation."""
    monkeypatch.setenv("PLACE", SECRET)
    monkeypatch.setenv("SHORT", "a")
    cfg = OmegaConf.create(
        {"model": {"name": "/${oc.env:PLACE}/m"}, "evaluator": {"x": {"prompt": "${oc.env:SHORT}"}}}
    )
    found = as_written(cfg)({"files": [f"/{SECRET}/m/a.json"], "prompt": "a", "other": ("an", 1)})
    assert found == {
        "files": ["/${oc.env:PLACE}/m/a.json"], "prompt": "${oc.env:SHORT}", "other": ["an", 1],
    }  # fmt: skip


def test_no_file_of_a_run_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STORE_SECRET", SECRET)
    secrets_of_environment.cache_clear()
    shards = "https://me:tiger77@host/{0..3}.tar?Signature=5167"
    cfg = OmegaConf.create(
        {"data": {"shards": shards}, "logger": {"api_key": "k-1234"}, "x": "${oc.env:STORE_SECRET}"}
    )
    monkeypatch.setattr(sys, "argv", ["x", "train", f"data.shards={shards}", f"x={SECRET}"])
    folder = tmp_path / "run"
    runs.claim(folder, cfg)
    runs.record(folder, {"data": {"where": shards}})
    runs.claim(folder, cfg, resume="auto")  # the same settings are the same still
    text = "".join(path.read_text() for path in folder.iterdir())

    def fail() -> None:
        raise ValueError(f"cannot read {shards} with {SECRET}")

    with masked_output():
        perform(fail, full=False)
        perform(fail, full=True)
    text += capsys.readouterr().err
    assert not [word for word in (SECRET, "tiger77", "5167", "k-1234") if word in text]
    assert "host/{0..3}.tar" in text
    assert json.loads((folder / "environment.json").read_text())["starts"]


# What Python reports of programs started, files written or removed, and connections made.
TRACES: list[tuple[str, object]] = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ACTIONS = ("os.system", "subprocess.Popen", "os.exec", "os.remove", "os.rename", "os.mkdir")


def note(event: str, given: tuple[object, ...]) -> None:
    writes = event == "open" and isinstance(given[2], int) and given[2] & WRITES
    if event in ACTIONS or event == "socket.connect" or (writes and "pycache" not in str(given[0])):
        TRACES.append((event, given[0]))


EVIL: list[dict[str, object]] = [
    {"_target_": "os.system", "command": "touch hacked"},
    {"_target_": "builtins.eval", "_args_": ["open('hacked', 'w')"]},
    {"_target_": "gradeclip_ft.commands.train.os.system", "command": "touch hacked"},
    {"_target_": "gradeclip_ft.results.record.write_atomically", "path": "hacked", "text": ""},
    {"_target_": "gradeclip_ft.data.captions.shard_sizes", "urls": ["pipe:touch hacked"]},
    {"_target_": "gradeclip_ft.training.checkpoints.sweep", "folder": "."},
    {"_target_": "gradeclip_ft.data.shapes.make_shapes", "folder": "hacked", "train": 8, "val": 4},
    {"_target_": "gradeclip_ft.models.weights.torch.load", "f": "x"},
]
ATTENTIVE = {"_target_": "gradeclip_ft.explain.grad_eclip.GradEclip"}


def places(node: dict[str, object]) -> dict[str, tuple[str, object]]:
    """Nodes in which `node` may be hidden, with the key that they are built under."""
    model = {"_target_": "gradeclip_ft.models.load.load_clip", "name": "shapes_tiny"}
    text = f"${{oc.decode:'{{_target_: {node['_target_']}, a: 1}}'}}"
    aligned = {"_target_": "gradeclip_ft.objectives.global_local.GlobalLocal"}
    return {
        "itself": ("model", node),
        "in place of a word": ("model", {**model, "name": node}),
        "in a list": ("model", {**model, "image_size": [node]}),
        "among free settings": ("logger", {"_target_": "x", "extra": {"x": [{"y": node}]}}),
        "in place of another object": ("objective", {**aligned, "explainer": node}),
        "partial": ("objective", {**aligned, "explainer": {**node, "_partial_": True}}),
        "positional": ("model", {**model, "_args_": [node]}),
        "by a string": ("model", {**model, "name": text}),
    }


@pytest.mark.parametrize("node", EVIL, ids=lambda node: str(node["_target_"]))
def test_the_record_of_a_run_builds_nothing_foreign(
    node: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run=` builds what somebody's config.yaml says: a command, a file written, a file removed."""
    monkeypatch.chdir(tmp_path)
    sys.addaudithook(note)  # stays to the end of the process, and listens to nobody else
    for key, whole in places(node).values():
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({key: whole})))
        TRACES.clear()
        with pytest.raises(ConfigurationError):
            make(runs.read_config(tmp_path)[key], key)
        assert not TRACES
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_what_a_text_spells_is_not_built() -> None:
    """Would catch a second resolution, which turns an escaped interpolation into a node."""
    node = {"_target_": "gradeclip_ft.data.labelled.ClassFolders", "limit": 1}
    node["folder"] = "${limit}\\${oc.decode:'{_target_: os.system, command: true}'}"
    built = make(OmegaConf.create(node), "data")
    assert built.folder == "1${oc.decode:'{_target_: os.system, command: true}'}"


def test_each_target_is_built_under_its_own_keys_alone() -> None:
    """Would catch `model: {_target_: ...make_shapes}`, and a node where a plain value belongs."""
    keys = {key for entry in targets().values() for key in entry["under"]}
    for target, entry in targets().items():
        for key in keys - set(entry["under"]):
            with pytest.raises(ConfigurationError, match="is not built here"):
                make({"_target_": target}, key)
        with pytest.raises(ConfigurationError, match="_partial_"):  # called while data are built
            make({"_target_": target, "_partial_": not entry["partial"]}, entry["under"][0])
        for name, fact in entry["arguments"].items():
            if "object" not in json.dumps(fact):
                hidden = {"_target_": target, name: ATTENTIVE, "_partial_": entry["partial"]}
                with pytest.raises(ConfigurationError, match=rf"{name}: got"):
                    make(hidden, entry["under"][0])
