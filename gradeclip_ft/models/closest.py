"""Which architecture of open_clip a file of weights has, by its shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import open_clip
from torch import Tensor

SHOWN = 3


def closest_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of open_clip whose native ViT and text tower have these shapes; at most three.

    Empty for other towers, and where none fits.
    """
    conv, table = state.get("visual.conv1.weight"), state.get("visual.positional_embedding")
    words = state.get("token_embedding.weight", state.get("text.token_embedding.weight"))
    if conv is None or table is None or words is None or conv.ndim != 4:
        return []
    layers = {key.split(".")[3] for key in state if key.startswith("visual.transformer.resblocks.")}
    found = {
        "width": conv.shape[0],
        "patch": conv.shape[2],
        "layers": len(layers),
        "size": math.isqrt(len(table) - 1) * conv.shape[2],
        "words": tuple(words.shape),
    }
    names = [name for name in open_clip.list_models() if _shapes(name) == found]
    return sorted(names, key=len)[:SHOWN]


def _shapes(name: str) -> dict[str, Any]:
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    return {
        "width": vision.get("width", 768),
        "patch": vision.get("patch_size", 16),
        "layers": vision.get("layers", 12),
        "size": vision.get("image_size", 224),
        "words": (text.get("vocab_size", 49408), text.get("width", 512)),
    }
