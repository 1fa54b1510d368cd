"""Results on disk: the keys others rely on, damage, and half-written files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gradeclip_ft.results.record import (
    Result,
    data_fingerprint,
    hash_file,
    hash_json,
    read,
    read_mapping,
    versions,
    write_atomically,
)

RESULT = Result(
    evaluator="regions_224",
    metrics={"boxes/top1": 0.5},
    protocol={"image_size": 224},
    data={"hash": "abc"},
    weights={"name": "ViT-B-16", "hash": "def"},
    versions={"torch": "2"},
    run="demo",
    step=300,
    seconds=1.5,
)


def test_a_result_survives_its_file_and_is_replaced(tmp_path: Path) -> None:
    path = RESULT.write(tmp_path / "evaluations")
    content = json.loads(path.read_text())
    assert {"metrics", "protocol", "data", "weights", "versions"} <= set(content)
    path.write_text(json.dumps({**content, "of a later version": 1}))
    assert read(path) == RESULT
    better = replace(RESULT, metrics={"boxes/top1": 0.6})
    better.write(tmp_path / "evaluations")
    assert [file.name for file in path.parent.iterdir()] == ["regions_224@300.json"]
    assert read(path) == better


def test_an_interrupted_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="boxes/top1 is not finite"):
        replace(RESULT, metrics={"boxes/top1": value}).write(tmp_path)


def test_truncated_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = RESULT.write(tmp_path)
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match=r"regions_224@300.json is not complete JSON"):
        read(path)
    path.write_text('{"metrics": {}}')
    with pytest.raises(ValueError, match=r"not an evaluation: data, evaluator, protocol"):
        read(path)


@pytest.mark.parametrize("content", ["", '{"a"', "3", "null", "[" * 100_000])
def test_what_a_crash_left_of_a_file_is_ignored_with_a_warning(tmp_path, caplog, content) -> None:
    path = tmp_path / "environment.json"
    assert read_mapping(path) == {}
    assert not caplog.text
    path.write_text(content)
    assert read_mapping(path) == {}
    assert f"{path} is empty or cut off" in caplog.text


def test_fingerprint_ignores_folders_and_sees_every_change(tmp_path: Path) -> None:
    """The same data on another machine has the same hash; one byte more has another."""

    def fingerprint(folder: str, text: str = "{}", image: str = "1", count: int = 1) -> object:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        files = [place / name for name in ("a.json", "1.jpg", "2.jpg")]
        for file, content in zip(files, (text, image, ""), strict=True):
            file.write_text(content)
        listed = files[1:] if folder == "here" else files[:0:-1]
        return data_fingerprint(files[:1], listed, {"images": count})["hash"]

    first = fingerprint("here")
    assert fingerprint("there") == first
    others = [fingerprint("x", text="{ }"), fingerprint("x", image="12"), fingerprint("x", count=2)]
    assert len({first, *others}) == 4


def test_hashes_have_known_values(tmp_path: Path) -> None:
    """SHA-256 of "abc", from the standard (FIPS 180-2)."""
    (tmp_path / "a").write_text("abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea"
    assert hash_json({"b": 1, "a": 2}) == hash_json({"a": 2, "b": 1})


def test_versions_name_what_is_not_installed() -> None:
    assert versions(["no-such-package"])["no-such-package"] == "not installed"
    assert versions()["torch"].startswith("2.")
