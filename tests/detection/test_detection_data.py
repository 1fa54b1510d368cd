"""Splits, boxes in squares, and batches that depend on seed, epoch and place alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradeclip_ft.data.coco import Category
from gradeclip_ft.data.detection import (
    OV_COCO_BASE,
    OV_COCO_NOVEL,
    CocoBoxes,
    DetectionTrainData,
    Placing,
    split_categories,
    unpack_shapes,
)

COCO_IDS = [k for k in range(1, 91) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
NOVEL_NAMES = {
    *("airplane", "bus", "cat", "dog", "cow", "elephant", "umbrella", "tie", "snowboard"),
    *("skateboard", "cup", "knife", "cake", "couch", "keyboard", "sink", "scissors"),
}

Write = Callable[..., CocoBoxes]


def test_ov_coco_has_48_base_and_17_novel_of_coco_s_80_classes() -> None:
    """Would catch an id that was mistyped."""
    assert (len(set(OV_COCO_BASE)), len(set(OV_COCO_NOVEL))) == (48, 17)
    assert not set(OV_COCO_BASE) & set(OV_COCO_NOVEL)
    assert {*OV_COCO_BASE, *OV_COCO_NOVEL} < set(COCO_IDS)
    with pytest.raises(ValueError, match="48 base and 17 novel"):
        split_categories([Category(key, str(key), True) for key in COCO_IDS[:70]], "ov_coco")


def test_names_of_the_novel_classes_are_those_of_the_papers(shared_dir: Path) -> None:
    """Would catch ids of another numbering; counts are those of the raw file."""
    file = shared_dir / "data" / "coco_mini_open" / "annotations" / "instances_val2017.json"
    boxes = CocoBoxes(str(file), str(file.parents[1] / "images"), "ov_coco")
    names, base = boxes.classes()
    assert set(names[len(base) :]) == NOVEL_NAMES
    content = json.loads(file.read_text())
    counts = boxes().counts
    wanted = {*OV_COCO_BASE, *OV_COCO_NOVEL}
    kept = [one for one in content["annotations"] if one["category_id"] in wanted]
    skipped = counts["skipped"]
    assert counts["base_boxes"] + counts["novel_boxes"] == len(kept) - sum(
        count for cause, count in skipped.items() if cause.startswith("box")
    )
    assert counts["images"] == len({one["image_id"] for one in kept})


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes four grey images of 40 x 60 and annotations of three classes."""

    def make(annotations: list[dict[str, Any]], **settings: Any) -> CocoBoxes:
        for number in range(1, 5):
            pixels = np.full((40, 60, 3), 40 * number, np.uint8)
            pixels[:, 30:] //= 2  # left and right differ
            Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        content = {
            "images": [
                {"id": k, "file_name": f"{k}.png", "height": 40, "width": 60} for k in range(1, 5)
            ],
            "annotations": [{"id": row, **one} for row, one in enumerate(annotations, start=1)],
            "categories": [{"id": 10 * k, "name": n} for k, n in enumerate(("cat", "dog", "cow"))],
        }
        file = tmp_path / "instances.json"
        file.write_text(json.dumps(content))
        split = {"base": ["cow", "cat"], "novel": ["dog"]}
        return CocoBoxes(
            **{"annotations": str(file), "images": str(tmp_path), "split": split, **settings}
        )

    return make


def box(image: int, category: int, *place: float, **more: Any) -> dict[str, Any]:
    """One annotation."""
    return {"image_id": image, "category_id": category, "bbox": list(place), **more}


def test_boxes_of_base_classes_train_and_all_are_tested(write: Write) -> None:
    """Would catch novel boxes in training; boxes that cannot be are counted."""
    source = write(
        [
            box(1, 0, 5, 5, 10, 10),
            box(1, 10, 20, 5, 10, 10),
            box(2, 10, 5, 5, 10, 10),
            box(3, 20, -5, -5, 10, 10),
            box(3, 20, 70, 5, 5, 5),
            box(3, 20, 5, 5, 0, 5),
        ]
    )
    assert source.classes() == (["cow", "cat", "dog"], ["cow", "cat"])
    train, test = source(novel=False), source()
    assert train.counts == {
        "images": 2,
        "base_boxes": 2,
        "novel_boxes": 0,
        "skipped": {
            "box outside the image": 1,
            "box without area": 1,
            "image without boxes": 2,
        },
    }
    assert (test.counts["base_boxes"], test.counts["novel_boxes"]) == (2, 2)
    assert train.chosen[1][1][0].box == (0, 0, 5, 5)  # cut at the edges


def test_splits_that_do_not_fit_are_refused(write: Write) -> None:
    """Would catch a misspelt class, and a class on both sides."""
    some = [box(1, 0, 5, 5, 10, 10)]
    for split, message in (
        ({"base": ["cat"], "novel": ["horse"]}, "no class horse"),
        ({"base": ["cat"], "novel": ["cat"]}, "listed twice"),
        ({"base": ["cat"], "novel": []}, "no novel class"),
        ("lvis", "write ov_coco"),
    ):
        with pytest.raises(ValueError, match=message):
            write(some, split=split)()
    with pytest.raises(ValueError, match="no box that counts"):
        write([box(1, 10, 5, 5, 10, 10)])(novel=False)


PLACING = Placing(32, (0.5,) * 3, (0.25,) * 3, (0.5, 2.0), 0.5)


def test_boxes_follow_the_pixels_through_resize_crop_and_flip() -> None:
    """Would catch boxes that are shifted, not mirrored, or cut at the wrong edge."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:22, 24:44] = 255
    boxes, labels = torch.tensor([[24.0, 10, 44, 22]]), torch.tensor([3])
    checked = 0
    for seed in range(40):
        placed = PLACING(Image.fromarray(pixels), boxes, labels, "a", np.random.default_rng(seed))
        assert (placed.image[:, placed.size[0] :] == 0).all()
        assert (placed.image[:, :, placed.size[1] :] == 0).all()
        content = placed.image[0, : placed.size[0], : placed.size[1]]
        rows, columns = (content > 0).nonzero(as_tuple=True)
        if not len(placed.boxes) or (placed.boxes[0, 2:] - placed.boxes[0, :2]).min() < 2:
            assert len(rows) <= 64  # the crop left a margin of it at most
            continue
        found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (placed.boxes[0] - found).abs().max() <= 1.0
        assert placed.labels.tolist() == [3]
        checked += 1
    assert checked > 20
    plain = PLACING(Image.fromarray(pixels), boxes, labels, "a")
    assert plain.size == (21, 32)
    torch.testing.assert_close(plain.boxes, boxes * 32 / 60)


def train_data(source: CocoBoxes, **changes: Any) -> DetectionTrainData:
    """Batches of one image."""
    settings: dict[str, Any] = {
        "boxes": source,
        "side": 32,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "batch_size": 1,
        "workers": 0,
        "resize": (0.5, 2.0),
    }
    return DetectionTrainData(**{**settings, **changes})


def test_batches_depend_on_seed_epoch_and_place_alone(write: Write) -> None:
    """Would catch a resumed run that sees other crops, and processes that share images."""
    source = write([box(image, 0, 5, 5, 30, 20) for image in (1, 2, 3, 4)])
    data = train_data(source)
    first = list(data.loader(seed=0, epoch=0, rank=0, world_size=1))
    assert len(first) == 4
    again = list(data.loader(seed=0, epoch=0, rank=0, world_size=1, start=2))
    with_worker = list(train_data(source, workers=1).loader(seed=0, epoch=0, rank=0, world_size=1))
    assert all(
        torch.equal(a.images, b.images)
        for a, b in zip([*first[2:], *first], [*again, *with_worker], strict=True)
    )
    other = list(data.loader(seed=0, epoch=1, rank=0, world_size=1))
    assert [batch.keys for batch in first] != [batch.keys for batch in other]
    halves = [list(data.loader(seed=0, epoch=0, rank=rank, world_size=2)) for rank in range(2)]
    seen = [batch.keys for half in halves for batch in half]
    assert sorted(seen) == sorted(batch.keys for batch in first)
    with pytest.raises(ValueError, match="less than one batch"):
        train_data(source, batch_size=5).loader(seed=0, epoch=0, rank=0, world_size=1)


def test_settings_that_make_no_sense_are_refused(write: Write) -> None:
    """Would catch a factor of 0, which makes an image vanish."""
    data = train_data(write([box(1, 0, 5, 5, 30, 20)]), resize=(0.0, 2.0))
    with pytest.raises(ValueError, match="factors above 0"):
        data.prepare()


def test_pictures_of_another_size_than_annotated_are_refused(write: Write) -> None:
    """Would catch boxes that are silently scaled."""
    source = write([box(1, 0, 5, 5, 30, 20)])
    Image.new("RGB", (50, 40)).save(Path(source.images) / "1.png")
    with pytest.raises(ValueError, match="40 x 50 pixels"):
        source().placed(0, PLACING, None)


def test_scenes_of_the_shapes_world_have_their_boxes(tmp_path: Path) -> None:
    """Would catch boxes of another scene: the middle of a box has the colour of its name."""
    folder = tmp_path / "shapes"
    unpack_shapes(folder, scenes=12, train=16, val=2, seed=0)
    source = CocoBoxes(
        str(folder / "annotations" / "instances_train.json"), str(folder / "images_train"), "shapes"
    )
    names, base = source.classes()
    assert (len(names), len(base)) == (64, 58)
    images = source()
    assert len(images.chosen) == 12
    right = total = 0
    colours = {"red": 0, "green": 1, "blue": 2}  # whose channel is the brightest
    for row, (_, regions) in enumerate(images.chosen):
        placed = images.placed(row, Placing(64, (0.0,) * 3, (1.0,) * 3), None)
        for region, (x0, y0, x1, y1) in zip(regions, placed.boxes.tolist(), strict=True):
            colour, shape = names[region.label].split()
            if colour in colours and shape in ("circle", "square", "diamond", "heart"):
                middle = placed.image[:, int((y0 + y1) / 2), int((x0 + x1) / 2)]
                right += int(middle.argmax()) == colours[colour]
                total += 1
    assert total >= 3
    assert right == total
    with pytest.raises(ValueError, match="lower scenes"):
        unpack_shapes(folder, scenes=20, train=16, val=2, seed=0)
