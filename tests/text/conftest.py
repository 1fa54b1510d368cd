"""Tagger data: the real one where it is shared, and small ones written by hand."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nltk
import pytest

from gradeclip_ft.text import phrases


@pytest.fixture
def tagger_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Makes a folder the only one NLTK looks in."""
    phrases.load_tagger.cache_clear()

    def only(folder: Path) -> None:
        phrases.load_tagger.cache_clear()
        monkeypatch.setattr(nltk.data, "path", [str(folder)])
        monkeypatch.setenv("NLTK_DATA", str(folder))

    yield only
    phrases.load_tagger.cache_clear()


@pytest.fixture
def real_tagger(
    shared_dir: Path, tmp_path: Path, tagger_path: Callable[[Path], None]
) -> phrases.Tagger:
    """NLTK's published English tagger, from a private copy: NLTK refuses shared folders."""
    folder = shutil.copytree(
        shared_dir / "data/nltk_data", tmp_path / "nltk", copy_function=shutil.copyfile
    )
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    tagger_path(folder)
    return phrases.load_tagger("nltk")


@pytest.fixture
def written_tagger(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """Writes tagger data that knows only the given words; gives its folder."""

    def write(tags: dict[str, str]) -> Path:
        folder = tmp_path / "written"
        target = folder / "taggers" / phrases.PACKAGE
        target.mkdir(parents=True)
        parts = {"weights": {}, "tagdict": tags, "classes": sorted(set(tags.values()))}
        for part, value in parts.items():
            path = target / f"averaged_perceptron_tagger_eng.{part}.json"
            path.write_text(json.dumps(value))
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return folder

    return write
