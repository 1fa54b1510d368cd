"""Photos read directly: every layout of a table, two parts by photo, order, resuming, faults."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.data.captions import CaptionTrainData
from gradeclip_ft.data.photos import HeldOutPhotos, Photos, PhotoTrainData

Source = Callable[..., CaptionTrainData]
MakePhotos = Callable[..., Path]
TOLD = {f"p{n:02d}.jpg": (f"a black dog near house {n}", f"a cat, red {n}") for n in range(24)}


@pytest.fixture
def folder(tmp_path: Path, jpeg: Callable[[int], bytes]) -> Path:
    """24 photos with two captions each, in a table with columns of its own."""
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(TOLD):
        (tmp_path / "photos" / name).write_bytes(jpeg(number))
    write_table(tmp_path / "t.csv", ",", ("filepath", "title"))
    return tmp_path


def rows() -> list[tuple[str, str]]:
    return [(name, text) for name, texts in TOLD.items() for text in texts]


def write_table(path: Path, delimiter: str, header: Sequence[str]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows()])


def photos(folder: Path, **options: Any) -> Photos:
    return Photos(table=str(folder / "t.csv"), images=str(folder / "photos"), **options)


@pytest.fixture
def training(folder: Path, source: Source) -> Callable[..., PhotoTrainData]:
    """The same photos as training data, six of them held out."""

    def build(**options: Any) -> PhotoTrainData:
        base = source("unused")
        given = {"table": str(folder / "t.csv"), "images": str(folder / "photos"), "holdout": 6}
        given |= {"batch_size": 3, "workers": 0, "tagger": "textblob", "caption": "any"}
        transform = base.transform
        return PhotoTrainData(tokenizer=base.tokenizer, transform=transform, **(given | options))

    return build


def epoch_of(source: PhotoTrainData, **place: int) -> list[CaptionBatch]:
    return list(source.loader(**{"seed": 1, "epoch": 0, "rank": 0, "world_size": 1, **place}))


def keys(batches: Sequence[CaptionBatch]) -> list[str]:
    return [key.split(":")[1] for batch in batches for key in batch.keys]


def names(files: Sequence[Any]) -> set[str]:
    return {file.image.name for file in files}


def test_every_layout_of_a_table_gives_the_same_parts(folder: Path) -> None:
    expected = photos(folder).parts
    assert {f.image.name: f.captions for part in expected for f in part} == TOLD
    write_table(folder / "t.tsv", "\t", ("image", "caption"))
    write_table(folder / "semicolons.csv", ";", ("Bild", "Text dazu"))
    lines = [json.dumps({"img": name, "text": text}) for name, text in rows()]
    (folder / "t.jsonl").write_text("\n".join(lines) + "\n")
    several = [json.dumps({"file": name, "captions": texts}) for name, texts in TOLD.items()]
    (folder / "lines.json").write_text("\n".join(lines) + "\n")
    (folder / "lists.jsonl").write_text("\n".join(several))
    for name, columns in {
        "t.tsv": None,
        "semicolons.csv": ["bild", "Text dazu"],
        "t.jsonl": None,
        "lines.json": None,
        "lists.jsonl": None,
    }.items():
        images = str(folder / "photos")
        assert Photos(table=str(folder / name), images=images, columns=columns).parts == expected
    for name, texts in TOLD.items():
        (folder / "photos" / name).with_suffix(".txt").write_text("\n".join(texts))
    assert Photos(images=str(folder / "photos")).parts == expected


def test_relative_paths_mean_those_of_the_present_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that moved on to another folder got the photos of the first."""
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / f"{name}.png")
        (tmp_path / name / f"{name}.txt").write_text("a photo")
        monkeypatch.chdir(tmp_path / name)
        found += [file.image.name for file in Photos(images=".", holdout=0).parts[0]]
    assert found == ["first.png", "second.png"]


def test_a_table_beside_its_photos_needs_no_folder(folder: Path) -> None:
    with (folder / "beside.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "text"), *((f"photos/{n}", t) for n, t in rows())])
    first, held = Photos(table=str(folder / "beside.csv"), holdout=0.25).parts
    assert names(first) | names(held) == set(TOLD)
    assert len(held) == 6


def test_the_parts_depend_on_names_and_seed_alone(folder: Path) -> None:
    """Would catch a caption of a photo held out that training sees, or a split by rows."""
    rest, held = photos(folder, holdout=5).parts
    assert len(held) == 5
    assert names(rest) | names(held) == set(TOLD)
    assert not names(rest) & names(held)
    mixed = sorted(rows(), key=lambda row: row[1][::-1])
    (folder / "mixed.tsv").write_text("".join(f"./{name}\t{text}\n" for name, text in mixed))
    images = str(folder / "photos")
    again = Photos(table=str(folder / "mixed.tsv"), images=images, holdout=5).parts
    assert names(again[1]) == names(held)
    assert names(photos(folder, holdout=5, holdout_seed=1).parts[1]) != names(held)
    # a photo more or less in the table moves no other one into training
    assert names(held) < names(photos(folder, holdout=8).parts[1])


def test_a_second_table_is_held_out(folder: Path) -> None:
    (folder / "val.csv").write_text("file,text\np03.jpg,a horse\n")
    rest, held = photos(folder, holdout=str(folder / "val.csv")).parts
    assert {file.image.name: file.captions for file in held} == {"p03.jpg": ("a horse",)}
    assert names(rest) == set(TOLD) - {"p03.jpg"}


def test_captions_that_the_model_cannot_read_are_told_once(
    training: Callable[..., PhotoTrainData], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = (folder / "t.csv").read_text().replace("dog", "okapi").replace("cat", "lemur")
    (folder / "t.csv").write_text(table)
    training().prepare()
    assert re.search(r"\(.*okapi.*\) are others, which it cannot tell apart", caplog.text)
    assert caplog.text.count("are others") == 1


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (3, 1), (2, 2)])
def test_an_epoch_has_every_photo_to_train_on_once(
    training: Callable[..., PhotoTrainData], workers: int, world_size: int
) -> None:
    data = training(workers=workers)
    facts = data.prepare()
    assert (facts["photos"], facts["held_out"]) == (18, 6)
    ranks = [epoch_of(data, rank=r, world_size=world_size) for r in range(world_size)]
    found = [keys(batches) for batches in ranks]
    assert [len(batches) for batches in ranks] == [6 // world_size] * world_size
    assert Counter(name for each in found for name in each) == Counter(
        file.image.name for file in data.parts[0]
    )
    assert keys(epoch_of(data, epoch=1)) != keys(epoch_of(data))
    assert keys(epoch_of(data, seed=2)) != keys(epoch_of(data))


@pytest.mark.parametrize(("workers", "start"), [(0, 2), (2, 3)])
def test_an_epoch_continues_where_it_was_interrupted(
    training: Callable[..., PhotoTrainData], folder: Path, workers: int, start: int
) -> None:
    """To the last bit, also with a broken photo before the place."""
    data = training(workers=workers)
    broken = folder / "photos" / keys(epoch_of(data))[1]
    broken.write_bytes(broken.read_bytes()[:-60])
    whole = epoch_of(data)
    assert broken.name not in keys(whole)
    assert sum(batch.skipped.get("broken_image", 0) for batch in whole) >= 1
    for one, two in zip(epoch_of(data, start=start), whole[start:], strict=True):
        assert one.keys == two.keys
        for name in ("images", "captions", "distinct", "identity", "phrase", "owner"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_photos_held_out_that_cannot_be_read_are_counted(folder: Path) -> None:
    held = HeldOutPhotos(table=str(folder / "t.csv"), images=str(folder / "photos"), holdout=6)
    whole = held()
    assert len(whole) == 6
    assert whole.captions == [TOLD[name] for name in whole.names]
    whole.images[0].unlink()
    whole.images[1].write_bytes(b"no picture")
    part = held()
    assert part.names == whole.names[2:]
    assert part.counts["skipped"] == {"missing_image": 1, "broken_image": 1}
    assert "t.csv" in held.protocol["split"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "photos/photos"}, "no folder photos/photos; set images="),
        ({"images": "elsewhere"}, "18 of 18 photos are not in elsewhere, first .*set data.images="),
        ({"table": "twice.csv"}, "begin with photos already: set data.images=."),
        ({"table": "short.csv"}, r"first (\d\d); \1 is 2019/\1\.JPG there; the table"),
        (
            {"table": "keys.jsonl"},
            r"the keys bild, texte; expected one of filename.*data\.columns=",
        ),
        ({"columns": ["file", "title"]}, r"has the columns filepath, title; set columns="),
        ({"table": None, "images": "elsewhere"}, "no photo with a caption in elsewhere"),
        ({"table": None, "images": None}, "no photos; set data.table="),
        ({"table": "broken.jsonl"}, "holds a line that is not JSON"),
        ({"holdout": 1.5}, "holdout=1.5, expected a share below 1 or a whole number of photos"),
        ({"holdout": 24}, "leaves none of 24 photos to train on"),
        ({"batch_size": 20}, "an epoch of 18 samples is less than one batch of 20"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    training: Callable[..., PhotoTrainData],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    (folder / "elsewhere").mkdir()
    twice = [("file", "text"), *((f"photos/{name}", text) for name, text in rows())]
    (folder / "twice.csv").write_text("".join(f"{name},{text}\n" for name, text in twice))
    (folder / "photos" / "2019").mkdir()
    for number in range(10, 20):
        (folder / "photos" / "2019" / f"{number}.JPG").touch()
    (folder / "short.csv").write_text("file,text\n" + "".join(f"{n},dog\n" for n in range(10, 20)))
    (folder / "keys.jsonl").write_text('{"bild": "p00.jpg", "texte": ["a dog"]}\n')
    (folder / "broken.jsonl").write_text('{"file": "a.jpg",\n')
    data = training(**{"table": "t.csv", "images": "photos", **options})

    def use() -> None:
        data.prepare()
        epoch_of(data)

    with pytest.raises((ValueError, FileNotFoundError), match=message):
        use()


def test_photos_missing_in_one_place_are_not_taken_for_all(
    training: Callable[..., PhotoTrainData],
) -> None:
    """Two of 18 are fewer than `max_dropped` allows, also where they are the first two of nine."""
    data = training()
    first, second = (file.image for file in data.parts[0][:2])
    first.unlink()
    second.unlink()
    assert data.require_photos() == [first, second]
    assert data.require_photos(9) == [first]


def test_nothing_held_out_is_nothing_to_measure_on(folder: Path) -> None:
    held = HeldOutPhotos(table=str(folder / "t.csv"), images=str(folder / "photos"), holdout=0)
    with pytest.raises(ValueError, match=r"set data\.holdout= to a share"):
        held.prepare()
