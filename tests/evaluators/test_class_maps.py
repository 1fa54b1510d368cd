"""ICLIP's metrics and the overlap of maps with masks, on label maps in the public layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from gradeclip_ft.data.label_maps import VOC, ImageNetSMasks, VocMasks
from gradeclip_ft.evaluators.class_maps import ClassMapsEvaluator
from gradeclip_ft.evaluators.maps import LocalisationEvaluator, phrases_of
from gradeclip_ft.models.load import load_clip

WNIDS = ("n01440764", "n01443537", "n02102040")


@dataclass(frozen=True)
class Noise:
    """Random maps, or one minus them."""

    reverse: bool = False
    images_only: ClassVar[bool] = True

    def from_input(self, tower: Any, x: Tensor, target: Tensor, owner: Tensor) -> Tensor:
        seeds = (x[owner].sum((1, 2, 3)) * 100 + target[:, 0] * 1e4).round().long()
        random = [torch.Generator().manual_seed(int(seed) % 2**31) for seed in seeds]
        heat = torch.stack([torch.rand(8, 8, generator=each) for each in random])
        return 1 - heat if self.reverse else heat


def photo(path: Path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(path)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Five photos of 40 x 64 pixels: palette PNGs with void borders; the last has no class."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    listed = root / "ImageSets" / "Segmentation" / "val.txt"
    for folder in (listed.parent, root / "SegmentationClass"):
        folder.mkdir(parents=True)
    names = [f"2007_{number:06d}" for number in range(5)]
    listed.write_text("\n".join(names) + "\n")
    for number, name in enumerate(names):
        photo(root / "JPEGImages" / f"{name}.jpg", (40, 64), number)
        labels = np.zeros((40, 64), np.uint8)
        if number < 4:
            labels[10:30, 8 : 20 + 8 * number] = number % 2 + 1  # aeroplane, bicycle
            labels[0:6, 40:60] = 15
            labels[8:10] = 255
        image = Image.fromarray(labels, mode="P")
        image.putpalette([0, 0, 0] * 256)
        image.save(root / "SegmentationClass" / f"{name}.png")
    return root


@pytest.fixture
def imagenet_s(tmp_path: Path) -> Path:
    """Numbers as R + 256 G, 1000 for void, other names of files for photos and masks."""
    root = tmp_path / "ImageNetS919"
    for number, wnid in enumerate(WNIDS):
        name = f"ILSVRC2012_val_{number:08d}"
        photo(root / "validation" / wnid / f"{name}.JPEG", (64, 64), number)
        labels = np.zeros((64, 64, 3), np.uint8)
        labels[16:48, 16:48, 0] = number + 1
        labels[:4] = (1000 % 256, 1000 // 256, 0)
        path = root / "validation-segmentation" / wnid / f"{name}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(labels).save(path)
    return root


def test_iclips_metrics_are_those_of_loops_over_classes_pictures_and_thresholds(voc: Path) -> None:
    loaded = load_clip("shapes_tiny")
    data, methods = VocMasks(str(voc)), {"noise": Noise(), "reversed": Noise(reverse=True)}
    measured = {
        how: ClassMapsEvaluator("c", data, methods, accumulate=how, batch_size=2)(loaded)
        for how in ("images", "pixels")
    }
    regions = data(image_size=64, patch=1, mean=loaded.mean, std=loaded.std)
    classes = loaded.encode_texts([f"a photo of the {name}" for name in VOC])
    found: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    scores = []
    for batch in regions.batches(1, 0):
        with torch.no_grad():
            embedding = torch.nn.functional.normalize(loaded.clip.image.encode(batch.images), dim=1)
        scores.append((embedding @ classes.T)[0])
        for label, mask in zip(batch.labels.tolist(), batch.masks, strict=True):
            heat = Noise().from_input(None, batch.images, classes[[label]], torch.tensor([0]))
            large = interpolate(heat[None], (64, 64), mode="bicubic")[0, 0].numpy()
            counted = ~batch.ignored[0].numpy()
            low, high = large[counted].min(), large[counted].max()
            place = ((large - low) / (high - low), mask.numpy() > 0, counted)
            found.setdefault(label, []).append(place)
    assert set(found) == {0, 1, 14}
    best, pooled, fmb = [], [], []
    for places in found.values():
        by_threshold, added = [], []
        for step in range(101):
            pairs = [
                (
                    ((heat > step / 100) & mask & counted).sum(),
                    ((heat > step / 100) | mask)[counted].sum(),
                )
                for heat, mask, counted in places
            ]
            by_threshold.append(np.mean([a / b for a, b in pairs]))
            added.append(sum(a for a, _ in pairs) / sum(b for _, b in pairs))
        best.append(max(by_threshold))
        pooled.append(max(added))
        fmb.append(np.mean([heat[m & c].mean() - heat[~m & c].mean() for heat, m, c in places]))
    images, pixels = measured["images"].metrics, measured["pixels"].metrics
    assert images["noise/mMIoU"] == pytest.approx(np.mean(best), abs=1e-5)
    assert pixels["noise/mMIoU"] == pytest.approx(np.mean(pooled), abs=1e-5)
    assert images["noise/mFMB"] == pytest.approx(np.mean(fmb), abs=1e-5)
    assert images["reversed/mFMB"] == pytest.approx(-np.mean(fmb), abs=1e-5)
    precision = []
    for label in found:
        order = sorted(range(5), key=lambda n: -float(scores[n][label]))
        has = [n < 4 and (label == 14 or n % 2 == label) for n in order]
        hits = [sum(has[: k + 1]) / (k + 1) for k in range(5) if has[k]]
        precision.append(np.mean(hits))
    assert images["mAP"] == pytest.approx(np.mean(precision))
    assert measured["images"].details["images_without_phrases"] == 1
    assert measured["images"].details["classes_without_images"] == 17


def test_imagenet_s_is_read_by_sorted_wordnet_ids(imagenet_s: Path) -> None:
    """Void pixels do not count; classes are said by name; phrases are one of each photo."""
    loaded = load_clip("shapes_tiny")
    data = ImageNetSMasks(str(imagenet_s), classes=3)
    regions = data(image_size=64, patch=1, mean=loaded.mean, std=loaded.std)
    (batch,) = regions.batches(3, 0)
    assert batch.labels.tolist() == [0, 1, 2]
    phrases = phrases_of(batch)
    assert phrases.masks.sum((1, 2)).tolist() == [32 * 32] * 3
    assert phrases.counted.sum((1, 2)).tolist() == [60 * 64] * 3
    measured = LocalisationEvaluator("p", data, {"noise": Noise()}, two_class=True)(loaded)
    chance = 32 * 32 / (60 * 64)
    assert measured.metrics["chance/pointing"] == pytest.approx(chance)
    assert measured.metrics["noise/ap"] == pytest.approx(chance, abs=0.15)
    assert measured.metrics["noise/ap_two_class"] == pytest.approx(0.5, abs=0.15)
    with pytest.raises(ValueError, match="has 3 folders, there must be 919"):
        ImageNetSMasks(str(imagenet_s)).prepare()
    (imagenet_s / "validation" / WNIDS[1] / "ILSVRC2012_val_00000001.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match="1 files of 3 pictures and label maps are missing"):
        data(image_size=64, patch=1, mean=loaded.mean, std=loaded.std)


def test_label_maps_of_another_data_set_are_refused(voc: Path) -> None:
    data = VocMasks(str(voc))
    settings = {"image_size": 64, "patch": 1, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    path = voc / "SegmentationClass" / "2007_000002.png"
    Image.fromarray(np.full((40, 64), 40, np.uint8)).save(path)
    with pytest.raises(ValueError, match="has class 40, expected 0 to 20 or 255"):
        data(**settings)[2]
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"has 40 x 64 pixels .* has 4 x 4"):
        data(**settings)[2]
    with pytest.raises(FileNotFoundError, match=r"no list .*; unpack VOCtrainval"):
        VocMasks(str(voc), split="test").prepare()
    for mask in (voc / "SegmentationClass").iterdir():
        Image.fromarray(np.zeros((40, 64), np.uint8)).save(mask)
    with pytest.raises(ValueError, match="no picture has a pixel of a class"):
        ClassMapsEvaluator("c", data, {"noise": Noise()})(load_clip("shapes_tiny"))
