"""The detector's text weights: one unit vector per COCO class, by the fine-tuned text tower.

Fine-tuning changes the text tower, and a detector's backbone file does not contain these vectors: a
file of the start weights would no longer fit (traps: G3).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gradeclip_ft.export.staging import save_state
from gradeclip_ft.export.verify import ExportError
from gradeclip_ft.models.class_embeddings import class_embeddings
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.text.prompts import VILD

# fmt: off
COCO = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote",
    "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
BACKGROUND = "background"
FILES = {
    "EVA02-B-16": "coco_with_background_evaclip_vitb_16.pt",
    "EVA02-L-14-336": "coco_with_background_evaclip_vitl14x336.pt",
}
OTHER = "coco_with_background.pt"
LENGTH_TOLERANCE = 1e-5  # of a unit vector in fp32; rounding gives about 1e-7


def write_class_embed(loaded: LoadedClip, folder: Path) -> Path:
    """Embed the 80 names and the background in the 63 templates, write, and read back.

    Returns:
        The file: a dict from name to a float32 unit vector of D numbers.

    Raises:
        ExportError: What was read back is not what was computed.
    """
    names = [*COCO, BACKGROUND]
    rows = class_embeddings(loaded.clip, loaded.tokenizer, names, VILD).float().cpu()
    vectors = {name: row.clone() for name, row in zip(names, rows, strict=True)}
    path = folder / FILES.get(loaded.name, OTHER)
    save_state(vectors, path)
    _check(vectors, path)
    return path


def _check(vectors: dict[str, Tensor], path: Path) -> None:
    again = torch.load(path, map_location="cpu", weights_only=True)
    wrong = [
        name
        for name, vector in vectors.items()
        if name not in again
        or not torch.equal(again[name], vector)
        or not abs(float(again[name].norm()) - 1) <= LENGTH_TOLERANCE
    ]
    if wrong or len(again) != len(vectors):
        raise ExportError(
            f"{path.name} holds {len(again)} vectors, expected {len(vectors)} of length 1 as "
            f"computed; wrong: {', '.join(wrong[:5]) or 'none'}. Look for NaN in the text tower"
        )
