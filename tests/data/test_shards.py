"""Writing shards: from COCO files and tables, and what happens to files that are not images."""

import doctest
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gradeclip_ft.data import make_shards
from gradeclip_ft.data.captions import sample_counts
from gradeclip_ft.data.make_shards import CaptionedFile, new_folder, ranges, write_shards
from gradeclip_ft.data.pairs import coco_files, table_files
from gradeclip_ft.data.shards import RawSample, Skips, expand_shards, read_shard


def read_all(folder: Path) -> list[RawSample]:
    return [raw for url in expand_shards(str(folder)) for raw in read_shard(url, Skips())]


@pytest.fixture
def images(tmp_path: Path, jpeg: Callable[[int], bytes]) -> Path:
    """Ten pictures a0.jpg to a9.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        (folder / f"a{number}.jpg").write_bytes(jpeg(number))
    return folder


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(make_shards).failed == 0


@pytest.mark.parametrize(("count", "size"), [(1, 10), (7, 10), (8, 1), (1000, 99), (2001, 1000)])
def test_ranges_cover_all_rows_in_nearly_equal_shards(count: int, size: int) -> None:
    found = ranges(count, size)
    assert [row for rows in found for row in rows] == list(range(count))
    lengths = {len(rows) for rows in found}
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    assert len(found) >= min(8, count)


def test_written_shards_have_the_layout_of_cc3m(tmp_path: Path, images: Path) -> None:
    files = [
        CaptionedFile(images / f"a{n}.jpg", (f" a  dog {n}\n", "", "second"), {"image_id": n})
        for n in range(10)
    ]
    sizes = write_shards(files, tmp_path / "out", name="x", shard_size=100, skips=Skips())
    assert list(sizes) == [f"x-{n:04d}.tar" for n in range(8)]
    assert sum(sizes.values()) == 10
    raws = read_all(tmp_path / "out")
    assert [raw["__key__"] for raw in raws] == [f"{n:09d}" for n in range(10)]
    assert raws[3]["jpg"] == (images / "a3.jpg").read_bytes()
    assert raws[3]["txt"] == b"a dog 3"
    record = json.loads(raws[3]["json"])
    assert record["captions"] == ["a dog 3", "second"]
    assert (record["image_id"], record["source"], record["height"]) == (3, "a3.jpg", 20)
    assert sample_counts(expand_shards(str(tmp_path / "out"))) == list(sizes.values())


def test_files_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path, images: Path) -> None:
    (images / "a1.jpg").write_bytes(b"<html>")
    files = [CaptionedFile(images / f"a{n}.jpg", ("a dog",)) for n in range(3)]
    files += [CaptionedFile(images / "none.jpg", ("a",)), CaptionedFile(images / "a5.jpg", (" ",))]
    skips = Skips()
    sizes = write_shards(files, tmp_path / "out", name="x", shard_size=100, skips=skips)
    assert sum(sizes.values()) == 2
    assert skips.total == {"broken_image": 1, "missing_image": 1, "missing_text": 1}
    with pytest.raises(ValueError, match=r"none of 1 files .*missing_image 1"):
        write_shards(files[3:4], tmp_path / "b", name="x", shard_size=9, skips=Skips())
    assert not (tmp_path / "b").exists()


def test_formats_that_the_loader_does_not_read_become_jpeg(tmp_path: Path) -> None:
    for kind in ("png", "webp", "gif", "bmp"):
        Image.new("RGB", (8, 6), (200, 30, 30)).save(tmp_path / f"a.{kind}")
    files = [
        CaptionedFile(tmp_path / f"a.{kind}", ("x",)) for kind in ("png", "webp", "gif", "bmp")
    ]
    write_shards(files, tmp_path / "out", name="x", shard_size=9, skips=Skips())
    found = [
        next(key for key in raw if key in ("jpg", "png", "webp"))
        for raw in read_all(tmp_path / "out")
    ]
    assert found == ["png", "webp", "jpg", "jpg"]
    image = Image.open(io.BytesIO(read_all(tmp_path / "out")[2]["jpg"]))
    assert (image.format, image.size) == ("JPEG", (8, 6))


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with (
        pytest.raises(FileExistsError, match="is not empty; name another folder"),
        new_folder(tmp_path),
    ):
        pass


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def stop_half_way() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half.tar").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert list(tmp_path.iterdir()) == []


def write_captions(path: Path, **changes: Any) -> Path:
    content = {
        "images": [{"id": n, "file_name": f"a{n}.jpg"} for n in (7, 3, 5)],
        "annotations": [
            {"id": i, "image_id": n, "caption": f"caption {i}"} for i, n in enumerate((5, 7, 5))
        ],
        **changes,
    }
    path.write_text(json.dumps(content))
    return path


def test_coco_files_bring_all_captions_and_leave_out_an_evaluation(
    tmp_path: Path, images: Path
) -> None:
    found = coco_files(write_captions(tmp_path / "c.json"), images)
    assert [(file.image.name, file.captions) for file in found] == [
        ("a7.jpg", ("caption 1",)),
        ("a3.jpg", ()),
        ("a5.jpg", ("caption 0", "caption 2")),
    ]
    other = write_captions(tmp_path / "val.json", images=[{"id": 7, "file_name": "a7.jpg"}])
    kept = coco_files(tmp_path / "c.json", images, other)
    assert [file.record["image_id"] for file in kept] == [3, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\nc,d\n", "expected a header"),
        ("", "expected a header"),
        ("filename,caption\n", "no row"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, images: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        table_files(tmp_path / "t.csv", images)


def test_missing_tables_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no table .*t\.csv"):
        table_files(tmp_path / "t.csv", tmp_path)
    with pytest.raises(FileNotFoundError, match="set images="):
        coco_files(tmp_path / "c.json", tmp_path / "none")
