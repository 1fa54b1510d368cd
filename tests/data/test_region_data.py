"""Which regions count, and every kind of data that is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F  # noqa: N812

from gradeclip_ft.data.pairs import CaptionFile
from gradeclip_ft.data.regions import CocoRegions, RegionImages

PIXELS = {"image_size": 64, "patch": 8, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def entry(number: int, box: tuple[float, float, float, float], **changes: Any) -> dict[str, Any]:
    region = {"id": number, "image_id": 1, "category_id": 3, "bbox": list(box), "iscrowd": 0}
    return {**region, "segmentation": polygon(*box), **changes}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., CocoRegions]:
    """Write one 40 x 30 px image with instances; hands back its source."""

    def write(*regions: dict[str, Any], **options: Any) -> CocoRegions:
        Image.fromarray(np.full((30, 40, 3), 128, np.uint8)).save(tmp_path / "1.png")
        content = {
            "images": [{"id": 1, "file_name": "1.png", "height": 30, "width": 40}],
            "annotations": list(regions),
            "categories": [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}],
        }
        (tmp_path / "instances.json").write_text(json.dumps(content))
        return CocoRegions(str(tmp_path / "instances.json"), str(tmp_path), **options)

    return write


def opened(source: CocoRegions) -> RegionImages:
    return source(**PIXELS)


def test_regions_that_do_not_count_are_counted_by_cause(write: Callable[..., CocoRegions]) -> None:
    source = write(
        entry(1, (0, 0, 10, 10)),
        entry(2, (0, 0, 7.9, 8)),  # 63.2 px, below 8 x 8
        entry(3, (0, 0, 8, 8)),
        entry(4, (5, 5, 0, 9)),
        entry(5, (40, 0, 10, 10)),
        entry(6, (0, 0, 10, 10), iscrowd=1),
        entry(7, (0, 0, 20, 20)),
        entry(8, (0, 0, 20, 20)),
        max_regions=7,
    )
    found = opened(source)
    assert [region.id for region in found.chosen[0][1]] == [1, 3, 6, 7]
    assert found.skipped == {
        "small": 1,
        "box without area": 1,
        "box outside the image": 1,
        "beyond the maximum per image": 1,
    }


def test_crowds_are_kept_unless_asked_otherwise(write: Callable[..., CocoRegions]) -> None:
    regions = [entry(1, (0, 0, 10, 10)), entry(2, (0, 0, 10, 10), iscrowd=1)]
    assert opened(write(*regions)).counts["things"] == 2
    without = opened(write(*regions, crowd=False))
    assert (without.counts["things"], without.skipped) == (1, {"crowd": 1})


def test_sample_holds_boxes_masks_and_black_padding(write: Callable[..., CocoRegions]) -> None:
    """40 x 30 px into 64: the content is 64 x 48, cells of 8 px, boxes in units of 40 px."""
    sample = opened(write(entry(1, (10, 5, 20, 10)), entry(2, (0, 0, 40, 30), category_id=17)))[0]
    assert sample.boxes.tolist() == [[0.25, 0.125, 0.75, 0.375], [0.0, 0.0, 1.0, 0.75]]
    assert sample.labels.tolist() == [0, 1]
    assert sample.masks[1, :6].min() == 1
    assert sample.masks[1, 6:].max() == 0
    assert sample.image[:, :48].abs().max() < 0.01  # grey 128 is 0 behind the normalisation
    assert torch.equal(sample.image[:, 48:], torch.full((3, 16, 64), -1.0))  # black is -1


def published_crop(image: Image.Image, box: tuple[float, ...], thing: bool) -> torch.Tensor:
    """CLIPSelf's crop, written after its `COCOPanopticDataset` and `ResizeMaxSize`."""
    x, y, w, h = box
    if thing:
        cx, cy = x + w * 0.5, y + h * 0.5
        x0, y0 = max(cx - w * 0.75, 0), max(cy - h * 0.75, 0)
        x1, y1 = min(cx + w * 0.75, image.width), min(cy + h * 0.75, image.height)
    else:
        x0, y0, x1, y1 = x, y, x + w - 1, y + h - 1  # mask2box: from the first to the last pixel
    crop = image.crop((x0, y0, x1, y1))
    scale = 32 / max(crop.height, crop.width)
    height, width = round(crop.height * scale), round(crop.width * scale)
    crop = F.resize(crop, [height, width], InterpolationMode.BICUBIC)
    spare = 32 - width, 32 - height
    left, top = spare[0] // 2, spare[1] // 2
    crop = F.pad(crop, [left, top, spare[0] - left, spare[1] - top], fill=0)
    return F.normalize(F.to_tensor(crop), [0.5] * 3, [0.5] * 3)


def test_crops_and_boxes_of_stuff_are_clipselfs_on_request(
    write: Callable[..., CocoRegions], tmp_path: Path
) -> None:
    """Edges of halves and thirds of a pixel, at the rim and inside, wide and high."""
    boxes = [(0.0, 2.0, 9.0, 21.0), (10.3, 5.5, 17.0, 7.0), (24.7, 11.2, 15.0, 18.0)]
    stuff = (12, 3, 16, 9)
    entries = [entry(n, box) for n, box in enumerate(boxes)] + [entry(9, stuff, category_id=17)]
    source = write(*entries, clipself=True)
    content = json.loads(Path(source.annotations).read_text())
    content["categories"][1]["isthing"] = 0
    Path(source.annotations).write_text(json.dumps(content))
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    image.save(tmp_path / "1.png")
    sample = source(**PIXELS, crop_size=32)[0]
    x, y, w, h = stuff
    end = torch.tensor([x, y, x + w - 1, y + h - 1]) / 40
    torch.testing.assert_close(sample.boxes[3], end)
    assert sample.crops is not None
    for crop, box, thing in zip(
        sample.crops, [*boxes, stuff], (True, True, True, False), strict=True
    ):
        torch.testing.assert_close(crop, published_crop(image, box, thing), atol=1e-6, rtol=0)
    plain = replace(source, clipself=False)(**PIXELS, crop_size=32)[0]
    torch.testing.assert_close(plain.boxes[3], torch.tensor([x, y, x + w, y + h]) / 40)
    assert plain.crops is not None
    assert (plain.crops - sample.crops).abs().amax((1, 2, 3)).min() > 0.1


def test_batches_keep_the_owner_of_every_region(write: Callable[..., CocoRegions]) -> None:
    """Also from a worker: items and settings have to cross to another process."""
    found = opened(write(*(entry(n, (0, 0, 10, 10)) for n in range(3))))
    (batch,), (there,) = list(found.batches(4, 0)), list(found.batches(4, 1))
    assert batch.owner.tolist() == [0, 0, 0]
    assert batch.masks.shape == (3, 8, 8)
    assert torch.equal(batch.images, there.images)
    assert torch.equal(batch.boxes, there.boxes)


def panoptic(source: CocoRegions) -> None:
    """The annotation file becomes a panoptic one, with one segment in m.png."""
    content = json.loads(Path(source.annotations).read_text())
    segment = {"id": 5, "category_id": 3, "bbox": [0, 0, 20, 20]}
    content["annotations"] = [{"image_id": 1, "file_name": "m.png", "segments_info": [segment]}]
    content["images"].append({"id": 2, "file_name": "1.png", "height": 30, "width": 40})
    Path(source.annotations).write_text(json.dumps(content))


def test_an_image_of_another_size_is_named(
    write: Callable[..., CocoRegions], tmp_path: Path
) -> None:
    found = opened(write(entry(1, (0, 0, 10, 10))))
    Image.new("RGB", (30, 40)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1.png \(id 1\) has 40 x 30 .* says 30 x 40"):
        found[0]


def test_missing_images_are_named(write: Callable[..., CocoRegions], tmp_path: Path) -> None:
    source = write(entry(1, (0, 0, 10, 10)))
    (tmp_path / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 .* first 1.png \(id 1\)"):
        opened(source)


def test_no_region_at_all_is_refused(write: Callable[..., CocoRegions]) -> None:
    with pytest.raises(ValueError, match="no region that counts"):
        opened(write(entry(1, (0, 0, 2, 2))))


def test_panoptic_and_instances_are_not_mixed_up(
    write: Callable[..., CocoRegions], tmp_path: Path
) -> None:
    source = write(entry(1, (0, 0, 10, 10)))
    with pytest.raises(ValueError, match="is not a panoptic file; leave segments="):
        opened(CocoRegions(source.annotations, source.images, segments=str(tmp_path)))
    panoptic(source)
    with pytest.raises(ValueError, match="is a panoptic file; name the folder"):
        opened(source)


def test_missing_pngs_are_named_and_images_without_segments_counted(
    write: Callable[..., CocoRegions], tmp_path: Path
) -> None:
    """A PNG that is not there must not become an image without regions."""
    source = write(entry(1, (0, 0, 10, 10)))
    panoptic(source)
    (tmp_path / "segments").mkdir()
    segmented = CocoRegions(source.annotations, source.images, str(tmp_path / "segments"))
    with pytest.raises(FileNotFoundError, match=r"1 of 1 .* first m.png \(id 1\)"):
        opened(segmented)
    Image.fromarray(np.full((30, 40, 3), (5, 0, 0), np.uint8)).save(tmp_path / "segments" / "m.png")
    assert opened(segmented).counts["skipped"] == {"image without regions": 1}
    Image.new("RGB", (40, 31)).save(tmp_path / "segments" / "m.png")
    with pytest.raises(ValueError, match=r"m.png has 31 x 40 .* says 30 x 40 for image 1"):
        opened(segmented)[0]


def test_missing_data_are_made_once_where_that_is_possible(
    write: Callable[..., CocoRegions], tmp_path: Path
) -> None:
    calls = []

    def make() -> None:
        calls.append(1)
        (tmp_path / "fresh.json").write_text((tmp_path / "instances.json").read_text())

    write(entry(1, (0, 0, 10, 10)))
    source = CocoRegions(str(tmp_path / "fresh.json"), str(tmp_path), make=make)
    source.prepare()
    source.prepare()
    assert (len(calls), len(opened(source))) == (1, 1)


def test_missing_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*a.json; fetch it"):
        CocoRegions(str(tmp_path / "a.json"), str(tmp_path)).prepare()
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no folder .*segments"):
        CocoRegions(
            str(tmp_path / "a.json"), str(tmp_path), segments=str(tmp_path / "segments")
        ).prepare()
    with pytest.raises(FileNotFoundError, match=r"no folder .*images"):
        CaptionFile(str(tmp_path / "a.json"), str(tmp_path / "images"), split="x").prepare()


def test_real_panoptic_and_instance_files_open(shared_dir: Path) -> None:
    """91 COCO photos with instances, 27 with panoptic segments: sizes, ids and masks fit."""
    root = shared_dir / "data" / "coco_mini_open"
    images, annotations = str(root / "images"), root / "annotations"
    segments = CocoRegions(
        str(annotations / "panoptic_val2017.json"),
        images,
        segments=str(annotations / "panoptic_val2017"),
    )(image_size=224, patch=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert (len(segments), len(segments.classes)) == (27, 133)
    assert sum(category.is_thing for category in segments.categories) == 80
    for index in range(0, 27, 4):
        sample = segments[index]
        assert (sample.masks.flatten(1).sum(1) > 0).all()
        assert sample.boxes.min() >= 0
        assert sample.boxes.max() <= 1.001
        # masks lie where their boxes are, at most two cells around
        for box, mask in zip(sample.boxes * 14, sample.masks, strict=True):
            rows, columns = mask.nonzero().T
            assert box[0] - 3 < columns.min() and columns.max() < box[2] + 2  # noqa: PT018
            assert box[1] - 3 < rows.min() and rows.max() < box[3] + 2  # noqa: PT018
    instances = CocoRegions(str(annotations / "instances_val2017.json"), images)(
        image_size=224, patch=16, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    assert (len(instances), len(instances.classes)) == (89, 80)
    skipped = {"small": 12, "image without regions": 2}
    assert instances.counts == {"images": 89, "things": 703, "stuff": 0, "skipped": skipped}
    for index in range(0, 89, 20):
        assert torch.isfinite(instances[index].image).all()


def test_real_captions_open(shared_dir: Path) -> None:
    root = shared_dir / "data" / "coco_mini_open"
    source = CaptionFile(
        str(root / "annotations" / "captions_val2017.json"), str(root / "images"), split="mini"
    )
    pairs = source()
    assert pairs.counts == {"images": 91, "captions": 455, "skipped": {}}
    assert pairs[0][1][0].startswith("A big burly grizzly bear")
