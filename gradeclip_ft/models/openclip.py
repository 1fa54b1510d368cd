"""Models as open_clip itself describes and loads them: what an export is checked against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
from open_clip.transformer import VisionTransformer
from torch import nn

from gradeclip_ft.models.architecture import CONFIG_NAME
from gradeclip_ft.models.clip import LoadedClip

__all__ = ["CONFIG_NAME", "describe", "is_registered", "open_file", "open_folder"]


def is_registered(loaded: LoadedClip) -> bool:
    """Whether open_clip knows the architecture by name."""
    return loaded.architecture.registered


def describe(loaded: LoadedClip) -> dict[str, Any]:
    """Content of an `open_clip_config.json`: architecture and preprocessing.

    The image size is the one that open_clip can build: that of the model for open_clip's own ViT,
    the architecture's for others (`models/sizes.py`).
    """
    model = dict(loaded.architecture.model_cfg)
    if isinstance(loaded.clip.model.visual, VisionTransformer):
        height, width = loaded.image_size
        size = height if height == width else [height, width]
        model["vision_cfg"] = {**model["vision_cfg"], "image_size": size}
    how = loaded.preprocessing
    return {
        "model_cfg": model,
        "preprocess_cfg": {
            "mean": list(how.mean),
            "std": list(how.std),
            "interpolation": how.interpolation,
            "resize_mode": how.resize,
        },
    }


def open_file(name: str, file: Path, image_size: tuple[int, int]) -> nn.Module:
    """A registered architecture with the weights of a file, by `open_clip.create_model`."""
    known = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
    other = None if image_size == (known, known) else image_size
    model: nn.Module = open_clip.create_model(name, pretrained=str(file), force_image_size=other)
    return model.eval()


def open_folder(folder: Path) -> nn.Module:
    """A folder with architecture and weights, by `open_clip.create_model`."""
    model: nn.Module = open_clip.create_model(f"local-dir:{folder}")
    return model.eval()
