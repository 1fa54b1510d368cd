"""Results on disk: the keys others rely on, damage, and half-written files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gradeclip_ft.results.masking import secrets_of_environment
from gradeclip_ft.results.record import (
    Result,
    data_fingerprint,
    hash_file,
    hash_json,
    hash_listing,
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


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    path = RESULT.write(tmp_path / "evaluations")
    assert path == tmp_path / "evaluations" / "regions_224@300.json"
    content = json.loads(path.read_text())
    assert {"metrics", "protocol", "data", "weights", "versions"} <= set(content)
    assert content["metrics"] == {"boxes/top1": 0.5}
    assert read(path) == RESULT


def test_a_result_is_replaced_and_leaves_no_other_file(tmp_path: Path) -> None:
    RESULT.write(tmp_path)
    replace(RESULT, metrics={"boxes/top1": 0.6}).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["regions_224@300.json"]
    assert read(tmp_path / "regions_224@300.json").metrics["boxes/top1"] == 0.6


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


def test_no_secret_of_the_environment_enters_a_result(tmp_path, monkeypatch) -> None:
    """`${oc.env:...}` in an evaluator's option is resolved when the evaluator is built."""
    monkeypatch.setenv("MY_TOKEN", "hunter2-hunter2")
    secrets_of_environment.cache_clear()
    found = replace(RESULT, protocol={"shards": "https://me:p@ss@host/hunter2-hunter2/a.tar"})
    text = found.write(tmp_path).read_text()
    secrets_of_environment.cache_clear()
    assert "https://***@host/***/a.tar" in text
    assert "ss@" not in text


@pytest.mark.parametrize("content", ["", '{"a"', "3", "null", "[" * 100_000])
def test_what_a_crash_left_of_a_file_is_ignored_with_a_warning(tmp_path, caplog, content) -> None:
    path = tmp_path / "environment.json"
    assert read_mapping(path) == {}
    assert not caplog.text
    path.write_text(content)
    assert read_mapping(path) == {}
    assert f"{path} is empty or cut off" in caplog.text


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    path = RESULT.write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "later": 1}))
    assert read(path) == RESULT


def test_fingerprint_ignores_folders_and_sees_every_change(tmp_path: Path) -> None:
    """The same data on another machine has the same hash; one byte more has another."""

    def fingerprint(
        folder: str, *, text: str = "{}", image: bytes = b"1", count: int = 1
    ) -> object:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "a.json").write_text(text)
        (place / "1.jpg").write_bytes(image)
        return data_fingerprint([place / "a.json"], [place / "1.jpg"], {"images": count})["hash"]

    first = fingerprint("here")
    assert fingerprint("there") == first
    others = [
        fingerprint("x", text="{ }"),
        fingerprint("x", image=b"12"),
        fingerprint("x", count=2),
    ]
    assert len({first, *others}) == 4


def test_hashes_have_known_values(tmp_path: Path) -> None:
    """SHA-256 of "abc", from the standard (FIPS 180-2)."""
    (tmp_path / "a").write_text("abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea"
    assert hash_json({"b": 1, "a": 2}) == hash_json({"a": 2, "b": 1})
    (tmp_path / "b").write_text("1")
    both = [tmp_path / "a", tmp_path / "b"]
    assert hash_listing(both) == hash_listing(both[::-1])


def test_versions_name_what_is_not_installed() -> None:
    assert versions(["no-such-package"])["no-such-package"] == "not installed"
    assert versions()["torch"].startswith("2.")
