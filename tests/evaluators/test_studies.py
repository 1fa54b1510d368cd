"""Attributes of objects and sums of maps, against closed forms and hand-made scenes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gradeclip_ft.data.objects import ClevrObjects, ShapesObjects
from gradeclip_ft.data.regions import CocoRegions
from gradeclip_ft.data.shapes import make_shapes
from gradeclip_ft.evaluators.studies import AddibilityEvaluator, AttributesEvaluator, distances
from gradeclip_ft.models.load import load_clip

SETTINGS: dict[str, Any] = {"patch": 1, "mean": (0.0,) * 3, "std": (1.0,) * 3}


@dataclass(frozen=True)
class Additive:
    """The map of a text is the sum of its words' maps: one cell for each word."""

    images_only: ClassVar[bool] = True

    def from_input(self, tower: Any, x: Tensor, target: Tensor, owner: Tensor) -> Tensor:
        return target[:, :16].abs().view(-1, 4, 4)


@dataclass(frozen=True)
class Flat:
    """The same everywhere."""

    images_only: ClassVar[bool] = True

    def from_input(self, tower: Any, x: Tensor, target: Tensor, owner: Tensor) -> Tensor:
        return torch.ones(len(target), 4, 4)


def test_distances_have_their_closed_forms() -> None:
    """A map equal to the mask, a map elsewhere, and a map of zeros, which counts as uniform."""
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :2] = True
    same = distances(mask.float() * 3, mask, 8)
    assert same == pytest.approx(
        {"cosine": 1, "correlation": 1, "otd": 0, "kld": 0, "jsd": 0}, abs=1e-6
    )
    apart = distances(mask.float().roll(4, 1), mask, 8)
    assert apart["cosine"] == 0
    assert apart["otd"] == pytest.approx(0.5)  # half a side to the right
    assert apart["jsd"] == pytest.approx(log(2))
    assert apart["kld"] == pytest.approx(log(1 / 16 / 1e-8))
    none = distances(torch.zeros(8, 8), mask, 4)
    assert none["cosine"] == pytest.approx(0.5)  # √(1/4)
    assert none["correlation"] == 0
    assert none["kld"] == pytest.approx(log(4), abs=1e-5)
    random = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    expected = np.corrcoef(random.flatten(), mask.flatten())[0, 1]
    assert distances(random, mask, 4)["correlation"] == pytest.approx(expected)


def test_coloured_shapes_are_described_by_name_and_box(tmp_path: Path) -> None:
    """Also the whole evaluation: a map equal to the mask is not needed to be finite and counted."""
    tmp_path = tmp_path / "world"
    make_shapes(tmp_path, train=10, val=12, choose=0, seed=0)
    regions = CocoRegions(
        str(tmp_path / "annotations" / "instances_val.json"),
        str(tmp_path / "images_val"),
        min_area=0,
    )
    found = ShapesObjects(regions)(image_size=64, **SETTINGS)
    for (image, some), described in zip(found.pictures.chosen, found.attributes, strict=True):
        for region, words in zip(some, described, strict=True):
            name = found.pictures.classes[region.label]
            assert f"{words['color']} {words['shape']}" == name
            middle = region.box[0] + region.box[2] / 2
            if words.get("location") == "left":
                assert middle < 0.4 * image.width
    evaluator = AttributesEvaluator("a", ShapesObjects(regions), {"sum": Additive()}, cells=4)
    measured = evaluator(load_clip("shapes_tiny"))
    assert {key.split("/")[1].split("_")[0] for key in measured.metrics} == {
        *("color", "shape", "size", "location")
    }
    assert all(np.isfinite(value) for value in measured.metrics.values())
    assert 0 < measured.metrics["sum/color_cosine"] < 1


def test_clevrs_scenes_are_read_with_discs_or_label_maps(tmp_path: Path) -> None:
    """A large sphere at distance 10.5 has a radius of 525 · 0.7 / 10.5 = 35 pixels."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    objects = [
        {"pixel_coords": [120, 160, 10.5], "color": "red", "shape": "cube", "material": "metal",
         "size": "large"},
        {"pixel_coords": [400, 160, 10.5], "color": "red", "shape": "sphere",
         "material": "rubber", "size": "small"},
    ]  # fmt: skip
    scenes = [{"image_filename": "CLEVR_val_000000.png", "objects": objects}]
    scenes.append({"image_filename": "gone.png", "objects": []})
    (tmp_path / "scenes.json").write_text(json.dumps({"scenes": scenes}))
    pixels = np.zeros((320, 480, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "CLEVR_val_000000.png")
    numbers = np.zeros((320, 480), np.uint8)
    numbers[100:200, 50:150], numbers[0:20, 460:] = 1, 2
    Image.fromarray(numbers).save(tmp_path / "masks" / "CLEVR_val_000000.png")
    files = str(tmp_path / "scenes.json"), str(tmp_path / "images")
    discs = ClevrObjects(*files)(image_size=480, **SETTINGS)
    assert len(discs.pictures) == 1
    sample = discs.pictures[0]
    assert sample.masks is not None
    area = sample.masks.sum((1, 2)).tolist()
    assert area == pytest.approx([np.pi * 35**2, np.pi * 17.5**2], rel=0.02)
    assert sample.masks[0, 160, 120] == 1
    assert [one["location"] for one in discs.attributes[0]] == ["left", "right"]
    assert discs.attributes[0][0]["material"] == "metal"
    maps = ClevrObjects(*files, masks=str(tmp_path / "masks"))(image_size=240, **SETTINGS)
    sample = maps.pictures[0]
    assert sample.masks is not None
    assert sample.masks.sum((1, 2)).tolist() == [50 * 50, 10 * 10]
    # A uniform map on two thirds of the square: what it says of the padding does not count.
    flat = AttributesEvaluator("a", ClevrObjects(*files), {"flat": Flat()}, image_size=64)
    found = flat(load_clip("shapes_tiny")).metrics
    share = (np.pi * 35**2 + np.pi * 17.5**2) / (320 * 480)  # of both, which are red
    assert found["flat/color_cosine"] == pytest.approx(share**0.5, rel=0.05)
    assert found["flat/color_kld"] == pytest.approx(-log(share), rel=0.05)
    with pytest.raises(FileNotFoundError, match="no scene file"):
        ClevrObjects("nowhere.json", "images").prepare()


def test_the_sum_of_maps_is_that_of_the_words(tmp_path: Path) -> None:
    """Cosines by hand from the three maps; a row without a word is refused by its line."""
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "1.png")
    table = tmp_path / "concepts.csv"
    head = "file,base,matched,mismatched,kind\n"
    table.write_text(head + "1.png,circle,red,blue,adjective\n1.png,star,cyan,pink,adjective\n")
    loaded = load_clip("shapes_tiny")
    evaluator = AddibilityEvaluator("c", str(table), str(tmp_path), {"m": Additive()})
    measured = evaluator(loaded)

    def maps(*texts: str) -> list[np.ndarray]:
        heat = loaded.encode_texts(texts)[:, :16].abs().double().numpy()
        return [each / each.max() for each in heat]

    values = []
    for base, word in (("circle", "red"), ("star", "cyan")):
        one, other, both = maps(base, word, f"{word} {base}")
        mixed = np.maximum(one, other)
        values.append(mixed @ both / np.linalg.norm(mixed) / np.linalg.norm(both))
    found = measured.metrics["m, maximum/matched_adjective"]
    assert found == pytest.approx(np.mean(values), abs=1e-5)
    assert len(measured.metrics) == 6
    p = measured.details["p_of_paired_t_test"]
    assert set(p) == {  # type: ignore[arg-type]
        f"m, {pair}/{which}_adjective"
        for pair in ("maximum - product", "maximum - sum", "product - sum")
        for which in ("matched", "mismatched")
    }
    table.write_text(head + "1.png,circle,red,,adjective\n")
    with pytest.raises(ValueError, match="line 2: no mismatched; fill the row"):
        evaluator.prepare()
    table.unlink()
    with pytest.raises(FileNotFoundError, match="write a CSV with the columns file, base"):
        evaluator.prepare()
