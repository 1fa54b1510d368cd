"""F-ViT, the detector of CLIPSelf: file names and settings that its configurations expect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OTHER = "eva_clip_model.pt"


@dataclass(frozen=True)
class Detector:
    """F-ViT's settings for one backbone.

    Attributes:
        file: Name that its configuration of the fine-tuned backbone asks for.
        config: That configuration.
        model: Name of the architecture there.
        layers: Blocks, from 0, whose outputs the pyramid takes.
        image: Side of its images in pixels.
        width: Channels of these outputs.
        strides: Of the region proposals.
        embedding: Channels of the joint embedding.
        patch: Side of a patch in pixels.
    """

    file: str
    config: str
    model: str
    layers: tuple[int, ...]
    image: int
    width: int
    strides: tuple[int | float, ...]
    embedding: int
    patch: int


def _config(size: str) -> str:
    return f"configs/ov_coco/fvit_{size}_upsample_fpn_bs64_3e_ovcoco_eva_clipself_patches.py"


DETECTORS = {
    "EVA02-B-16": Detector(
        file="eva_vitb16_coco_clipself_patches.pt",
        config=_config("vitb16"),
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
        config=_config("vitl14"),
        model="EVA02-CLIP-L-14-336",
        layers=(6, 10, 14, 23),
        image=896,
        width=1024,
        strides=(3.5, 7, 14, 28, 56),
        embedding=768,
        patch=14,
    ),
}


def usage(folder: Path, detector: Detector | None, file: str, vectors: str) -> str:
    """How F-ViT takes both files: its configuration's name and lines, as Markdown."""
    copies = [
        f"cp {folder / file} checkpoints/",
        f"cp {folder / vectors} datasets/embeddings/",
    ]
    if detector is None:
        lines = [
            "F-ViT has configurations for EVA02-B-16 and EVA02-L-14-336. In one of your own:",
            "",
            *("```", *copies, f"model.backbone.pretrained = 'checkpoints/{file}'"),
            f"model.roi_head.bbox_head.class_embed = 'datasets/embeddings/{vectors}'",
            "```",
        ]
        return "\n".join(lines)
    roi = "model.roi_head."
    settings = {
        "model.backbone.model_name": detector.model,
        "model.backbone.pretrained": f"checkpoints/{detector.file}",
        "model.backbone.out_indices": list(detector.layers),
        "model.neck.in_channels": [detector.width] * 4,
        "model.rpn_head.anchor_generator.strides": list(detector.strides),
        f"{roi}bbox_head.class_embed": f"datasets/embeddings/{vectors}",
        f"{roi}vlm_roi_extractor.out_channels": detector.embedding,
        f"{roi}vlm_roi_extractor.featmap_strides": [detector.patch],
        "image_size": (detector.image, detector.image),
    }
    return "\n".join(
        [
            f"In F-ViT, `{detector.config}` runs unedited:",
            "",
            *("```", *copies, "```"),
            "",
            "It says, with the file that it builds on:",
            "",
            *("```python", *(f"{key} = {value!r}" for key, value in settings.items()), "```"),
        ]
    )
