"""An export folder is complete or absent, and replaces nothing but an earlier export."""

import json
from pathlib import Path

import pytest

from gradeclip_ft.export.job import NOTE, files_of, staged, write_json
from tests.export.small import names_in


def write(folder: Path, kind: str, files: dict[str, str]) -> None:
    with staged(folder, kind) as stage:
        for name, text in files.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).write_text(text)
        write_json({"target": kind, "files": files_of(stage)}, stage / NOTE)


def fail(folder: Path) -> None:
    """A disk that is full in the middle of the weights."""
    with staged(folder, "openclip") as stage:
        (stage / "weights").write_text("half")
        raise OSError("no space left on device")


def test_a_failing_write_leaves_the_previous_export(tmp_path) -> None:
    folder = tmp_path / "out"
    write(folder, "openclip", {"weights": "first"})
    with pytest.raises(OSError, match="no space"):
        fail(folder)
    assert (folder / "weights").read_text() == "first"
    assert names_in(tmp_path) == ["out"]


def test_a_failing_first_write_leaves_nothing(tmp_path) -> None:
    with pytest.raises(OSError, match="no space"):
        fail(tmp_path / "out")
    assert names_in(tmp_path) == []


def test_a_later_export_takes_the_place_of_the_earlier(tmp_path) -> None:
    """Two weights files of two exports would leave the choice to the loader."""
    folder = tmp_path / "out"
    write(folder, "openclip", {"model.safetensors": "old", "text/config.json": "{}"})
    (folder / "mine.txt").write_text("kept")
    write(folder, "openclip", {"model.pt": "new"})
    assert (folder / "mine.txt").read_text() == "kept"
    files = [path.name for path in folder.rglob("*") if path.is_file()]
    assert sorted(files) == [NOTE, "mine.txt", "model.pt"]
    assert json.loads((folder / NOTE).read_text())["files"] == ["model.pt"]


def test_nothing_but_an_export_of_the_same_kind_is_replaced(tmp_path) -> None:
    write(tmp_path / "out", "openclip", {"weights": "first"})
    with pytest.raises(FileExistsError, match=r"holds openclip, .* evaclip .* out=DIR"):
        write(tmp_path / "out", "evaclip", {"weights": "second"})
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "README.md").write_text("years of work")
    with pytest.raises(FileExistsError, match=f"holds files but no {NOTE}"):
        write(tmp_path / "thesis", "openclip", {"README.md": "card"})
    assert (tmp_path / "thesis" / "README.md").read_text() == "years of work"


def test_a_note_that_points_outside_removes_nothing_there(tmp_path) -> None:
    folder = tmp_path / "out"
    write(folder, "openclip", {"weights": "first"})
    (tmp_path / "diary").write_text("mine")
    write_json({"target": "openclip", "files": ["../diary"]}, folder / NOTE)
    write(folder, "openclip", {"weights": "second"})
    assert (tmp_path / "diary").read_text() == "mine"


def test_an_empty_folder_is_used(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "openclip", {"weights": "first"})
    assert names_in(tmp_path / "out") == [NOTE, "weights"]
