"""The whole command: runs, weights and shapes on disk to a page and a picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from gradeclip_ft.commands.config import compose
from gradeclip_ft.commands.report import report
from gradeclip_ft.data.shapes import make_shapes
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.results.record import Result


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "shapes"
    make_shapes(folder, train=8, val=12, seed=0, workers=1)
    return folder


def make_run(folder: Path, seed: int | None, experiment: str, world: Path) -> Path:
    """A run of the packaged model whose weights are drawn at random, or are the packaged ones."""
    folder.mkdir(parents=True)
    overrides = [f"+exp={experiment}", f"name={folder.name}", f"data.make.folder={world}"]
    OmegaConf.save(compose("train", overrides), folder / "config.yaml", resolve=True)
    (folder / "environment.json").write_text('{"data": {"tagger": "textblob"}}')
    torch.manual_seed(seed or 0)
    start = load_clip("shapes_tiny")
    loaded = start if seed is None else load_clip("shapes_tiny", "random")
    save_file(loaded.clip.model.state_dict(), folder / "weights.safetensors")
    for step, weights in ((0, start), (7, loaded)):
        Result(
            evaluator="shapes_regions",
            metrics={"boxes/top1": 0.1 + step / 100},
            protocol={},
            data={},
            weights={"name": "shapes_tiny", "hash": weights.weights_hash},
            versions={},
            run=folder.name,
            step=step,
        ).write(folder / "evaluations")
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
        make_run(tmp_path / "same", None, "shapes_ordinary", world),
        make_run(tmp_path / "other", 1, "shapes", world),
    ]
    still = tmp_path / "pictures" / "still.png"
    page = tmp_path / "out" / "page.html"
    report(*map(str, runs), out=str(page), scenes=2, picture=str(still), **files_of(world))
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
    run = make_run(tmp_path / "stale", 1, "shapes", world)
    torch.manual_seed(2)
    state = load_clip("shapes_tiny", "random").clip.model.state_dict()
    save_file(state, run / "weights.safetensors")
    with pytest.raises(ValueError, match="not what was evaluated at step 7"):
        report(str(run), scenes=1, **files_of(world))
    assert not (run / "report.html").exists()
