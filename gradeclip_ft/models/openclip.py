"""Models as open_clip itself describes and loads them: what an export is checked against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
from torch import nn

from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.factory import PACKAGED, packaged_config

CONFIG_NAME = "open_clip_config.json"


def is_registered(loaded: LoadedClip) -> bool:
    """Whether open_clip knows the architecture by name."""
    return loaded.name not in PACKAGED


def describe(loaded: LoadedClip) -> dict[str, Any]:
    """Content of an `open_clip_config.json`: architecture and preprocessing."""
    model = (
        open_clip.get_model_config(loaded.name)
        if is_registered(loaded)
        else packaged_config(loaded.name)["model_cfg"]
    )
    height, width = loaded.image_size
    size = height if height == width else [height, width]
    how = loaded.preprocessing
    return {
        "model_cfg": {**model, "vision_cfg": {**model["vision_cfg"], "image_size": size}},
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
