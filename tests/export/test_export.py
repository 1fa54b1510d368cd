"""An export folder is complete or absent and replaces only its own kind; mixtures of two models."""

import json
from pathlib import Path

import pytest
import torch

from gradeclip_ft.export.export import NOTE, files_of, mix, staged
from tests.export.small import names_in

FACTS = {"target": "openclip", "run": "mine", "config_hash": "abc", "weights_hash": "0"}


def write(folder: Path, files: dict[str, str], **facts: object) -> None:
    known = {**FACTS, **facts}
    with staged(folder, known) as stage:
        for name, text in files.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).write_text(text)
        (stage / NOTE).write_text(json.dumps({**known, "files": files_of(stage)}))


def fail(folder: Path) -> None:
    with staged(folder, FACTS) as stage:
        (stage / "weights").write_text("half")
        raise OSError("no space left on device")


@pytest.mark.parametrize("earlier", [True, False])
def test_a_failing_write_leaves_what_was_there(tmp_path, earlier) -> None:
    """A disk that is full in the middle of the weights."""
    folder = tmp_path / "out"
    if earlier:
        write(folder, {"weights": "first"})
    with pytest.raises(OSError, match="no space"):
        fail(folder)
    assert names_in(tmp_path) == ["out"] * earlier
    assert not earlier or (folder / "weights").read_text() == "first"


def test_a_later_export_takes_the_place_of_the_earlier(tmp_path) -> None:
    """Two weights files of two exports would leave the choice to the loader."""
    folder = tmp_path / "out"
    folder.mkdir()
    write(folder, {"model.safetensors": "old", "text/config.json": "{}"})
    (folder / "mine.txt").write_text("kept")
    write(folder, {"model.pt": "new"}, weights_hash="1")
    assert (folder / "mine.txt").read_text() == "kept"
    files = [path.name for path in folder.rglob("*") if path.is_file()]
    assert sorted(files) == [NOTE, "mine.txt", "model.pt"]
    assert json.loads((folder / NOTE).read_text())["files"] == ["model.pt"]


def test_nothing_but_an_export_of_the_same_kind_is_replaced(tmp_path) -> None:
    write(tmp_path / "out", {"weights": "first"})
    with pytest.raises(FileExistsError, match=r"holds openclip, .* evaclip .* out=DIR"):
        write(tmp_path / "out", {"weights": "second"}, target="evaclip")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "README.md").write_text("years of work")
    with pytest.raises(FileExistsError, match=f"holds files but no {NOTE}"):
        write(tmp_path / "thesis", {"README.md": "card"})
    assert (tmp_path / "thesis" / "README.md").read_text() == "years of work"


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({}, {"run": "other"}, "an export of mine, which an export of other"),
        ({}, {"config_hash": "xyz"}, "an export of mine"),
        ({}, {"run": None}, "an export of mine, which an export of these weights"),
        ({"run": None}, {"run": None, "weights_hash": "1"}, "an export of other weights"),
    ],
)
def test_an_export_of_another_run_is_not_replaced(tmp_path, before, now, words) -> None:
    """Runs of one name in two places; weights files of one name."""
    write(tmp_path / "out", {"weights": "first"}, **before)
    with pytest.raises(FileExistsError, match=words):
        write(tmp_path / "out", {"weights": "second"}, **now)


def test_a_note_that_a_crash_cut_off_is_refused_in_words(tmp_path) -> None:
    write(tmp_path / "out", {"weights": "first"})
    (tmp_path / "out" / NOTE).write_text('{"target": "open')
    with pytest.raises(FileExistsError, match="remove it, or choose another folder"):
        write(tmp_path / "out", {"weights": "second"})


def test_a_note_that_points_outside_removes_nothing_there(tmp_path) -> None:
    folder = tmp_path / "out"
    write(folder, {"weights": "first"})
    (tmp_path / "diary").write_text("mine")
    note = json.loads((folder / NOTE).read_text())
    (folder / NOTE).write_text(json.dumps({**note, "files": ["../diary"]}))
    write(folder, {"weights": "second"})
    assert (tmp_path / "diary").read_text() == "mine"


def state(weight: list[float], scale: float, number: int) -> dict[str, torch.Tensor]:
    values = {"weight": weight, "logit_scale": scale, "ids": [number]}
    return {name: torch.tensor(value) for name, value in values.items()}


START, TUNED = state([0.0, 4.0], 1.0, 1), state([4.0, 0.0], 3.0, 2)


@pytest.mark.parametrize(
    ("alpha", "weight", "scale"),
    [(0.0, [0.0, 4.0], 1.0), (0.25, [1.0, 3.0], 1.5), (1.0, [4.0, 0.0], 3.0)],
)
def test_mixtures_by_hand_with_the_temperature(alpha, weight, scale) -> None:
    """Integers are not mixed, and types stay."""
    mixed = mix(START, TUNED, alpha)
    assert mixed["weight"].tolist() == weight
    assert mixed["logit_scale"].item() == scale
    assert mixed["ids"].tolist() == [2]
    half = {"weight": torch.tensor([1.0], dtype=torch.bfloat16)}
    assert mix(half, half, alpha)["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_a_share_outside_of_the_range_is_refused(alpha) -> None:
    with pytest.raises(ValueError, match="outside of 0 to 1"):
        mix(START, TUNED, alpha)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="differ in 1 tensors, for example weight"):
        mix(START, {**TUNED, "weight": torch.zeros(3)}, 0.5)
