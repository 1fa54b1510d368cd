"""Pictures for the page: which are chosen, where the boxes lie, what the numbers say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradeclip_ft.commands import report
from gradeclip_ft.data.coco import CocoImage, Region
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.load import load_clip

NAMES = ["red circle", "blue star", "car"]
PICTURE = CocoImage(
    id=1,
    file_name="1.jpg",
    height=50,
    width=100,
    regions=(
        Region(id=1, label=0, box=(10.0, 5.0, 30.0, 20.0), crowd=False),
        Region(id=2, label=0, box=(60.0, 25.0, 40.0, 25.0), crowd=False),
        Region(id=3, label=2, box=(0.0, 0.0, 100.0, 50.0), crowd=False),
    ),
)


def test_a_phrase_has_the_boxes_of_the_class_that_it_names_in_whole_words() -> None:
    """By hand: catches swapped sides, xywh taken for xyxy, and the car in a carpet."""
    boxes = report.named_boxes("small red circle", PICTURE, NAMES)
    assert boxes == [(0.1, 0.1, 0.4, 0.5), (0.6, 0.5, 1.0, 1.0)]
    counts = {"black cars": 1, "Car": 1, "carpet": 0, "blue star": 0, "red": 0}
    assert {text: len(report.named_boxes(text, PICTURE, NAMES)) for text in counts} == counts


def test_the_share_of_positive_heat_inside_boxes_is_counted_on_the_picture() -> None:
    """By hand: even heat gives the area of the union; overlapping boxes count once."""
    even = np.ones((4, 4), dtype=np.float32)
    assert report.inside_share(even, [(0.0, 0.0, 0.5, 0.5)]) == pytest.approx(0.25)
    twice = [(0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.5, 0.5)]
    assert report.inside_share(even, twice) == pytest.approx(0.25)

    heat = np.array([[4.0, -1.0], [4.0, -1.0]], dtype=np.float32)
    assert report.inside_share(heat, [(0.8, 0.0, 1.0, 1.0)]) == 0
    assert report.inside_share(heat, [(0.0, 0.0, 0.5, 1.0)]) > 0.8
    assert report.inside_share(np.zeros((2, 2), dtype=np.float32), [(0.0, 0.0, 1.0, 1.0)]) == 0


def write_coco(folder: Path, captions: list[str]) -> tuple[Path, Path, Path]:
    """One picture per caption, each with a red circle on the left and a blue star on the right."""
    images = [
        {"id": k, "file_name": f"{k}.png", "height": 32, "width": 32} for k in range(len(captions))
    ]
    for image in images:
        Image.new("RGB", (32, 32), (image["id"], 0, 0)).save(folder / str(image["file_name"]))
    annotations = [
        {"id": 2 * k + label, "image_id": k, "category_id": label, "bbox": [16 * label, 0, 16, 32]}
        | {"area": 512, "iscrowd": 0, "segmentation": []}
        for k in range(len(captions))
        for label in (0, 1)
    ]
    categories = [{"id": k, "name": name} for k, name in enumerate(NAMES[:2])]
    words = [{"id": k, "image_id": k, "caption": text} for k, text in enumerate(captions)]
    files = folder / "captions.json", folder / "instances.json"
    files[0].write_text(json.dumps({"images": images, "annotations": words}))
    files[1].write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return folder, *files


def split(caption: str) -> list[str]:
    return caption.split(", ")


def test_pictures_are_chosen_by_their_captions_alone(tmp_path: Path) -> None:
    """The first that name two true things, in file order; phrases without a box are left out."""
    captions = [
        "red circle, sky",
        "small red circle, background, blue star",
        "nothing",
        "blue star, red circle",
        "blue star, big red circle",
    ]
    found = report.find_cases(*write_coco(tmp_path, captions), split, 2)
    assert [case.caption for case in found] == [captions[1], captions[3]]
    assert found[0].phrases == ["small red circle", "blue star"]
    assert found[0].boxes == [[(0.0, 0.0, 0.5, 1.0)], [(0.5, 0.0, 1.0, 1.0)]]
    assert found[0].image[0, 0].tolist() == [1, 0, 0]


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    files = write_coco(tmp_path, ["a dog, a cat"])
    with pytest.raises(ValueError, match="names 2 things"):
        report.find_cases(*files, split, 3)


def test_maps_follow_phrases_and_leave_the_model_alone(tmp_path: Path) -> None:
    """Maps of a phrase do not depend on its neighbours: catches a mixed-up order of texts."""
    torch.manual_seed(0)
    loaded = load_clip("shapes_tiny", "random")
    files = write_coco(tmp_path, ["red circle, blue star", "blue star, red circle"])
    first, second = report.find_cases(*files, split, 2)
    pair = [first, replace(second, image=first.image)]
    one, two = report.add_maps(pair, "a", loaded, GradEclip(), "a photo of the {}")
    assert one.heat["a"].shape == (2, 8, 8)
    np.testing.assert_allclose(one.heat["a"], two.heat["a"][::-1], rtol=1e-4, atol=1e-7)
    assert one.values["cosine"]["a"] == two.values["cosine"]["a"][::-1]
    assert one.values["in the box"]["a"][1].endswith(" %")
    assert all(parameter.grad is None for parameter in loaded.clip.parameters())
    (both, _) = report.add_maps([one, two], "b", load_clip("shapes_tiny"), GradEclip(), "a {}")
    assert [*both.heat] == [*both.values["cosine"]] == ["a", "b"]
    np.testing.assert_array_equal(both.heat["a"], one.heat["a"])
