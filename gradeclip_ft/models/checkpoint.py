"""Weights of files in models, strictly: nothing is ignored, and what does not fit is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from open_clip.transformer import VisionTransformer
from torch import Tensor

from gradeclip_ft.models.closest import closest_names
from gradeclip_ft.models.evaclip import from_evaclip, is_evaclip
from gradeclip_ft.models.huggingface import from_huggingface
from gradeclip_ft.models.sizes import pair
from gradeclip_ft.models.tensor_files import read_tensors
from gradeclip_ft.models.tower import Foreign
from gradeclip_ft.ops.positions import resample_positions

SHOWN = 5
MOST_POSITIONS = 2**18  # more is no image: a tensor can claim any shape
TRANSFORMERS_MARK = "vision_model.embeddings.class_embedding"
# Buffers and settings that some files carry and no model needs; by name, never by pattern.
OMITTED = (
    "input_resolution",
    "context_length",
    "vocab_size",
    "attn_mask",
    "text.attn_mask",
    "text.transformer.embeddings.position_ids",
)
TEXT_PARTS = (
    "text_projection",
    "positional_embedding",
    "token_embedding.",
    "transformer.",
    "ln_final.",
)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a weights file or folder under open_clip's keys.

    Files: `.safetensors`, `.pt`, `.pth`, `.bin`, Lightning's `.ckpt`; folders of open_clip and of
    Hugging Face's `CLIPModel`. Names of EVA-CLIP and of `CLIPModel` are recognised.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a weights file, or one that needs to execute code.
    """
    state = read_tensors(path)
    if TRANSFORMERS_MARK in state:
        return from_huggingface(state)
    return from_evaclip(state) if is_evaclip(state) else state


def load_state(model: Foreign, state: Mapping[str, Tensor], source: str) -> None:
    """Copy the tensors into the model; position embeddings of another grid are interpolated.

    Raises:
        ValueError: Keys are missing or unexpected, shapes differ, or values are not finite.
    """
    expected = model.state_dict()
    tensors = {
        key: value
        for key, value in _nested(state, expected).items()
        if key in expected or key not in OMITTED
    }
    for key in ("logit_scale", "logit_bias"):  # a number, or a vector of one
        if key in tensors and key in expected and tensors[key].numel() == 1:
            tensors[key] = tensors[key].reshape(expected[key].shape)
    _resize(model, tensors, expected)
    load_exactly(model, tensors, source)


def load_exactly(model: Foreign, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy the tensors into the model.

    Raises:
        ValueError: Keys are missing or unexpected, shapes differ, or values are not finite.
    """
    _compare(model.state_dict(), tensors, source)
    model.load_state_dict(tensors, strict=True)


def _nested(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """OpenAI's flat names of the text tower, below `text.` where the model has it there."""
    flat = "positional_embedding" in state and "text.positional_embedding" in expected
    if not flat:
        return state
    return {
        f"text.{key}" if key.startswith(TEXT_PARTS) else key: value for key, value in state.items()
    }


def _resize(model: Foreign, tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Position embeddings of a square grid at the model's own grid."""
    visual = model.visual
    if isinstance(visual, VisionTransformer):
        key, grid, first = "visual.positional_embedding", tuple(visual.grid_size), 1
    elif hasattr(visual, "attnpool"):
        side = pair(visual.image_size)
        key, grid, first = "visual.attnpool.positional_embedding", (side[0] // 32, side[1] // 32), 1
    elif getattr(getattr(visual, "trunk", None), "pos_embed", None) is not None:
        trunk = visual.trunk
        key, grid = "visual.trunk.pos_embed", tuple(trunk.patch_embed.grid_size)
        first = trunk.pos_embed.shape[1] - grid[0] * grid[1]
    else:
        return
    table = tensors.get(key)
    if (
        table is None
        or table.shape == expected[key].shape
        or table.dim() != expected[key].dim()
        or table.shape[-1:] != (expected[key].shape[-1:])
    ):
        return
    if not first < table[..., 0].numel() <= MOST_POSITIONS:
        return
    flat = table.reshape(-1, table.shape[-1])
    root = math.isqrt(len(flat) - first)
    if root * root == len(flat) - first:
        # Half precision has no bicubic interpolation; the model's own precision stays.
        resized = resample_positions(flat.float(), (root, root), grid)
        tensors[key] = resized.reshape(expected[key].shape)


def _compare(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], source: str) -> None:
    misfits = {
        "missing": [key for key in expected if key not in got],
        "unexpected": [key for key in got if key not in expected],
        "of another shape": [
            f"{key}: got {tuple(got[key].shape)}, expected {tuple(value.shape)}"
            for key, value in expected.items()
            if key in got and got[key].shape != value.shape
        ],
    }
    broken = [
        key
        for key, value in got.items()
        if key in expected
        and value.shape == expected[key].shape  # a small file can claim terabytes
        if value.is_floating_point() and not value.isfinite().all()
    ]
    lines = [
        f"  {len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for what, names in {**misfits, "not finite": broken}.items()
        if names
    ]
    if not lines:
        return
    report = "\n".join(lines)
    if any(misfits.values()):
        close = closest_names(got)
        hint = f"; by its shapes it is {' or '.join(close)}" if close else ""
        remedy = f"name the architecture that the file was trained with (model.name=...){hint}"
    else:
        remedy = "its training diverged; take an earlier checkpoint"
    raise ValueError(
        f"{source} ({len(got)} tensors) does not fit the model ({len(expected)} tensors):\n"
        f"{report}\n{remedy}"
    )
