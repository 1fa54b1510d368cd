"""Which architectures of open_clip `transformers.CLIPModel` can hold, and how it calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Options of open_clip that have a counterpart, or do not change what the weights compute.
FREE = {
    "vision_cfg": {
        "image_size",
        "patch_size",
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_dropout",
    },
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale"},
}
# Options whose neutral value is not empty.
NEUTRAL = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
}


def misfit(model: Mapping[str, Any]) -> str | None:
    """What of an open_clip architecture `transformers.CLIPModel` cannot hold; None if all fits.

    Args:
        model: The `model_cfg` of an `open_clip_config.json`.
    """
    parts = {"vision_cfg": model["vision_cfg"], "text_cfg": model["text_cfg"], "": model}
    for part, options in parts.items():
        for key, value in options.items():
            if key not in FREE[part] and value and value not in NEUTRAL.get(key, ()):
                return f"{f'{part}.' if part else ''}{key}={value!r}"
    vision = model["vision_cfg"]
    if not isinstance(vision["layers"], int):
        return f"vision_cfg.layers={vision['layers']!r} (a ResNet)"
    size = vision["image_size"]
    if not isinstance(size, int) and size[0] != size[1]:
        return f"vision_cfg.image_size={size!r} (a rectangle)"
    return None


def clip_config(
    model: Mapping[str, Any], *, start: int, end: int, dtype: str = "float32"
) -> dict[str, Any]:
    """Content of the `config.json` of a `transformers.CLIPModel`.

    Args:
        model: The `model_cfg` of an `open_clip_config.json`.
        start: Id of the start of a text.
        end: Id of the end of a text, whose row becomes the embedding.
        dtype: Of the stored tensors.

    Raises:
        ValueError: The architecture does not fit; says what and which format does.
    """
    if reason := misfit(model):
        raise ValueError(
            f"transformers' CLIPModel has no {reason}; it holds ViTs of OpenAI's type with square "
            "images. Use to=[openclip]"
        )
    vision, text = model["vision_cfg"], model["text_cfg"]
    size = vision["image_size"]
    shared = {
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": model["embed_dim"],
    }
    ends = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": dtype,
        "projection_dim": model["embed_dim"],
        "vision_config": {
            **shared,
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": size if isinstance(size, int) else size[0],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            **shared,
            **ends,
            "hidden_size": text["width"],
            "intermediate_size": int(text["width"] * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
        },
    }
