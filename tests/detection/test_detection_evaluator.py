"""AP of known answers, and a whole evaluation with features that know the truth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradeclip_ft.data.detection import CocoBoxes
from gradeclip_ft.detection.detector import Detections, Detector, DetectorSettings, load_detector
from gradeclip_ft.detection.evaluator import DetectionEvaluator, average_precision
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip

PLACES = [(1, "cat", [4.0, 4, 20, 20]), (1, "dog", [30, 8, 16, 24]), (2, "cow", [10, 10, 40, 40])]
NAMES = ["cat", "dog", "cow"]


@pytest.fixture
def source(tmp_path: Path) -> CocoBoxes:
    """Two images with three objects; dog is novel. Red, green and blue say what they are."""
    for number in (1, 2):
        pixels = np.full((64, 96, 3), 128, np.uint8)
        for image, name, (x, y, w, h) in PLACES:
            if image == number:
                pixels[int(y) : int(y + h), int(x) : int(x + w)] = 0
                pixels[int(y) : int(y + h), int(x) : int(x + w), NAMES.index(name)] = 255
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    content = {
        "images": [{"id": k, "file_name": f"{k}.png", "height": 64, "width": 96} for k in (1, 2)],
        "annotations": [
            {"id": row, "image_id": image, "category_id": NAMES.index(name), "bbox": place}
            for row, (image, name, place) in enumerate(PLACES, start=1)
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(NAMES)],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    return CocoBoxes(str(file), str(tmp_path), {"base": ["cat", "cow"], "novel": ["dog"]})


def result(image: int, label: int, place: list[float], score: float) -> dict[str, Any]:
    """A detection in COCO's form; labels are base classes first: cat, cow, dog."""
    return {"image_id": image, "category_id": label, "bbox": place, "score": score}


def test_average_precision_of_known_answers(source: CocoBoxes) -> None:
    """Would catch groups that are mixed up, and detections of one class that count for another."""
    perfect = [
        result(1, 0, [4, 4, 20, 20], 0.9),
        result(1, 2, [30, 8, 16, 24], 0.8),
        result(2, 1, [10, 10, 40, 40], 0.7),
    ]
    metrics, by_class = average_precision(source(), perfect)
    assert all(value == pytest.approx(1.0) for value in metrics.values())
    assert by_class == {"cat": 1.0, "cow": 1.0, "dog": 1.0}
    # A better-scored wrong box before the right one halves precision: AP is 1/2 at every recall.
    # The dog is called a cat, so novel is 0.
    wrong = [result(1, 0, [30, 8, 16, 24], 0.95), perfect[0], perfect[2]]
    metrics, _ = average_precision(source(), wrong)
    assert metrics["novel/AP50"] == 0
    assert metrics["base/AP50"] == pytest.approx(0.75)
    assert metrics["all/AP50"] == pytest.approx(0.5)
    # Moved by a fifth of its side, IoU 2/3: right at overlaps .5, .55, .6, .65 of ten
    moved = [*perfect[:2], result(2, 1, [18, 10, 40, 40], 0.7)]
    metrics, _ = average_precision(source(), moved)
    assert metrics["base/AP50"] == pytest.approx(1.0)
    assert metrics["base/AP"] == pytest.approx((1 + 0.4) / 2)
    metrics, _ = average_precision(source(), [])
    assert set(metrics.values()) == {0.0}


class Knowing(Detector):
    """A detector whose proposals and features are the truth, read from the colours."""

    def features(self, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        self.seen = images
        return [], images[:, :, ::8, ::8].permute(0, 2, 3, 1)

    def propose(self, images: Any, sizes: Any, levels: Any, targets: Any = None) -> Any:
        boxes = []
        for image in images:
            mask = image.amax(0) - image.amin(0) > 0.6
            found = []
            for channel in range(3):
                rows, columns = (mask & (image.argmax(0) == channel)).nonzero(as_tuple=True)
                if len(rows) > 8:
                    ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                    found.append([float(end) for end in ends])
            boxes.append(torch.tensor(found))
        return boxes, {}

    def classify(self, levels: Any, boxes: Any, vocabulary: Any) -> Any:
        logits = []
        order = [vocabulary.names.index(name) for name in NAMES]
        for image, some in zip(self.seen, boxes, strict=True):
            for x0, y0, x1, y1 in some.tolist():
                middle = image[:, int((y0 + y1) / 2), int((x0 + x1) / 2)]
                row = torch.full((len(NAMES) + 1,), -5.0)
                row[order[int(middle.argmax())]] = 5.0
                logits.append(row)
        return torch.stack(logits), torch.zeros(len(logits), 4)

    def frozen_logits(self, dense: Any, rois: Any, side: int, vocabulary: Any) -> Any:
        return torch.zeros(len(rois), len(NAMES) + 1)


@pytest.fixture
def loaded() -> LoadedClip:
    """A detector on the packaged model, whose words are of another world."""
    how = DetectorSettings(
        side=64, inner=(0, 1, 1), channels=16, norm="group", templates=("the {}",)
    )
    return load_detector("shapes_tiny", settings=how)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_features_that_know_the_truth_reach_a_precision_of_one(
    source: CocoBoxes, loaded: LoadedClip, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch boxes in another frame than the annotations', and labels out of order."""
    detector = loaded.clip
    assert isinstance(detector, Detector)
    monkeypatch.setattr(detector, "__class__", Knowing)
    monkeypatch.setattr(
        detector, "vocabulary", lambda names, base: _vocabulary(detector, names, base)
    )
    measured = DetectionEvaluator("try", source, batch_size=batch_size)(loaded)
    assert {name: measured.metrics[f"{name}/AP50"] for name in ("novel", "base", "all")} == {
        "novel": pytest.approx(1.0),
        "base": pytest.approx(1.0),
        "all": pytest.approx(1.0),
    }
    assert measured.data["counts"] == {
        "images": 2,
        "base_boxes": 2,
        "novel_boxes": 1,
        "skipped": {},
    }


def _vocabulary(detector: Detector, names: list[str], base: list[str]) -> Any:
    shapes = ["circle", "square", "star"]
    made = Detector.vocabulary(detector, shapes, [shapes[names.index(name)] for name in base])
    return type(made)(tuple(names), made.is_base, made.embeddings)


def test_a_clip_without_a_detector_is_refused(source: CocoBoxes) -> None:
    """Would catch an error from deep inside, without a word about what to do."""
    with pytest.raises(ValueError, match="needs a detector"):
        DetectionEvaluator("try", source)(load_clip("shapes_tiny"))


def test_detections_are_scaled_back_to_the_original_picture(
    source: CocoBoxes, loaded: LoadedClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch boxes in pixels of the square: 64 of 96 here."""
    kept: list[Any] = []
    monkeypatch.setattr(
        "gradeclip_ft.detection.evaluator.average_precision",
        lambda images, results: (kept.extend(results), ({}, {}))[1],
    )
    assert isinstance(loaded.clip, Detector)
    one = Detections(torch.tensor([[0.0, 0, 32, 16]]), torch.tensor([0.5]), torch.tensor([1]))
    monkeypatch.setattr(loaded.clip, "detect", lambda *args: [one] * len(args[0]))
    monkeypatch.setattr(
        loaded.clip, "vocabulary", lambda names, base: _vocabulary(loaded.clip, names, base)
    )
    DetectionEvaluator("try", source)(loaded)
    assert kept[1] == {
        "image_id": 2,
        "category_id": 1,
        "bbox": pytest.approx([0.0, 0.0, 48.0, 24.0]),
        "score": 0.5,
    }
