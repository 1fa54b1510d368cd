"""Evaluators on real photos, end to end, where these are present."""

from pathlib import Path
from typing import Any

import pytest

from gradeclip_ft.data.pairs import CaptionFile
from gradeclip_ft.data.regions import CocoRegions
from gradeclip_ft.evaluators.regions import RegionEvaluator
from gradeclip_ft.evaluators.retrieval import RetrievalEvaluator
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.factory import load_clip


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
    """133 classes, chance 0.75 %; the same by batch 1 and 16."""

    def measure(batch_size: int, limit: int | None) -> Any:
        data = CocoRegions(**photos["panoptic"], limit=limit)
        plain = ["a photo of the {}."]  # 63 of them take a minute on a CPU
        return RegionEvaluator("r", data, 224, plain, crops=True, batch_size=batch_size)(encoder)

    close(measure(1, limit=6), measure(16, limit=6))
    many = measure(16, limit=None)
    assert many.protocol["classes"] == 133
    assert many.metrics["boxes/top1"] > 0.04
    assert many.metrics["thing_masks/top5"] > 0.15
    assert many.metrics["crops/top1"] > 0.1
    assert many.metrics["stuff_masks/top5"] > 0.1


@pytest.mark.slow
def test_instances_and_retrieval_of_photos_are_far_above_chance(
    encoder: LoadedClip, photos: dict[str, dict[str, str]]
) -> None:
    """80 classes, chance 1.25 %; one of 91 photos, chance 1.1 %."""
    data = CocoRegions(**photos["instances"])
    regions = RegionEvaluator("r", data, 224, micro=True, batch_size=16)(encoder)
    assert regions.metrics["boxes/top1"] == pytest.approx(0.164, abs=0.01)
    assert regions.metrics["boxes/top5"] == pytest.approx(0.449, abs=0.01)
    pairs = CaptionFile(**photos["captions"], split="val photos")
    found = RetrievalEvaluator("p", pairs, batch_size=16)(encoder)
    close(found, RetrievalEvaluator("p", pairs, batch_size=1, text_batch_size=7)(encoder))
    assert found.metrics["image_retrieval_recall@1"] == pytest.approx(0.455, abs=0.02)
    assert found.metrics["text_retrieval_recall@1"] == pytest.approx(0.484, abs=0.02)
