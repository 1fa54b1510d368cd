"""A detector in the training loop: two processes, resuming, and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gradeclip_ft.commands.config import compose
from gradeclip_ft.commands.doctor import doctor
from gradeclip_ft.training.data_module import CaptionDataModule
from gradeclip_ft.training.loggers import files
from gradeclip_ft.training.run_files import newest_good
from gradeclip_ft.training.trainer import make_trainer
from tests.detection import two_ranks
from tests.ranks import ROOT, run_two


@pytest.mark.ddp
def test_two_processes_equal_one_on_the_joined_batch(tmp_path: Path) -> None:
    """Would catch losses that are means over samples, whose number differs between processes."""
    run_two("tests.detection.two_ranks", tmp_path)
    got, other = (torch.load(tmp_path / f"rank{rank}", weights_only=True) for rank in range(2))
    expected = two_ranks.step(tmp_path / "alone", 1)
    assert got.keys() == expected.keys()
    largest = max(x.abs().max().item() for name, x in expected.items() if name != "loss")
    for name, value in expected.items():
        assert torch.equal(got[name], other[name]), name
        scale = max(value.abs().max().item(), 1e-2 * largest)
        assert (got[name] - value).abs().max().item() / scale < 1e-5, name


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """Would catch samples that are drawn from another place, and weights that are not saved."""

    def train(name: str, stop: int | None, resume: bool = False) -> list[float]:
        keep, folder = two_ranks.Keep(), tmp_path / name
        trainer = make_trainer(
            folder, files(folder, {}), [keep], max_steps=5, stop_at=stop, log_every=1
        )
        trainer.fit(
            two_ranks.module(16, lr=1e-3),
            datamodule=CaptionDataModule(two_ranks.Batches(batches=2), seed=0),
            ckpt_path=newest_good(folder) if resume else None,
            weights_only=True,
        )
        return keep.losses

    whole = train("whole", None)
    assert train("parts", 3) + train("parts", None, resume=True) == whole
    first, second = (
        load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    before = two_ranks.module(16).clip.state_dict()
    frozen = [key for key in first if key.startswith("clip.")]
    assert frozen
    assert all(torch.equal(first[key], before[key]) for key in frozen)
    assert not torch.equal(first["head.temperature"], before["head.temperature"])


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command line in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gradeclip_ft", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


SMALL = (
    *("data.boxes.make.train=24", "data.boxes.make.val=6", "data.boxes.make.scenes=16"),
    *("data.workers=0", "data.batch_size=4", "trainer.max_steps=2", "trainer.log_every=1"),
)


def test_train_evaluate_detect_and_compare_by_command_line(tmp_path: Path) -> None:
    """Would catch parts that do not fit: data to losses, run to evaluation, run to pictures."""
    done = run("train", "+exp=detector_shapes", *SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    home = tmp_path / "runs" / "detector_shapes"
    (result,) = (home / "evaluations").glob("shapes_detection@2.json")
    assert set(json.loads(result.read_text())["metrics"]) >= {"base/AP50", "all/AP50"}
    facts = json.loads((home / "environment.json").read_text())["data"]
    assert (len(facts["base"]), len(facts["novel"])) == (58, 6)
    line = json.loads((home / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(
        sum(line[k] for k in ("proposal_classes", "proposal_boxes", "classes", "boxes")), rel=1e-4
    )

    again = run("evaluate", "run=detector_shapes", "evaluator=[shapes_detection]", folder=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "kept" in again.stdout

    found = run(
        "detect",
        "run=detector_shapes",
        "images=data/shapes/images_val",
        "names=['red circle','blue star']",
        "least_score=0.001",
        folder=tmp_path,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    written = json.loads((tmp_path / "detections" / "detections.json").read_text())
    assert len(written["images"]) == 6
    assert [one["name"] for one in written["categories"]] == ["red circle", "blue star"]
    assert written["annotations"]
    for one in written["annotations"]:
        x, y, width, height = one["bbox"]
        assert 0 <= x <= x + width <= 64
        assert 0 <= y <= y + height <= 64
    assert len(list((tmp_path / "detections").glob("*.png"))) == 6
    page = (tmp_path / "detections" / "index.html").read_text()
    assert page.count("<figure>") == 6

    table = run("compare", "runs/detector_shapes", "published=[table8]", folder=tmp_path)
    assert table.returncode == 0, table.stdout + table.stderr
    assert "27.4" in table.stdout

    wrong = run("train", "+exp=detector_shapes", "data=shapes", "name=b", folder=tmp_path)
    assert wrong.returncode == 2
    assert "is not for a detector" in wrong.stderr
    nothing = run("detect", "run=detector_shapes", "images=none.jpg", folder=tmp_path)
    assert "no such picture" in nothing.stderr


def test_doctor_says_whether_a_detector_could_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would catch a check that asks a detector for captions."""
    monkeypatch.chdir(tmp_path)
    assert doctor(compose("train", ["name=a", "+exp=detector_shapes"])) == 0
    assert "instances_train.json is made when training starts" in capsys.readouterr().out
    missing = ["make=null", "annotations=none.json", "images=none"]
    words = [f"data.boxes.{word}" for word in missing]
    assert doctor(compose("train", ["name=a", "+exp=detector_shapes", *words])) == 1
    assert "no annotation file none.json" in capsys.readouterr().out
