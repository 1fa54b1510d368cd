"""Captions in every public layout, written here as they are published, give the same pairs."""

import csv
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradeclip_ft.data.pairs import (
    CaptionFile,
    RetrievalShards,
    read_captioned,
    table_files,
)

CAPTIONS = {
    "1007129816.jpg": ("A man, with pierced ears.", 'He says "hello, you".', "  third "),
    "1009434119.jpg": ("A black and white dog.",),
    "101362133.jpg": ("A young child.", "A kid, kicking."),
}
Source = CaptionFile | RetrievalShards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of different grey."""
    (tmp_path / "images").mkdir()
    for grey, name in enumerate(CAPTIONS):
        Image.fromarray(np.full((4, 6, 3), 80 * grey, np.uint8)).save(tmp_path / "images" / name)
    return tmp_path


def captions(folder: Path, name: str, content: Any, images: str = "images", **more: Any) -> Source:
    """A file of captions: a text, or the content of a JSON."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, newline="")
    return CaptionFile(str(folder / name), str(folder / images), "test", **more)


def rows_of(pairs: dict[str, tuple[str, ...]] = CAPTIONS) -> list[tuple[str, int, str]]:
    """Image, number of the caption, caption."""
    return [(name, n, text.strip()) for name in pairs for n, text in enumerate(pairs[name])]


def karpathy_text(folder: Path) -> Source:
    rows = [f"{name},{text}" for name, _, text in rows_of()]
    return captions(folder, "test_karpathy.txt", "\n".join(["image,caption", *rows]) + "\n")


def token_file(folder: Path) -> Source:
    rows = rows_of({**CAPTIONS, "7.jpg": ("of the training split",)})
    (folder / "test.txt").write_text("1007129816\n1009434119.jpg\n101362133\n")
    text = "".join(f"{name}#{n}\t{text}\n" for name, n, text in rows)
    return captions(folder, "results.token", text, names=str(folder / "test.txt"))


def quoted_table(folder: Path) -> Source:
    """As spreadsheets write it: quotes around what holds a tab, a quotation mark or a comma."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", quoting=csv.QUOTE_ALL)
    writer.writerows([("image", "caption"), *((name, text) for name, _, text in rows_of())])
    return captions(folder, "captions.tsv", text.getvalue())


def karpathy_images(**more: Any) -> list[dict[str, Any]]:
    return [
        {"filename": name, "split": "test", "sentences": [{"raw": text} for text in texts], **more}
        for name, texts in CAPTIONS.items()
    ]


def karpathy_json(folder: Path) -> Source:
    images = [*karpathy_images(), {"filename": "7.jpg", "split": "train", "sentences": []}]
    return captions(folder, "dataset_flickr30k.json", {"images": images}, part="test")


def karpathy_json_with_folders(folder: Path) -> Source:
    images = karpathy_images(filepath="images")
    return captions(folder, "dataset_coco.json", {"images": images}, "", part="test")


def image_list(folder: Path) -> Source:
    entries = [{"image": f"images/{n}", "caption": list(texts)} for n, texts in CAPTIONS.items()]
    return captions(folder, "flickr30k_test.json", entries, "")


def caption_list(folder: Path) -> Source:
    """A row per caption."""
    rows = [{"image": name, "caption": text} for name, _, text in rows_of()]
    return captions(folder, "captions.json", rows)


def coco(folder: Path) -> Source:
    names = list(CAPTIONS)
    images = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    rows = [{"image_id": names.index(name), "caption": text} for name, _, text in rows_of()]
    return captions(folder, "captions_val2017.json", {"images": images, "annotations": rows})


def coco_by_caption(folder: Path) -> Source:
    """An image id per caption."""
    images = [{"id": n, "file_name": name} for n, (name, _, _) in enumerate(rows_of())]
    rows = [{"image_id": n, "caption": text} for n, (_, _, text) in enumerate(rows_of())]
    return captions(folder, "captions.json", {"images": images, "annotations": rows})


def shards(folder: Path) -> Source:
    (folder / "test").mkdir()
    for number, names in enumerate((list(CAPTIONS)[:2], list(CAPTIONS)[2:])):
        files = {}
        for n, name in enumerate(names):
            files[f"s{2 * number + n}.jpg"] = (folder / "images" / name).read_bytes()
            files[f"s{2 * number + n}.txt"] = "\n".join(map(str.strip, CAPTIONS[name])).encode()
        write_tar(folder / "test" / f"{number}.tar", files)
    (folder / "test" / "nshards.txt").write_text("2")
    return RetrievalShards(str(folder / "test"), "test")


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


LAYOUTS = (
    *(karpathy_text, token_file, quoted_table, karpathy_json, karpathy_json_with_folders),
    *(image_list, caption_list, coco, coco_by_caption, shards),
)


def tokens(texts: Any, *, trim: bool = False) -> torch.Tensor:
    return torch.tensor([[len(text)] for text in texts])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_pairs(layout: Callable[[Path], Source], folder: Path) -> None:
    """Commas, quotation marks and blanks in captions, uneven numbers of them."""
    pairs = layout(folder)()
    expected = [tuple(text.strip() for text in texts) for texts in CAPTIONS.values()]
    found = [pairs[row] for row in range(len(pairs))]
    assert [captions for _, captions in found] == expected
    assert [image.getpixel((0, 0))[0] for image, _ in found] == [0, 80, 160]
    assert pairs.counts == {"images": 3, "captions": 6, "skipped": {}}


def test_workers_read_shards_as_well(folder: Path) -> None:
    """What opens an image has to cross to another process."""

    def images(workers: int) -> torch.Tensor:
        pairs = shards(folder) if not (folder / "test").exists() else reopened
        batches = pairs().pairs(_pixels, tokens, batch_size=2, workers=workers)
        return torch.cat([batch.images for batch in batches])

    reopened = RetrievalShards(str(folder / "test"), "test")
    assert torch.equal(images(0), images(1))


def _pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_a_line_break_inside_a_caption_of_a_shard_is_a_blank(folder: Path) -> None:
    image = (folder / "images" / "101362133.jpg").read_bytes()
    write_tar(folder / "0.tar", {"s0.jpg": image, "s0.txt": b"first \\n half\nsecond\n"})
    assert RetrievalShards(str(folder), "x")()[0][1] == ("first half", "second")


@pytest.mark.parametrize(
    ("part", "message"),
    [(None, r"no part None; set part= to one of test \(3\), train \(1\)"), ("val", "no part val")],
)
def test_a_missing_part_is_named_with_those_that_are_there(
    folder: Path, part: str | None, message: str
) -> None:
    """The whole of Flickr30k, or another split, would give other recalls."""
    with pytest.raises(ValueError, match=message):
        replace(karpathy_json(folder), part=part)()
    with pytest.raises(ValueError, match="one split alone; leave part=test out"):
        replace(coco(folder), part="test")()


def test_names_without_captions_are_refused(folder: Path) -> None:
    source = token_file(folder)
    (folder / "test.txt").write_text("1007129816\n31\n")
    with pytest.raises(ValueError, match="1 of 2 names have no caption, first 31"):
        source()


def test_missing_shards_and_damaged_ones_are_named(folder: Path) -> None:
    source = shards(folder)
    (folder / "test" / "1.tar").write_bytes((folder / "test" / "1.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"1.tar is not a complete tar .*fetch it again"):
        source()
    (folder / "test" / "1.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"has 1 shards, its nshards.txt says 2"):
        source()
    with pytest.raises(FileNotFoundError, match=r"no .tar in "):
        RetrievalShards(str(folder / "nothing"), "x").prepare()


def test_a_broken_image_in_a_shard_is_named(folder: Path) -> None:
    write_tar(folder / "0.tar", {"s7.jpg": b"no picture", "s7.txt": b"first"})
    with pytest.raises(ValueError, match=r"0.tar:s7 cannot be read as an image"):
        RetrievalShards(str(folder), "x")()[0]


def test_a_list_of_something_else_and_a_cut_file_are_named(folder: Path) -> None:
    source = captions(folder, "a.json", [{"image": "1007129816.jpg"}])
    with pytest.raises(
        ValueError, match=r"has the keys image; expected one of filename, .*caption"
    ):
        source()
    (folder / "a.json").write_text('[{"image": "10071298')
    with pytest.raises(ValueError, match="not complete JSON"):
        source()


def test_a_subset_of_the_images_is_drawn_by_seed(folder: Path) -> None:
    part = replace(karpathy_text(folder), expected=3, limit=2)
    assert part().counts["images"] == 2
    assert part().names == part().names
    assert part.protocol["subset"] == "2 images drawn with seed 0"


@pytest.mark.parametrize(
    ("text", "expected", "dropped"),
    [
        ('1.jpg\t"a ""big"" dog"\n1.jpg\tplain\n', {"1.jpg": ['a "big" dog', "plain"]}, 0),
        ('1.jpg\t"two\nlines"\n2.jpg\tb\n', {"1.jpg": ["two lines"], "2.jpg": ["b"]}, 0),
        ('image,caption\n1.jpg,"a, b"\n', {"1.jpg": ["a, b"]}, 0),
        ('image,caption,x\n1.jpg,"a ""b""",3\n', {"1.jpg": ['a "b"']}, 0),
        ('caption,image\n"a, b",1.jpg\n', {"1.jpg": ["a, b"]}, 0),
        ('id,filename,caption\r\n1,1.jpg,"""stop"" it says"\r\n', {"1.jpg": ['"stop" it says']}, 0),
        ("\ufefffile_name\ttext\n1.jpg\ta, b\n\n1.jpg\tc", {"1.jpg": ["a, b", "c"]}, 0),
        # not csv's rules: as it is written, and the rows after it stay rows
        ('1.jpg\t"Stop" says the sign\n2.jpg\t"b\n3.jpg\tc "d"\n',
         {"1.jpg": ['"Stop" says the sign'], "2.jpg": ['"b'], "3.jpg": ['c "d"']}, 0),
        ('1.jpg,"Yes", he said, "no"\n', {"1.jpg": ['"Yes", he said, "no"']}, 0),
        ("1.jpg\ta\r\n2.jpg\r\n\tb\r\n\r\n3.jpg\tc\r\n", {"1.jpg": ["a"], "3.jpg": ["c"]}, 2),
    ],
)  # fmt: skip
def test_tables_follow_the_rules_of_csv_where_their_rows_do(
    tmp_path: Path, text: str, expected: dict[str, list[str]], dropped: int
) -> None:
    """Kept quotes, cut rows and rows that vanish uncounted."""
    (tmp_path / "a.txt").write_bytes(text.encode())
    skipped: Counter[str] = Counter()
    found = read_captioned(tmp_path / "a.txt", None, skipped)
    assert {image.file_name: list(image.captions) for image in found} == expected
    assert sum(skipped.values()) == dropped


def test_captions_of_a_list_that_are_not_text_are_counted(folder: Path) -> None:
    entries = [{"image": "101362133.jpg", "caption": [None, "a dog"]}]
    entries += [{"image": "1009434119.jpg", "caption": None}]
    pairs = captions(folder, "a.json", entries)()
    assert pairs.captions == [("a dog",)]
    assert pairs.counts["skipped"] == {"caption that is not text": 2, "image without caption": 1}
    with pytest.raises(ValueError, match="image number 0 is None, expected a file name"):
        captions(folder, "a.json", [{"image": None, "caption": "a"}])()


def test_absolute_names_below_the_folder_are_taken(folder: Path) -> None:
    table = folder / "a.tsv"
    table.write_text(f"{folder}/images/101362133.jpg\ta child\n")
    (file,) = table_files(table, folder / "images")
    assert file.image == folder / "images" / "101362133.jpg"
    for name in ("../x.jpg", "/etc/x.jpg"):
        table.write_text(f"{name}\ta child\n")
        with pytest.raises(ValueError, match=f"names {name}, which is not below"):
            table_files(table, folder / "images")
