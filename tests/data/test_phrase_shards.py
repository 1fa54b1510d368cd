"""Shards rewritten with phrases, split, and verified."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradeclip_ft.data import captions
from gradeclip_ft.data.captions import CaptionTrainData
from gradeclip_ft.data.check import Report, has_white_bars, verify_shard
from gradeclip_ft.data.make_shards import add_phrases, split_shards
from gradeclip_ft.data.shards import Skips, read_shard
from gradeclip_ft.text.phrases import RULE, Tagger

Make = Callable[..., list[Path]]
Write = Callable[..., Path]
Files = Callable[..., dict[str, bytes]]


@pytest.fixture
def shard(tmp_path: Path, sample: Files, write_shard: Write) -> Path:
    """Seven samples: two good ones, one with more captions, three with faults, one of JSON."""
    rows = [
        sample(0, "a black dog"),
        sample(1, " a  cat\non a red house "),
        sample(2, "and of the", captions=["a cow and a bird", "and of the", 3]),
        {name: data for name, data in sample(3).items() if not name.endswith("json")},
        {**sample(4), "000000004.json": b"{"},
        {**sample(5), "000000005.txt": b"\xff"},
        {"6.jpg": sample(6)["000000006.jpg"], "6.json": b'{"captions": ["a red horse"]}'},
    ]
    return write_shard(tmp_path / "in/part-0000.tar", rows)


def entries(path: Path) -> list[Any]:
    return [
        json.loads(raw["json"]).get("phrases") if raw["json"] != b"{" else None
        for raw in read_shard(str(path), Skips())
    ]


def test_every_caption_gets_its_phrases_and_nothing_else_changes(
    shard: Path, tmp_path: Path
) -> None:
    numbers = add_phrases(str(shard), tmp_path, tagger="textblob", max_phrases=5)
    written = tmp_path / shard.name
    found = entries(written)
    assert found[0] == {
        "rule": RULE,
        "tagger": "textblob",
        "max_phrases": 5,
        "found": {"a black dog": ["black dog"]},
    }
    assert found[1]["found"] == {"a cat on a red house": ["cat", "red house"]}
    assert found[2]["found"] == {"and of the": [], "a cow and a bird": ["cow", "bird"]}
    assert list(found[3]["found"].values()) == [["black bird", "house"]]
    assert found[4:6] == [None, None]
    assert found[6]["found"] == {"a red horse": ["red horse"]}
    assert numbers == {
        "samples": 7,
        "captions": 6,
        "phrases": 8,
        "captions_without_phrase": 1,
        "broken_json": 1,
        "bad_encoding": 1,
    }
    for before, after in zip(
        read_shard(str(shard), Skips()), read_shard(str(written), Skips()), strict=True
    ):
        assert (before["__key__"], before["jpg"], before.get("txt")) == (
            after["__key__"],
            after["jpg"],
            after.get("txt"),
        )


def test_a_finished_shard_is_left_alone_and_others_are_made_again(shard: Path) -> None:
    """In place: the folder of the shards is the folder to write to."""
    folder = shard.parent
    add_phrases(str(shard), folder, tagger="textblob", max_phrases=5)
    content = shard.read_bytes()
    again = add_phrases(str(shard), folder, tagger="textblob", max_phrases=5)
    assert again == {"shards_done_before": 1}
    assert shard.read_bytes() == content
    add_phrases(str(shard), folder, tagger="textblob", max_phrases=1)
    assert entries(shard)[0]["max_phrases"] == 1
    assert os.listdir(folder) == [shard.name]


def test_a_remote_shard_is_written_under_its_name_without_the_signature(
    shard: Path, tmp_path: Path, web: str
) -> None:
    """No loader finds `part-0000.tar?X-Amz-Signature=...`, and the signature is a secret."""
    (tmp_path / "out").mkdir()
    url = f"{web}/in/{shard.name}?X-Amz-Signature=dead/beef"
    assert add_phrases(url, tmp_path / "out", tagger="textblob", max_phrases=5)["captions"] == 6
    assert os.listdir(tmp_path / "out") == [shard.name]


def test_batches_are_the_same_with_stored_and_with_found_phrases(
    tmp_path: Path,
    make_shards: Make,
    source: Callable[..., CaptionTrainData],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (path,) = make_shards(tmp_path / "in", sizes=[8])
    (tmp_path / "out").mkdir()
    add_phrases(str(path), tmp_path / "out", tagger="textblob", max_phrases=20)

    def batches(folder: str) -> list[Any]:
        data = source(str(tmp_path / folder), resampled=False, max_phrases=1)
        return list(data.loader(seed=0, epoch=0, rank=0, world_size=1))

    found = batches("in")

    def refuse(_: object) -> list[list[str]]:
        raise AssertionError("a stored phrase was looked for again")

    monkeypatch.setattr(captions, "load_tagger", lambda name: Tagger(name, refuse))
    for one, two in zip(found, batches("out"), strict=True):
        assert torch.equal(one.identity, two.identity)
        assert torch.equal(one.owner, two.owner)


def test_splitting_keeps_every_sample_in_order(tmp_path: Path, make_shards: Make) -> None:
    urls = [str(path) for path in make_shards(tmp_path / "in", sizes=[7, 14])]
    sizes = split_shards(urls, tmp_path / "out", name="x", shard_size=2)
    assert len(sizes) == 11
    assert max(sizes.values()) == 2
    keys = [
        raw["__key__"]
        for name in sizes
        for raw in read_shard(str(tmp_path / "out" / name), Skips())
    ]
    assert keys == [f"{number:09d}" for number in range(21)]


def test_a_report_names_what_training_would_skip(shard: Path, write_shard: Write) -> None:
    """And nothing else: captions in a .json alone were called missing."""
    report = verify_shard(str(shard))
    assert (report.samples, report.usable) == (7, 5)
    assert report.causes == {"broken_json": 1, "bad_encoding": 1}
    assert report.examples["broken_json"].startswith("part-0000.tar:000000004: ")
    dotted = write_shard(shard.parent / "b.tar", [{"my.photo.jpg": b"", "my.photo.txt": b"x"}])
    total = Report()
    total.join(report)
    total.join(verify_shard(str(dotted)))
    assert "my.photo.jpg is split at its first dot" in total.examples["dotted_name"]
    assert total.causes["missing_text"] == 1
    total.join(verify_shard(str(shard.parent / "none.tar")))
    assert total.causes["unreadable_shard"] == 1
    assert (total.shards, total.samples, total.usable) == (3, 8, 5)


def test_white_bars_are_seen() -> None:
    photo = np.full((100, 60, 3), 120, np.uint8)
    padded = np.full((100, 100, 3), 255, np.uint8)
    padded[:, 20:80] = photo
    bright_sky = photo.copy()
    bright_sky[:30] = 255
    assert has_white_bars(padded)
    assert has_white_bars(padded.transpose(1, 0, 2))
    assert not has_white_bars(photo)
    assert not has_white_bars(bright_sky)
    assert not has_white_bars(np.full((20, 20, 3), 255, np.uint8))
