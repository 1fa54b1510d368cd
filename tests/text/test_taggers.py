"""Taggers: what is used when data is there, missing, refused or nonsense."""

import logging
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from gradeclip_ft.text import phrases
from gradeclip_ft.text.phrases import PACKAGE, load_tagger, nltk_problem, prepare_tagger

PENN = {"J": "JJ", "N": "NN", "-": "DT"}
GOOD = {
    word: PENN[letter]
    for sentence, letters in phrases.KNOWN_SENTENCES
    for word, letter in zip(sentence.split(), letters, strict=True)
}
Only = Callable[[Path], None]
Write = Callable[[dict[str, str]], Path]


@pytest.fixture(autouse=True)
def fresh_process() -> None:
    """Download and warning happen once per process; each test is like a process of its own."""
    phrases._warn_fallback.cache_clear()
    phrases._fetch.cache_clear()


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every download fails as it does offline; gives the attempted commands."""
    commands = []

    def run(command: list[str], **options: object) -> None:
        commands.append(command)
        raise subprocess.TimeoutExpired(command, float(str(options["timeout"])))

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_present_data_is_used_without_download(
    written_tagger: Write, tagger_path: Only, no_download: list[list[str]]
) -> None:
    tagger_path(written_tagger(GOOD))
    assert prepare_tagger("auto") == "nltk"
    assert prepare_tagger("nltk") == "nltk"
    assert load_tagger("nltk").tag(["black", "car"]) == [("black", "JJ"), ("car", "NN")]
    assert no_download == []


def test_missing_data_falls_back_to_textblob_with_one_warning(
    tmp_path: Path,
    tagger_path: Only,
    no_download: list[list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Offline, an `nltk.download` returns False silently; workers then die with a LookupError."""
    tagger_path(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [prepare_tagger("auto"), prepare_tagger("auto")] == ["textblob", "textblob"]
    assert len(caplog.records) == 1
    told = caplog.records[0].getMessage()
    assert "run python -m nltk.downloader averaged_perceptron_tagger_eng" in told
    assert len(told) < 200  # the folders and the failed download are for tagger=nltk to tell
    assert len(no_download) == 1
    with pytest.raises(
        LookupError, match=f"{PACKAGE} is in none of .*{tmp_path}.* run `.*after 30"
    ):
        prepare_tagger("nltk")


def test_workers_never_download(
    tmp_path: Path, tagger_path: Only, no_download: list[list[str]]
) -> None:
    """Many processes downloading into one folder corrupt it."""
    tagger_path(tmp_path)
    with pytest.raises(LookupError):
        load_tagger("nltk")
    assert prepare_tagger("auto", fetch=False) == "textblob"
    assert no_download == []


def test_a_download_is_renamed_into_place(
    tmp_path: Path, tagger_path: Only, written_tagger: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file must never be visible under the final name, and no leftovers may stay."""
    source, home = written_tagger(GOOD), tmp_path / "home"
    seen = []

    def run(command: list[str], **options: object) -> None:
        target = Path(command[command.index("-d") + 1]) / "taggers" / PACKAGE
        seen.append(sorted(path.name for path in home.rglob("*.zip")))
        target.parent.mkdir()
        shutil.make_archive(str(target), "zip", source / "taggers", PACKAGE)

    monkeypatch.setattr(subprocess, "run", run)
    tagger_path(home)
    assert prepare_tagger("auto") == "nltk"
    assert seen == [[]]
    assert [path.name for path in (home / "taggers").iterdir()] == [f"{PACKAGE}.zip"]


def test_a_folder_that_others_may_write_gives_our_message(
    written_tagger: Write, tagger_path: Only, no_download: list[list[str]]
) -> None:
    folder = written_tagger(GOOD)
    folder.chmod(0o775)
    tagger_path(folder)
    problem = nltk_problem()
    if problem is None:
        pytest.skip("this NLTK reads folders that others may write")
    assert f"chmod -R go-w '{folder}'" in problem
    assert prepare_tagger("auto") == "textblob"
    assert no_download == []


def test_nonsense_tags_are_found_out(written_tagger: Write, tagger_path: Only) -> None:
    """A mock model tags "beer" as DT, and every caption loses its phrases."""
    tagger_path(written_tagger(GOOD | {"beer": "DT"}))
    with pytest.raises(LookupError, match=r"--N-N-N in 'beer and bananas.*expected N-N-N-N"):
        load_tagger("nltk")


@pytest.mark.parametrize("damage", ["json", "html", "cut"])
def test_damaged_data_are_named_and_replaced_by_textblob(
    damage: str, written_tagger: Write, tagger_path: Only, no_download: list[list[str]]
) -> None:
    """A page or a part in place of NLTK's zip was a traceback with tagger=auto."""
    folder = written_tagger(GOOD)
    if damage == "json":
        (path,) = folder.rglob("*weights.json")
        path.write_text("{")
    else:
        source = folder / "taggers"
        path = Path(shutil.make_archive(str(source / PACKAGE), "zip", source, PACKAGE))
        path.chmod(0o644)
        shutil.rmtree(source / PACKAGE)
        path.write_bytes(b"<html>" * 99 if damage == "html" else path.read_bytes()[:-40])
    tagger_path(folder)
    assert re.search(rf"does not load .*; delete {folder}.*, then run ", str(nltk_problem()))
    assert prepare_tagger("auto") == "textblob"
    assert no_download == []


def test_textblob_needs_no_data_and_other_names_are_refused(
    tmp_path: Path, tagger_path: Only
) -> None:
    tagger_path(tmp_path)
    tagged = load_tagger("textblob").tag(["two", "shaggy", "dogs", "run"])
    assert [tuple(pair) for pair in tagged[1:3]] == [("shaggy", "JJ"), ("dogs", "NNS")]
    with pytest.raises(ValueError, match="use nltk or textblob"):
        load_tagger("spacy")
