"""The shapes world on disk: shards, COCO files, and when they are built again."""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from pycocotools.coco import COCO

from gradeclip_ft.data import shapes
from gradeclip_ft.data.coco import DrawnScene, write_coco
from gradeclip_ft.data.shapes import make_sample, make_shapes, shard_ranges
from gradeclip_ft.data.shapes_scenes import stuff_names, thing_names

TRAIN, VAL = 60, 30


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(folder, train=TRAIN, val=VAL, seed=0, workers=1)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def members(folder: Path, split: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted((folder / split).glob("*.tar")):
        with tarfile.open(path) as shard:
            for entry in shard:
                assert entry.name not in found, f"{entry.name} twice"
                found[entry.name] = shard.extractfile(entry).read()
    return found


@pytest.mark.parametrize(("split", "count"), [("train", TRAIN), ("val", VAL)])
def test_shards_have_the_layout_of_cc3m(world, split, count):
    """Catches duplicate keys, missing members and names that webdataset would split elsewhere."""
    files = sorted(path.name for path in (world / split).iterdir())
    assert files == [f"shapes-{split}-{number:04d}.tar" for number in range(8)]
    found = members(world, split)
    keys = sorted({name.split(".")[0] for name in found})
    assert keys == [f"{number:09d}" for number in range(1, count + 1)]
    assert sorted(found) == sorted(f"{key}.{end}" for key in keys for end in ("jpg", "json", "txt"))
    for key in keys[:10]:
        picture = Image.open(io.BytesIO(found[f"{key}.jpg"]))
        assert (picture.mode, picture.size) == ("RGB", (64, 64))
        record = json.loads(found[f"{key}.json"])
        assert record["key"] == key
        assert record["caption"] == found[f"{key}.txt"].decode()
        assert set(record) == {"key", "caption", "objects", "background", "seed"}
        assert set(record["objects"][0]) == {"colour", "shape", "size", "box"}


def test_webdataset_reads_the_shards(world):
    """The reader that training uses groups the members into whole samples."""
    urls = [str(path) for path in sorted((world / "train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len({sample["__key__"] for sample in samples}) == len(samples) == TRAIN
    assert all({"jpg", "txt", "json"} <= set(sample) for sample in samples)


def test_jpeg_keeps_the_colours(world):
    """Catches chroma subsampling, which bleeds the colour of small shapes."""
    found = members(world, "train")
    for index in range(10):
        exact = np.asarray(make_sample(0, "train", index).drawing.image, float)
        stored = np.asarray(Image.open(io.BytesIO(found[f"{index + 1:09d}.jpg"])), float)
        assert np.abs(stored - exact).mean() < 6


def test_files_do_not_depend_on_the_number_of_workers(world, tmp_path):
    """Catches random state per process, times in tar headers, and order of completion."""
    make_shapes(tmp_path / "again", train=TRAIN, val=VAL, seed=0, workers=2)
    assert digests(tmp_path / "again") == digests(world)


def test_an_existing_world_is_kept_and_another_one_replaces_it(tmp_path):
    """Catches needless rebuilds, and old files that survive a change of the parameters."""
    folder = tmp_path / "shapes"
    make_shapes(folder, train=10, val=3, seed=0, workers=1)
    first = digests(folder)
    stamp = (folder / "stamp.json").stat()
    make_shapes(folder, train=10, val=3, seed=0, workers=2)
    assert (folder / "stamp.json").stat() == stamp
    make_shapes(folder, train=10, val=2, seed=0, workers=1)
    assert not (folder / "images_val" / "000000003.jpg").exists()
    make_shapes(folder, train=10, val=3, seed=0, workers=1)
    assert digests(folder) == first
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_an_interrupted_build_leaves_the_old_world(tmp_path, monkeypatch):
    """Catches half-written data that looks complete."""
    folder = tmp_path / "shapes"
    make_shapes(folder, train=10, val=3, seed=0, workers=1)
    before = digests(folder)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "write_coco", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(folder, train=10, val=3, seed=1, workers=1)
    assert digests(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def test_foreign_files_are_not_deleted(tmp_path):
    """Catches a rebuild over somebody's photos."""
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"not written by make_shapes; name another folder"):
        make_shapes(tmp_path, train=10, val=3, seed=0, workers=1)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


def test_world_1_is_drawn_as_ever(tmp_path):
    """Numbers of old runs are about these bytes; the hashes are of the program before world 2."""
    seen = hashlib.sha256()
    for split in ("train", "val", "pretrain"):
        for index in range(20):
            sample = make_sample(0, split, index)
            seen.update(np.asarray(sample.drawing.image).tobytes())
            seen.update(sample.drawing.owner.tobytes())
            seen.update("\n".join(sample.captions).encode())
            seen.update(json.dumps(sample.record()).encode())
    assert seen.hexdigest()[:16] == "5e9ca4dfd715ef7b"
    make_shapes(tmp_path / "w", train=10, val=3, seed=0, workers=1)
    files = hashlib.sha256()
    for path in sorted((tmp_path / "w").rglob("*")):
        if path.is_file() and path.name != "stamp.json":
            files.update(str(path.relative_to(tmp_path / "w")).encode())
            files.update(path.read_bytes())
    assert files.hexdigest()[:16] == "d73a206a9d61babd"


def test_the_choosing_split_has_files_of_its_own_scenes(tmp_path):
    """Catches a recipe that is chosen on the scenes that it is then reported on."""
    make_shapes(
        tmp_path / "w", train=3, val=4, seed=0, workers=1, image_size=128, world=2, choose=5
    )
    told = {}
    for split, count in (("val", 4), ("choose", 5)):
        pictures = sorted((tmp_path / "w" / f"images_{split}").iterdir())
        assert {Image.open(path).size for path in pictures} == {(128, 128)}
        told[split] = {path.read_bytes() for path in pictures}
        captions = COCO(tmp_path / "w" / "annotations" / f"captions_{split}.json")
        assert len(captions.anns) == 5 * len(told[split]) == 5 * count
        panoptic = json.loads((tmp_path / "w/annotations" / f"panoptic_{split}.json").read_text())
        assert len(panoptic["annotations"]) == count
    assert not told["val"] & told["choose"]


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": 0}, {"workers": 0}, {"image_size": 8}])
def test_senseless_parameters_are_named(tmp_path, wrong):
    """The message names the parameter, what was given and the least value."""
    given = {"train": 10, "val": 3, "seed": 0, "workers": 1, **wrong}
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"{name} is {value}; it must be at least \d+"):
        make_shapes(tmp_path / "shapes", **given)


def test_an_unknown_world_is_named(tmp_path):
    with pytest.raises(ValueError, match="world is 3; there are 1, 2"):
        make_shapes(tmp_path / "shapes", train=1, val=1, seed=0, workers=1, world=3)


@pytest.mark.parametrize(("count", "shards"), [(3, 3), (8, 8), (60, 8), (10_000, 10), (10_001, 11)])
def test_shards_cover_every_sample_once(count, shards):
    """Catches a lost rest and empty shards."""
    ranges = shard_ranges(count)
    assert len(ranges) == shards
    assert [index for part in ranges for index in part] == list(range(count))
    assert (
        0 < min(map(len, ranges)) <= max(map(len, ranges)) <= min(1000, min(map(len, ranges)) + 1)
    )


def test_pycocotools_reads_captions_and_instances(world):
    """The reference reader sees every object with the box, mask and class that were drawn."""
    captions = COCO(world / "annotations" / "captions_val.json")
    instances = COCO(world / "annotations" / "instances_val.json")
    assert [c["name"] for c in instances.loadCats(sorted(instances.getCatIds()))] == thing_names()
    for index in range(VAL):
        sample = make_sample(0, "val", index)
        told = [entry["caption"] for entry in captions.imgToAnns[index + 1]]
        assert tuple(told) == sample.captions
        found = instances.imgToAnns[index + 1]
        assert len(found) == len(sample.scene.things)
        for number, (entry, thing) in enumerate(zip(found, sample.scene.things, strict=True), 1):
            assert instances.cats[entry["category_id"]]["name"] == thing.name
            mask = instances.annToMask(entry)
            assert np.array_equal(mask == 1, sample.drawing.owner == number)
            x, y, w, h = entry["bbox"]
            assert mask[y : y + h, x : x + w].sum() == mask.sum() == entry["area"]
        stored = world / "images_val" / instances.imgs[index + 1]["file_name"]
        assert Image.open(stored).size == (64, 64)


def test_images_of_val_are_those_of_its_shards(world):
    """Catches two different val splits, one for captions and one for regions."""
    found = members(world, "val")
    for path in (world / "images_val").iterdir():
        assert path.read_bytes() == found[path.name]


def test_panoptic_colours_are_the_ids_of_the_segments(world):
    """Catches 8-bit overflow (ids here need all three channels) and pixels without a segment."""
    content = json.loads((world / "annotations" / "panoptic_val.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    things = {entry["id"] for entry in content["categories"] if entry["isthing"]}
    assert [names[key] for key in sorted(names)] == thing_names() + stuff_names()
    assert len(things) == 64
    assert len(content["annotations"]) == VAL
    for index, entry in enumerate(content["annotations"]):
        picture = Image.open(world / "annotations" / "panoptic_val" / entry["file_name"])
        red, green, blue = np.asarray(picture).astype(int).transpose(2, 0, 1)
        ids, areas = np.unique(red + 256 * green + 65536 * blue, return_counts=True)
        told = {segment["id"]: segment["area"] for segment in entry["segments_info"]}
        assert told == dict(zip(ids.tolist(), areas.tolist(), strict=True))
        background = make_sample(0, "val", index).scene.background.texture
        stuff = [s for s in entry["segments_info"] if s["category_id"] not in things]
        assert [names[s["category_id"]] for s in stuff] == [f"{background} background"]


def test_panoptic_ids_beyond_two_bytes_survive(tmp_path):
    """Image 70's ids are above 65,535: the blue channel carries them."""
    owner = np.array([[0, 1], [1, 1]], np.uint8)
    picture = DrawnScene(70, "a.jpg", ("one",), owner, (1, 0))
    write_coco(tmp_path, "x", [picture], things=["thing"], stuff=["stuff"])
    pixels = np.asarray(Image.open(tmp_path / "panoptic_x" / "a.png")).astype(int)
    assert (pixels @ [1, 256, 65536]).tolist() == [[70001, 70002], [70002, 70002]]


def test_a_segment_without_pixels_is_refused(tmp_path):
    """A segment that nobody sees has no box; the message says which."""
    picture = DrawnScene(1, "a.jpg", (), np.zeros((2, 2), np.uint8), (1, 0))
    with pytest.raises(ValueError, match=re.escape("segment 1 of a.jpg has no pixel")):
        write_coco(tmp_path, "x", [picture], things=["thing"], stuff=["stuff"])
