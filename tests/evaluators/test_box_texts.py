"""The right text of a box, with an encoder that knows every region."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradeclip_ft.data.box_texts import BoxTexts
from gradeclip_ft.evaluators.box_texts import BoxTextEvaluator
from gradeclip_ft.models.clip import LoadedClip
from tests.evaluators.conftest import NAMES

Load = Callable[..., LoadedClip]
PARTS = {"hard": "h.jsonl", "easy": "e.jsonl"}


@pytest.fixture
def lists(world: Any, tmp_path: Path) -> dict[str, Any]:
    """Every rectangle of the world with ten wrong names; every other one is in the easy part."""
    lines: dict[str, list[str]] = {part: [] for part in PARTS}
    for number, (name, rectangles) in enumerate(world.rectangles.items()):
        for label, *box in rectangles:
            wrong = [NAMES[(label + step) % len(NAMES)].title() for step in range(1, 11)]
            right = NAMES[label].title()
            entry = {"img_path": name, "bbox": box, "neg_expression": wrong}
            entry["pos_expression"] = right if number % 2 else [right]
            lines["hard" if number % 2 else "easy"].append(json.dumps(entry))
    for part, file in PARTS.items():
        (tmp_path / file).write_text("\n".join(lines[part]) + "\n")
    return {"folder": str(tmp_path), "parts": PARTS, "images": world.panoptic["images"]}


def test_a_perfect_encoder_finds_every_text_and_a_shuffled_one_none(
    lists: dict[str, Any], load: Load
) -> None:
    """Photos are wide and high, so a box in the wrong frame, or of another photo, would miss."""
    evaluator = BoxTextEvaluator("fg", BoxTexts(**lists), 224, batch_size=5)
    perfect = evaluator(load(224, 16))
    assert perfect.metrics == {"easy/top1": 1.0, "hard/top1": 1.0, "all/top1": 1.0}
    count = sum(perfect.details["boxes"].values())  # type: ignore[union-attr]
    assert count == perfect.data["counts"]["boxes"] == BoxTexts(**lists)().counts["boxes"]
    shuffled = evaluator(load(224, 16, table=torch.eye(17).roll(1, dims=0)))
    assert set(shuffled.metrics.values()) == {0.0}
    tied = evaluator(load(224, 16, table=torch.ones(17, 17)))
    assert set(tied.metrics.values()) == {1.0}  # of equal ones the first, as in FG-CLIP's program


def test_a_line_that_is_no_box_is_named(lists: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "h.jsonl").write_text('{"img_path": "a.png", "bbox": [1, 2, 3]}\n')
    with pytest.raises(ValueError, match=r"h.jsonl:1: KeyError 'pos_expression'; expected lines"):
        BoxTexts(**lists)()
    with pytest.raises(FileNotFoundError, match=r"no list .*t.jsonl; fetch"):
        BoxTexts(**{**lists, "parts": {"trivial": "t.jsonl"}})()
