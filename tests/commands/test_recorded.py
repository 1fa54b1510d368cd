"""What enters a run's record, and what a record may build."""

import json
import os
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from gradeclip_ft.commands import runs
from gradeclip_ft.commands.build import make
from gradeclip_ft.commands.config import ConfigurationError, perform, recorded

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
            "seed": 3,
            "sum": ["${seed}", "a"],
        }
    )
    plain = recorded(cfg)
    assert plain == {
        "shards": "${oc.env:PLACE}/x.tar",
        "again": "${oc.env:PLACE}/x.tar",
        "other": "${oc.env:NOT_SET,here}",
        "seed": 3,
        "sum": [3, "a"],
    }
    assert OmegaConf.create(plain).again == f"{SECRET}/x.tar"
    assert OmegaConf.create(plain).other == "here"
    assert recorded(OmegaConf.create(plain)) == plain
    assert cfg.again == f"{SECRET}/x.tar"


def test_no_file_of_a_run_holds_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STORE_SECRET", SECRET)
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

    perform(fail, full=False)
    perform(fail, full=True)
    text += capsys.readouterr().err
    assert not [word for word in (SECRET, "tiger77", "5167", "k-1234") if word in text]
    assert "host/{0..3}.tar" in text
    assert json.loads((folder / "environment.json").read_text())["starts"]


HOSTILE = [
    {"_target_": "os.system", "command": "touch hacked"},
    {"_target_": "gradeclip_ft.results.record.write_atomically", "path": "hacked", "text": ""},
    {"_target_": "gradeclip_ft.commands.config.perform", "command": print, "full": True},
    {"_target_": "gradeclip_ft.commands.train.os.system", "command": "touch hacked"},
    {"_target_": "gradeclip_ft.data.make_shards._sample", "file": 1, "key": "a"},
    {"_target_": "gradeclip_ft.models.weights.torch.load", "f": "x"},
    {"_target_": "builtins.eval", "_args_": ["open('hacked', 'w')"]},
]


@pytest.mark.parametrize("node", HOSTILE, ids=lambda node: str(node["_target_"]))
@pytest.mark.parametrize("depth", ["itself", "inside", "in a list"])
def test_the_record_of_a_run_builds_nothing_foreign(
    node: dict[str, object], depth: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run=` and `report` build what somebody's config.yaml says."""
    monkeypatch.chdir(tmp_path)
    good = {"_target_": "gradeclip_ft.losses.AlignmentOptions"}
    plain = {key: value for key, value in node.items() if not callable(value)}
    whole = {
        "itself": plain,
        "inside": good | {"kind": plain},
        "in a list": good | {"kind": [plain]},
    }
    with pytest.raises(ConfigurationError):
        make(OmegaConf.create(whole[depth]), "alignment")
    assert not os.listdir(tmp_path)
