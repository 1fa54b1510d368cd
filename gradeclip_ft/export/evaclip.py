"""EVA models as F-ViT and CLIPSelf load them: backbone and text vectors of one fine-tuned model.

F-ViT silently skips unknown names, so that the backbone would stay random: all names must be
EVA-CLIP's, and timm's reader of such files must find the same trunk.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from open_clip.timm_model import TimmModel
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor

from gradeclip_ft.export.job import Job, Written, read_tensors, save_state
from gradeclip_ft.export.openclip import code
from gradeclip_ft.export.verify import ExportError, check_embeddings, check_tensors
from gradeclip_ft.models.clip import class_embeddings
from gradeclip_ft.models.names import OURS, THEIRS, from_evaclip, name_table, to_evaclip
from gradeclip_ft.text.prompts import VILD


@dataclass(frozen=True)
class Detector:
    """F-ViT's settings for one backbone."""

    file: str  # that its configuration asks for
    vectors: str  # the same for the class vectors
    size: str  # in the name of that configuration
    model: str
    layers: tuple[int, ...]  # blocks, from 0, whose outputs the pyramid takes
    image: int  # pixels
    width: int  # channels of these outputs
    strides: tuple[int | float, ...]  # of the region proposals
    embedding: int  # channels of the joint embedding
    patch: int  # pixels


DETECTORS = {
    "EVA02-B-16": Detector(
        file="eva_vitb16_coco_clipself_patches.pt",
        vectors="coco_with_background_evaclip_vitb_16.pt",
        size="vitb16",
        model="EVA02-CLIP-B-16",
        layers=(3, 5, 7, 11),
        image=640,
        width=768,
        strides=(4, 8, 16, 32, 64),
        embedding=512,
        patch=16,
    ),
    "EVA02-L-14-336": Detector(
        file="eva_vitl14_coco_clipself_patches.pt",
        vectors="coco_with_background_evaclip_vitl14x336.pt",
        size="vitl14",
        model="EVA02-CLIP-L-14-336",
        layers=(6, 10, 14, 23),
        image=896,
        width=1024,
        strides=(3.5, 7, 14, 28, 56),
        embedding=768,
        patch=14,
    ),
}
OTHER, OTHER_VECTORS = "eva_clip_model.pt", "coco_with_background.pt"  # for other models
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
LENGTH_TOLERANCE = 1e-5  # of a unit vector in fp32; rounding gives about 1e-7


def write_evaclip(job: Job, stage: Path) -> Written:
    """Backbone and class vectors; the names are compared with EVA-CLIP's complete list.

    Raises:
        ValueError: The model is not an EVA, or a key of it is not known; the message names it.
        ExportError: Read back, it is another model.
    """
    visual = job.loaded.clip.model.visual
    trunk = visual.trunk if isinstance(visual, TimmModel) else visual
    if not isinstance(trunk, Eva):
        raise ValueError(
            f"to=[evaclip] takes EVA models, {job.loaded.name} has a {type(trunk).__name__}; use "
            "to=[openclip] or to=[huggingface]"
        )
    detector = DETECTORS.get(job.loaded.name)
    file = stage / (detector.file if detector else OTHER)
    save_state(to_evaclip(job.state), file)
    again = _read_back(job, file, trunk)
    model = deepcopy(job.loaded.clip.model)
    model.load_state_dict(again, strict=True)
    difference = check_embeddings(job.loaded, model, job.inputs, half=job.half)
    vectors = write_class_embed(job, stage)
    images = sum(key.startswith(OURS) for key in again)
    checks = (
        f"{file.name}: {len(again)} tensors, {images} of them visual, names complete",
        f"timm's reader of EVA-CLIP files: trunk bit-equal, embeddings equal to {difference:.0e}",
        *vectors.checks,
    )
    return Written(checks, _usage(job.folder, detector))


def write_class_embed(job: Job, stage: Path) -> Written:
    """The 80 names of COCO and the background in the 63 templates of ViLD, read back.

    The file is a dict from name to a float32 unit vector of D numbers.

    Raises:
        ExportError: What was read back is not what was computed.
    """
    loaded, detector = job.loaded, DETECTORS.get(job.loaded.name)
    file = stage / (detector.vectors if detector else OTHER_VECTORS)
    names = [*COCO, BACKGROUND]
    rows = class_embeddings(loaded.clip, loaded.tokenizer, names, VILD).float().cpu()
    vectors = {name: row.clone() for name, row in zip(names, rows, strict=True)}
    save_state(vectors, file)
    check_tensors(vectors, read_tensors(file), file.name)
    lengths = rows.norm(dim=1)
    if not bool(((lengths - 1).abs() <= LENGTH_TOLERANCE).all()):
        raise ExportError(
            f"class vectors have lengths from {lengths.min():g} to {lengths.max():g}, expected 1"
        )
    checks = (f"{file.name}: 80 classes and background, unit vectors read back bit-equal",)
    call = f'vectors = torch.load("{job.folder / file.name}")'
    return Written(checks, code("import torch", call))


def _read_back(job: Job, file: Path, trunk: Eva) -> dict[str, Tensor]:
    """Tensors under open_clip's names, the trunk by timm's reader; compared with what was written.

    Raises:
        ExportError: A name is missing or unknown, or a tensor differs; the message names it.
    """
    stored = read_tensors(file)
    expected = name_table(job.state, OURS)
    check_tensors({theirs: job.state[ours] for ours, theirs in expected.items()}, stored, file.name)
    by_timm = {f"{OURS}{key}": value for key, value in checkpoint_filter_fn(stored, trunk).items()}
    rest = {key: value for key, value in stored.items() if not key.startswith(THEIRS)}
    check_tensors(job.state, {**by_timm, **rest}, f"{file.name} by timm's reader")
    check_tensors(job.state, from_evaclip(stored), f"{file.name} by gradeclip_ft's reader")
    return {**by_timm, **rest}


def _usage(folder: Path, detector: Detector | None) -> str:
    """How F-ViT takes both files: its configuration's name and lines, as Markdown."""
    file, vectors = (detector.file, detector.vectors) if detector else (OTHER, OTHER_VECTORS)
    copies = [f"cp {folder / file} checkpoints/", f"cp {folder / vectors} datasets/embeddings/"]
    if detector is None:
        lines = [
            "F-ViT has configurations for EVA02-B-16 and EVA02-L-14-336. In one of your own:",
            "",
            *("```", *copies, f"model.backbone.pretrained = 'checkpoints/{file}'"),
            f"model.roi_head.bbox_head.class_embed = 'datasets/embeddings/{vectors}'",
            "```",
        ]
        return "\n".join(lines)
    config = f"fvit_{detector.size}_upsample_fpn_bs64_3e_ovcoco_eva_clipself_patches.py"
    roi = "model.roi_head."
    settings = {
        "model.backbone.model_name": detector.model,
        "model.backbone.pretrained": f"checkpoints/{detector.file}",
        "model.backbone.out_indices": list(detector.layers),
        "model.neck.in_channels": [detector.width] * 4,
        "model.rpn_head.anchor_generator.strides": list(detector.strides),
        f"{roi}bbox_head.class_embed": f"datasets/embeddings/{detector.vectors}",
        f"{roi}vlm_roi_extractor.out_channels": detector.embedding,
        f"{roi}vlm_roi_extractor.featmap_strides": [detector.patch],
        "image_size": (detector.image, detector.image),
    }
    lines = [
        f"In F-ViT, `configs/ov_coco/{config}` runs unedited:",
        "",
        *("```", *copies, "```"),
        "",
        "It says, with the file that it builds on:",
        "",
        code(*(f"{key} = {value!r}" for key, value in settings.items())),
    ]
    return "\n".join(lines)
