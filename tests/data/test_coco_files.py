"""COCO's files: known values, and every kind of damage with its message."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from gradeclip_ft.data.coco import read_captions, read_regions, read_segment_ids, region_masks

IMAGE = {"id": 7, "file_name": "a.jpg", "height": 6, "width": 8}
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def instance(**changes: Any) -> dict[str, Any]:
    entry = {"id": 5, "image_id": 7, "category_id": 90, "bbox": [1, 2, 3, 2], "iscrowd": 0}
    return {**entry, "segmentation": [[1, 2, 4, 2, 4, 4, 1, 4]], **changes}


def instances(path: Path, *entries: dict[str, Any]) -> Path:
    content = {"images": [IMAGE], "annotations": list(entries), "categories": CATEGORIES}
    return write(path / "instances.json", content)


def test_labels_are_ranks_of_the_sorted_category_ids(tmp_path: Path) -> None:
    """Ids are sparse and the list may come in any order."""
    categories, pictures = read_regions(instances(tmp_path, instance()))
    assert [category.name for category in categories] == ["person", "toothbrush"]
    assert pictures[0].regions[0].label == 1


def test_lvis_names_an_image_by_its_address(tmp_path: Path) -> None:
    """Its validation set holds photos of both folders of COCO, and no file names."""
    image = {**IMAGE, "coco_url": "http://images.cocodataset.org/val2017/000000397133.jpg"}
    del image["file_name"]
    content = {"images": [image], "annotations": [instance()], "categories": CATEGORIES}
    _, pictures = read_regions(write(tmp_path / "lvis.json", content))
    assert pictures[0].file_name == "val2017/000000397133.jpg"


def test_panoptic_id_70000_survives_eight_bit_colours(tmp_path: Path) -> None:
    """R + 256 G + 65536 B in uint8 would overflow: 70000 = 112 + 17 * 256 + 1 * 65536."""
    colours = np.zeros((2, 3, 3), np.uint8)
    colours[1, 2] = (112, 17, 1)
    Image.fromarray(colours).save(tmp_path / "a.png")
    assert read_segment_ids(tmp_path / "a.png").tolist() == [[0, 0, 0], [0, 0, 70000]]


def test_polygons_packed_and_counted_run_lengths_give_the_same_mask(tmp_path: Path) -> None:
    expected = np.zeros((6, 8), np.uint8)
    expected[2:4, 1:4] = 1
    packed = rle.encode(np.asfortranarray(expected))
    text = {"size": [6, 8], "counts": packed["counts"].decode()}
    runs = np.diff(np.flatnonzero(np.diff(expected.T.flatten(), prepend=2, append=2)))
    counted = {"size": [6, 8], "counts": runs.tolist()}
    outlines = [[[1, 2, 4, 2, 4, 4, 1, 4]], text, counted]
    entries = [instance(id=n, segmentation=outline) for n, outline in enumerate(outlines)]
    _, (picture,) = read_regions(instances(tmp_path, *entries))
    for mask in region_masks(picture, picture.regions, None):
        assert mask.tolist() == expected.tolist()


def test_captions_keep_their_number_per_image(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in (3, 1, 2)]
    captions = [{"image_id": n, "caption": f" text {k}\n"} for n, k in ((1, 0), (3, 1), (1, 2))]
    content = {"images": images, "annotations": captions}
    found = read_captions(write(tmp_path / "captions.json", content))
    assert [(entry.id, entry.captions) for entry in found] == [
        (3, ("text 1",)),
        (1, ("text 0", "text 2")),
        (2, ()),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "images that are not listed, first image_id 8"),
        ({"image_id": "7"}, r"first image_id '7' \(images have ids such as 7\)"),
        ({"category_id": 2}, "region 5 has category 2, which is not listed"),
        ({"bbox": [1, 2, 3]}, "box of region 5"),
        ({"bbox": None}, "box of region 5 is None"),
        ({"bbox": [1, 2, float("nan"), 3]}, r"box of region 5 is \[1, 2, nan, 3\]"),
        ({"bbox": [1, 2, "3", 3]}, "box of region 5"),
        ({"segmentation": [1, 2, 4, 2, 4, 4]}, "region 5 is a flat list"),
    ],
)
def test_an_annotation_that_makes_no_sense_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"instances.json: .*{message}"):
        read_regions(instances(tmp_path, instance(**change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [IMAGE, IMAGE]}, "1 entries of images have an id .*, first 7"),
        ({"categories": [*CATEGORIES, CATEGORIES[0]]}, "entries of categories .* first 90"),
        ({"categories": [{"id": 90}]}, "entry 90 has no name"),
        ({"images": [{**IMAGE, "height": None}]}, "entry 7 has height None"),
        ({"annotations": None}, "annotations is not a list of objects"),
        ({"images": ["a.jpg"]}, "images is not a list of objects"),
    ],
)
@pytest.mark.parametrize("read", [read_regions, read_captions])
def test_lists_that_make_no_sense_are_named(
    tmp_path: Path, change: dict[str, Any], message: str, read: Callable[[Path], object]
) -> None:
    """Of two images with one id, both would get the annotations, and no number would be right."""
    content = {"images": [IMAGE], "annotations": [], "categories": CATEGORIES, **change}
    path = write(tmp_path / "a.json", content)
    if read is read_captions and ("categories" in change or "height" in message):
        assert read(path)  # which it has no use for
        return
    with pytest.raises(ValueError, match=message):
        read(path)


def test_two_panoptic_annotations_of_one_image_are_refused(tmp_path: Path) -> None:
    entry = {"image_id": 7, "file_name": "a.png", "segments_info": []}
    content = {"images": [IMAGE], "annotations": [entry, entry], "categories": CATEGORIES}
    with pytest.raises(ValueError, match="image 7 has two panoptic annotations"):
        read_regions(write(tmp_path / "a.json", content))


@pytest.mark.parametrize(
    "outline",
    [
        {"size": [6, 8], "counts": "~~~~"},
        {"size": [6, 8], "counts": [40, "x"]},
        {"size": [6, 8]},
        [["a", "b", "c", "d", "e", "f"]],
    ],
)
def test_a_broken_outline_is_named(tmp_path: Path, outline: Any) -> None:
    _, (picture,) = read_regions(instances(tmp_path, instance(segmentation=outline)))
    with pytest.raises(ValueError, match="outline of region 5, image 7: neither polygons nor run"):
        region_masks(picture, picture.regions, None)


def test_captions_that_are_not_text_are_left_out_and_counted(tmp_path: Path) -> None:
    """As texts they would be "None" and "nan", and an image's only right answer."""
    captions = [{"image_id": 7, "caption": text} for text in (None, "a dog", float("nan"), 5)]
    skipped: Counter[str] = Counter()
    path = write(tmp_path / "a.json", {"images": [IMAGE], "annotations": captions})
    assert read_captions(path, skipped)[0].captions == ("a dog",)
    assert skipped == {"caption that is not text": 3}


def test_truncated_json_missing_file_and_other_kinds_are_named(tmp_path: Path) -> None:
    path = instances(tmp_path, instance())
    for text in (path.read_text()[:-20], "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"instances.json is not complete JSON"):
            read_regions(path)
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*absent.json"):
        read_regions(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="has no categories"):
        read_regions(write(tmp_path / "b.json", {"images": [], "annotations": []}))


def test_masks_of_another_size_are_named(tmp_path: Path) -> None:
    entry = instance(segmentation={"size": [5, 8], "counts": [40]})
    _, (picture,) = read_regions(instances(tmp_path, entry))
    with pytest.raises(ValueError, match="region 5, image 7 has 5 x 8"):
        region_masks(picture, picture.regions, None)


def test_segment_without_a_pixel_is_named(tmp_path: Path) -> None:
    """Annotation file and PNG of different versions would give empty masks."""
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    segment = {"id": 9, "category_id": 1, "bbox": [0, 0, 3, 3], "iscrowd": 0}
    annotation = {"image_id": 7, "file_name": "a.png", "segments_info": [segment]}
    content = {"images": [IMAGE], "annotations": [annotation], "categories": CATEGORIES}
    _, (picture,) = read_regions(write(tmp_path / "panoptic.json", content))
    with pytest.raises(ValueError, match=r"a.png: segment 9 of image 7 has no pixel"):
        region_masks(picture, picture.regions, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no image .*a.png"):
        region_masks(picture, picture.regions, tmp_path / "elsewhere")
