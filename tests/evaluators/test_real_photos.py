"""Evaluators on real photos, end to end, where these are present."""

from pathlib import Path
from typing import Any

import pytest

from gradeclip_ft.data.pairs import CaptionFile
from gradeclip_ft.data.regions import CocoRegions
from gradeclip_ft.evaluators.pairs import RetrievalEvaluator
from gradeclip_ft.evaluators.regions import RegionEvaluator
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip

PLAIN = ["a photo of the {}."]  # ViLD's 63 would take a minute on a CPU


@pytest.fixture(scope="module")
def encoder(shared_dir: Path) -> LoadedClip:
    """A dual encoder that knows photos."""
    folder = shared_dir / "models" / "photo_encoder"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return load_clip(str(folder))


@pytest.fixture
def photos(shared_dir: Path) -> dict[str, dict[str, str]]:
    """Panoptic, instances and captions of COCO photos."""
    root = shared_dir / "data" / "coco_mini_open"
    images = {"images": str(root / "images")}
    files = root / "annotations"
    return {
        "panoptic": {
            "annotations": str(files / "panoptic_val2017.json"),
            "segments": str(files / "panoptic_val2017"),
            **images,
        },
        "instances": {"annotations": str(files / "instances_val2017.json"), **images},
        "captions": {"annotations": str(files / "captions_val2017.json"), **images},
    }


def close(first: Any, second: Any) -> None:
    """Equal up to one region at a tie of rounding: other batches add in another order."""
    assert first.metrics == pytest.approx(second.metrics, abs=0.02)
    assert first.protocol == second.protocol
    assert first.data == second.data


@pytest.mark.slow
def test_panoptic_regions_of_photos_are_far_above_chance(
    encoder: LoadedClip, photos: dict[str, dict[str, str]]
) -> None:
    """133 classes, chance 0.75 % and 3.8 %; the same by batch 1 and 16, crops included."""

    def measure(batch_size: int, limit: int | None, crops: bool) -> Any:
        data = CocoRegions(**photos["panoptic"], limit=limit)
        regions = RegionEvaluator("r", data, 224, PLAIN, crops=crops, batch_size=batch_size)
        return regions(encoder)

    close(measure(1, limit=4, crops=True), measure(16, limit=4, crops=True))
    many = measure(16, limit=None, crops=False)
    assert many.protocol["classes"] == 133
    assert many.metrics["boxes/top1"] > 0.03
    assert many.metrics["boxes/top5"] > 0.15
    assert many.metrics["thing_masks/top5"] > 0.15
    assert many.metrics["stuff_masks/top5"] > 0.15


@pytest.mark.slow
def test_instances_and_retrieval_of_photos_are_far_above_chance(
    encoder: LoadedClip, photos: dict[str, dict[str, str]]
) -> None:
    """80 classes, chance 1.25 %; one of 91 photos, chance 1.1 %; the same by batch 1 and 16."""
    data = CocoRegions(**photos["instances"])
    regions = RegionEvaluator("r", data, 224, PLAIN, micro=True, batch_size=16)(encoder)
    assert regions.metrics["boxes/top1"] > 0.1
    assert regions.metrics["boxes/micro_top5"] > 0.2
    pairs = CaptionFile(**photos["captions"], split="val photos")
    found = RetrievalEvaluator("p", pairs, batch_size=16)(encoder)
    assert found.metrics["image_retrieval_recall@1"] == pytest.approx(0.455, abs=0.02)
    assert found.metrics["text_retrieval_recall@1"] == pytest.approx(0.484, abs=0.02)
    few = CaptionFile(**photos["captions"], split="val photos", limit=20)
    by_one = RetrievalEvaluator("p", few, batch_size=1, text_batch_size=7)(encoder)
    close(RetrievalEvaluator("p", few, batch_size=16)(encoder), by_one)
