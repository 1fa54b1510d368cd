"""The sentences that reach the text tower, name by name, against the rule as it is written down."""

from typing import Any

import pytest

from gradeclip_ft.data.regions import CocoRegions
from gradeclip_ft.evaluators.regions import RegionEvaluator
from gradeclip_ft.text.prompts import VILD, fill
from tests.evaluators.conftest import Load, said_to

# In three columns, each read from top to bottom, then the next.
WRITTEN = """
There is {a} {} in the scene.|a photo of a weird {}.|a close-up photo of the {}.
There is the {} in the scene.|a photo of the weird {}.|a jpeg corrupted photo of {a} {}.
a photo of {a} {} in the scene.|a photo of a small {}.|a jpeg corrupted photo of the {}.
a photo of the {} in the scene.|a photo of the small {}.|a blurry photo of {a} {}.
a photo of one {} in the scene.|a photo of a large {}.|a blurry photo of the {}.
itap of {a} {}.|a photo of the large {}.|a pixelated photo of {a} {}.
itap of my {}.|a photo of a clean {}.|a pixelated photo of the {}.
itap of the {}.|a photo of the clean {}.|a black and white photo of the {}.
a photo of {a} {}.|a photo of a dirty {}.|a black and white photo of {a} {}.
a photo of my {}.|a photo of the dirty {}.|a plastic {}.
a photo of the {}.|a bright photo of {a} {}.|the plastic {}.
a photo of one {}.|a bright photo of the {}.|a toy {}.
a photo of many {}.|a dark photo of {a} {}.|the toy {}.
a good photo of {a} {}.|a dark photo of the {}.|a plushie {}.
a good photo of the {}.|a photo of a hard to see {}.|the plushie {}.
a bad photo of {a} {}.|a photo of the hard to see {}.|a cartoon {}.
a bad photo of the {}.|a low resolution photo of {a} {}.|the cartoon {}.
a photo of a nice {}.|a low resolution photo of the {}.|an embroidered {}.
a photo of the nice {}.|a cropped photo of {a} {}.|the embroidered {}.
a photo of a cool {}.|a cropped photo of the {}.|a painting of the {}.
a photo of the cool {}.|a close-up photo of {a} {}.|a painting of a {}.
"""
NAMES = {
    "person": ("a", "person"),
    "orange": ("an", "orange"),
    "Umbrella": ("an", "umbrella"),
    "tv": ("a", "tv"),
    "hair drier": ("a", "hair drier"),
    "window-other": ("a", "window-other"),
    "wall-other-merged": ("a", "wall-other-merged"),
    "door-stuff": ("a", "door-stuff"),
    "ice_cream": ("an", "ice cream"),
    "cup/mug": ("a", "cup or mug"),
    "earth.": ("an", "earth"),
}


def written() -> list[str]:
    rows = [line.split("|") for line in WRITTEN.strip().splitlines()]
    return [row[column].strip() for column in range(3) for row in rows]


def by_rule(template: str, name: str) -> str:
    """Article, then name, then "This is " before "a..." and "the..."."""
    an, spoken = NAMES[name]
    text = spoken.join(an.join(template.split("{a}")).split("{}"))
    return "This is " + text if text[0] == "a" or text[:3] == "the" else text


def test_the_templates_stand_in_the_written_order() -> None:
    assert list(VILD) == written()
    assert len(written()) == 63


@pytest.mark.parametrize("name", NAMES)
def test_every_sentence_of_a_name_follows_the_rule(name: str) -> None:
    assert [fill(template, name) for template in VILD] == [by_rule(t, name) for t in written()]


def test_the_tower_reads_them_class_by_class(world: Any, load: Load) -> None:
    """A table by templates instead of classes would average the wrong sentences."""
    said = said_to(loaded := load())
    RegionEvaluator("r", CocoRegions(**world.panoptic))(loaded)
    assert said[:2] == ["There is a thing 0 in the scene.", "There is the thing 0 in the scene."]
    assert said[63] == "There is a thing 1 in the scene."
    assert said[-1] == "This is a painting of a stuff 4."
    assert len(said) == 63 * 17


def test_all_coco_names_are_said_by_the_rule(shared_dir: Any) -> None:
    """133 real names: no underscore or slash is left, suffixes stay."""
    root = shared_dir / "data" / "coco_mini_open"
    opened = CocoRegions(
        str(root / "annotations" / "panoptic_val2017.json"),
        str(root / "images"),
        segments=str(root / "annotations" / "panoptic_val2017"),
    )(image_size=224, patch=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    for name in opened.classes:
        NAMES.setdefault(name, ("an" if name[0] in "aeiou" else "a", name))
        assert [fill(template, name) for template in VILD] == [by_rule(t, name) for t in written()]
    assert sum("-merged" in name for name in opened.classes) > 10
