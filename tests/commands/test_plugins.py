"""Classes of other people's modules: the page about them as it stands, and what stays closed."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

import gradeclip_ft
from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands import config, plugins, runs
from gradeclip_ft.commands.build import build_evaluator, make
from gradeclip_ft.commands.cli import run
from gradeclip_ft.commands.config import ConfigurationError, check, compose
from gradeclip_ft.results import record

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text()
BLOCKS = {
    kind: re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.M | re.S)
    for kind in ("python", "bash", "toml")
}
FILES = re.findall(r"^`(myconf/[^`]+)`:\n\n```yaml\n(.*?)^```", PAGE, re.M | re.S)
POINTING = "evaluator.shapes_pointing"
SMALLER = {  # of a command that would take minutes
    POINTING: [f"{POINTING}.methods=[value_norm]", f"{POINTING}.data.make={{train: 8, val: 8}}"],
    "+exp=shapes_ordinary": [
        *("data.make={train: 256, val: 32}", "data.samples_per_epoch=256", "data.batch_size=16"),
        *("data.workers=0", "+data.tagger=textblob", "optim.schedule.warmup=1"),
        *("trainer.max_steps=2", "trainer.checkpoint_every=2"),
        *("evaluation.before=false", "evaluation.after=false"),
    ],
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the module, its yaml files and photos; nothing is open."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["gradeclip_ft"])
    (tmp_path / "mymethods.py").write_text("\n\n".join(BLOCKS["python"]))
    for name, content in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "photos").mkdir()
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (90, 60), colour).save(tmp_path / "photos" / f"something-{colour}.png")
    Image.new("RGB", (90, 60), "red").save(tmp_path / "dog.jpg")
    monkeypatch.setattr(plugins, "opened", set())
    monkeypatch.setattr(record, "OTHER_CODE", {})
    yield tmp_path
    config.config_dirs.clear()
    plugins.installed.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mymethods"]:
        del sys.modules[name]


def installed(folder: Path) -> None:
    """The module as a package with an entry point and its yaml files inside."""
    package = folder / "mymethods"
    (folder / "myconf").rename(folder / "conf")
    package.mkdir()
    (folder / "mymethods.py").rename(package / "__init__.py")
    (folder / "conf").rename(package / "conf")
    facts = folder / "mymethods-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mymethods\nVersion: 1.2\n")
    (facts / "top_level.txt").write_text("mymethods\n")
    (toml,) = BLOCKS["toml"]
    group, point = re.search(r'"(.*)"\]\n(.*)\n', toml).groups()
    (facts / "entry_points.txt").write_text(f"[{group}]\n{point.replace(chr(34), '')}\n")
    plugins.installed.cache_clear()


def test_the_page_as_it_stands(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command, one after another, and what each of them leaves."""
    for line in "".join(BLOCKS["bash"]).splitlines():
        words = shlex.split(line)[3:]
        extra = [
            one for key, more in SMALLER.items() if any(key in w for w in words) for one in more
        ]
        assert run(COMMANDS, [*words, *extra]) == 0, line
    shown = capsys.readouterr().out
    assert re.search(r"value_norm +Length of the value vectors", shown)
    arrays = np.load("explanations/dog/maps.npz")
    assert {"grad_eclip", "value_norm"} <= set(arrays)
    assert "value_norm" in Path("explanations/index.html").read_text()
    evaluations = Path("evaluations/shapes_tiny")
    pointing = record.read(evaluations / "shapes_pointing@0.json")
    assert 0 <= pointing.metrics["value_norm/pointing"] <= 1
    assert pointing.protocol["methods"]["value_norm"]["power"] == 2.0
    assert pointing.versions["mymethods"].startswith("source ")
    assert record.read(evaluations / "prefers@0.json").metrics.keys() == {"share"}
    assert record.read(evaluations / "named@0.json").data["counts"]["captions"] == 3
    assert re.search(r"share", shown)
    assert run(COMMANDS, ["compare", "evaluations/shapes_tiny"]) == 0
    assert "R@1" in capsys.readouterr().out
    assert runs.read_config(Path("runs/pulled")).plugins == ["mymethods"]
    environment = json.loads(Path("runs/pulled/environment.json").read_text())
    assert environment["versions"]["mymethods"] == pointing.versions["mymethods"]
    assert '"pull"' in Path("runs/pulled/metrics.jsonl").read_text()
    sys.modules["mymethods"].test_my_classes()


def test_an_installed_package_needs_no_word(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its classes and its yaml files, in commands and in Python; its version in the record."""
    installed(home)
    assert run(COMMANDS, ["list", "explainers"]) == 0
    assert "value_norm" in capsys.readouterr().out
    assert (
        run(COMMANDS, ["explain", "images=dog.jpg", "phrases=[dog]", "explainer=value_norm"]) == 0
    )
    assert record.versions()["mymethods"] == "1.2"
    model = gradeclip_ft.load("shapes_tiny", device="cpu")
    (found,) = gradeclip_ft.explain(model, "dog.jpg", "red", ["value_norm", "grad_eclip"])
    assert found.heat["value_norm"].shape == (1, 8, 8)
    assert set(gradeclip_ft.evaluate(model, "prefers").metrics) == {"share"}
    assert build_evaluator("prefers", ["text=x"]).text == "x"
    with pytest.raises(ConfigurationError, match="there is no prefer; did you mean prefers"):
        build_evaluator("prefer")


OWN = {"_target_": "mymethods.ValueNorm"}


def test_nothing_is_open_unless_it_is_named_now(home: Path) -> None:
    """The record of a run may name a plug-in and say that it is one: nothing is imported."""
    (home / "run").mkdir()
    recorded = {"plugins": ["mymethods"], "explainer": OWN, "objective": {"explainer": OWN}}
    (home / "run" / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(recorded)))
    found = runs.read_config(home / "run")
    with pytest.raises(ConfigurationError, match="is not built here"):
        make(found.explainer, "explainer")
    with pytest.raises(ConfigurationError, match=r"not built here; .* plugins=\[mymethods\]"):
        check(
            compose("explain", ["images=a", "+explainer.own._target_=mymethods.ValueNorm"]),
            "explain",
        )
    assert "mymethods" not in sys.modules
    check(compose("explain", ["images=a", "plugins=[mymethods]"]), "explain")
    assert "mymethods" not in sys.modules  # until a class of it is named
    assert make(found.explainer, "explainer").power == 1.0


def test_an_experiment_may_name_its_plug_in(home: Path) -> None:
    experiment = "# @package _global_\ndefaults:\n  - override /objective: pull\n"
    (home / "myconf" / "exp").mkdir()
    (home / "myconf" / "exp" / "own.yaml").write_text(experiment + "plugins: [mymethods]\n")
    cfg = compose("train", ["+exp=own", f"hydra.searchpath=[file://{home}/myconf]"])
    check(cfg, "train")
    assert type(make(cfg.objective, "objective")).__name__ == "Pull"


def test_an_open_plug_in_opens_its_own_classes_alone(home: Path) -> None:
    """Under their keys, with their arguments; not what the module imports, nor functions."""
    with (home / "mymethods.py").open("a") as file:
        file.write("\nfrom os import system\nfrom pathlib import PosixPath\n")
    plugins.open_plugins("mymethods")
    assert make({**OWN, "power": 3}, "explainer").power == 3
    for node, key, message in (
        (
            {"_target_": "mymethods.system", "command": "x"},
            "explainer",
            "is not a class of the plug",
        ),
        ({"_target_": "mymethods.PosixPath"}, "explainer", "is not a class of the plug-in"),
        ({"_target_": "mymethods.test_my_classes"}, "data", "is not a class of the plug-in"),
        ({"_target_": "mymethods.Missing"}, "explainer", "cannot be imported"),
        ({"_target_": "mymethods.os.system"}, "explainer", "cannot be imported"),
        ({"_target_": "os.system", "command": "x"}, "explainer", "is not built here"),
        ({"_target_": "mymethodsX.A"}, "explainer", "is not built here"),
        (OWN, "model", "is not built here"),
        (OWN, "optim", "is not built here"),
        (OWN, "evaluator", "an evaluator needs: name, protocol, __call__"),
        (
            {"_target_": "mymethods.Pull"},
            "explainer",
            "an explainer needs: one of from_trace",
        ),
        ({**OWN, "_partial_": True}, "explainer", "_partial_: ValueNorm needs false"),
        ({**OWN, "powr": 2}, "explainer", "takes no powr; did you mean power"),
        ({**OWN, "power": "high"}, "explainer", "got 'high', expected float"),
        (
            {"_target_": "mymethods.Prefers", "text": "a", "other": "b"},
            "evaluator",
            "needs it; add",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make(node, key)


def test_a_plug_in_that_is_not_there_is_said() -> None:
    for name in ("mymethodz", "../x"):
        with pytest.raises(ConfigurationError, match=f"there is no module {name}; install"):
            check(compose("explain", ["images=a", f"plugins=['{name}']"]), "explain")
