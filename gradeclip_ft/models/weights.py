"""Weights of files in models, strictly: nothing is ignored, and what does not fit is named."""

from __future__ import annotations

import logging
import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gradeclip_ft.models.architecture import CONFIG_NAME, pair, read_description, read_json
from gradeclip_ft.models.names import (
    from_evaclip,
    from_huggingface,
    is_evaclip,
    listed,
    stated_by_clip,
)
from gradeclip_ft.models.tower import resample_positions
from gradeclip_ft.models.trace import Foreign

log = logging.getLogger(__name__)

PICTURES = "preprocessor_config.json"
BILINEAR = 2  # Pillow's number; 3 is bicubic
# In this order: averaged weights only where a file has no others.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema")
PREFIXES = ("module.", "model.", "_orig_mod.", "clip.")
# In order of preference, as open_clip chooses.
FOLDER_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_model.pt",
    "model.safetensors",
    "pytorch_model.bin",
)


def weights_file(folder: Path) -> Path:
    """The weights in a folder; a FileNotFoundError where there are none."""
    found = next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no weights, expected {FOLDER_FILES[0]}")
    return found


def stated_config(
    weights: Path, ours: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What the files beside some weights say about their architecture and pixels.

    Args:
        weights: A folder of open_clip or of Hugging Face's CLIPModel, or the weights in it.
        ours: The `model_cfg` of the architecture that is to take them.

    Returns:
        `model_cfg` and `preprocess_cfg` in open_clip's form; None and empty where nothing is said.
    """
    folder = weights if weights.is_dir() else weights.parent
    described, config = folder / CONFIG_NAME, folder / "config.json"
    if weights.is_file() and weights.name not in FOLDER_FILES:
        return None, {}
    if described.is_file():
        return read_description(described)
    content = read_json(config) if config.is_file() else {}
    if not isinstance(content, dict) or content.get("model_type") != "clip":
        return None, {}
    try:
        stated = stated_by_clip(content, ours)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    pictures = folder / PICTURES
    how = read_json(pictures) if pictures.is_file() else {}
    return stated, pixels_of_processor(how) if how else {}


def pixels_of_processor(how: Mapping[str, Any]) -> dict[str, Any]:
    """The `preprocess_cfg` in open_clip's form of a `preprocessor_config.json`."""
    return {
        "mean": how.get("image_mean"),
        "std": how.get("image_std"),
        "interpolation": "bilinear" if how.get("resample") == BILINEAR else "bicubic",
        "resize_mode": "shortest" if how.get("do_center_crop", True) else "squash",
    }


def is_run(weights: Path) -> bool:
    """Whether a training run wrote this file; its configuration then says what it is."""
    if weights.suffix != ".safetensors" or not weights.is_file():
        return False
    with safe_open(weights, framework="pt") as file:
        return "step" in (file.metadata() or {})


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a weights file or folder under its own keys, without a wrapper's prefix.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a weights file, or one that needs to execute code.
    """
    file = Path(path)
    if file.is_dir():
        file = weights_file(file)
    if not file.is_file():
        raise FileNotFoundError(
            f"weights file {file} does not exist; give a .safetensors or .pt file, a tag of "
            "`open_clip.list_pretrained()`, or `random`"
        )
    state = _unwrap(_read(file), file)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _read(file: Path) -> object:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript, which is refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} cannot be read without executing code that it carries; it is refused. Ask "
            "for a .safetensors file, or one with plain tensors only"
        ) from error
    except Exception as error:  # readers of damaged files raise anything
        if "TorchScript" in str(error):
            raise ValueError(
                f"{file} is a TorchScript archive, which carries code; it is refused. For OpenAI's "
                "weights take the tag `openai`, or a .safetensors file"
            ) from error
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is not a weights file, or is damaged: {reason}") from error


def _unwrap(content: object, file: Path) -> dict[str, Tensor]:
    while isinstance(content, dict):
        if content and all(map(_is_plain, content, content.values())):
            return content
        inner = next((key for key in WRAPPERS if key in content), None)
        if inner is None:
            break
        content = content[inner]
    raise ValueError(
        f"{file} holds {type(content).__name__}, expected tensors by name, plain or below one of "
        f"{', '.join(WRAPPERS)}"
    )


def _is_plain(key: object, value: object) -> bool:
    """A name with numbers; nothing sparse, quantised or complex, which no model here has."""
    return (
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_complex()
    )


MOST_POSITIONS = 2**18  # more is not an image: a tensor can claim any shape
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
    """As `load_exactly`; position embeddings of another grid are interpolated."""
    expected = model.state_dict()
    if "positional_embedding" in state and "text.positional_embedding" in expected:
        state = {  # OpenAI's flat names of the text tower, which this model has below `text.`
            f"text.{key}" if key.startswith(TEXT_PARTS) else key: value
            for key, value in state.items()
        }
    tensors = {key: x for key, x in state.items() if key in expected or key not in OMITTED}
    if "logit_bias" not in expected and tensors.pop("logit_bias", None) is not None:
        log.info("%s has a logit_bias, of the sigmoid loss; no embedding depends on it", source)
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


def _resize(model: Foreign, tensors: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Position embeddings of a square grid at the model's own grid."""
    visual = model.visual
    trunk: Foreign = getattr(visual, "trunk", None)
    if isinstance(visual, VisionTransformer):
        key, grid = "visual.positional_embedding", tuple(visual.grid_size)
    elif hasattr(visual, "attnpool"):
        height, width = pair(visual.image_size)
        key, grid = "visual.attnpool.positional_embedding", (height // 32, width // 32)
    elif getattr(trunk, "pos_embed", None) is not None:
        key, grid = "visual.trunk.pos_embed", tuple(trunk.patch_embed.grid_size)
    else:
        return
    got, wanted = tensors.get(key), expected[key]
    if got is None or got.shape == wanted.shape or got.dim() != wanted.dim():
        return
    first = wanted.shape[-2] - grid[0] * grid[1]  # rows of the class token and registers
    cells = got.shape[-2] - first
    root = math.isqrt(max(cells, 0))
    if got.shape[-1] == wanted.shape[-1] and root * root == cells and 0 < cells <= MOST_POSITIONS:
        log.warning(
            "position embeddings of %d x %d cells are interpolated to %d x %d; image_size= keeps "
            "those of the file",
            *(root, root, *grid),
        )
        # Half precision has no bicubic interpolation; the model's own precision stays.
        table = got.reshape(-1, got.shape[-1]).float()
        tensors[key] = resample_positions(table, (root, root), grid).reshape(wanted.shape)


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
    lines = listed({**misfits, "not finite": broken})
    if not lines:
        return
    report = "\n".join(f"  {line}" for line in lines)
    if any(misfits.values()):
        close = _names_of_shapes(got)
        if close and close == _names_of_shapes(expected):  # to name it again would be no help
            remedy = f"by its shapes it is {close[0]}, but with other parts than open_clip's"
        else:
            hint = f"; by its shapes it is {' or '.join(close)}" if close else ""
            remedy = f"name the architecture that the file was trained with (model.name=...){hint}"
    else:
        remedy = "its training diverged; take an earlier checkpoint"
    raise ValueError(
        f"{source} ({len(got)} tensors) does not fit the model ({len(expected)} tensors):\n"
        f"{report}\n{remedy}"
    )


def _names_of_shapes(state: Mapping[str, Tensor]) -> list[str]:
    """Names of open_clip, three at most, whose native ViT and text tower have these shapes."""
    conv, table = state.get("visual.conv1.weight"), state.get("visual.positional_embedding")
    words = state.get("token_embedding.weight", state.get("text.token_embedding.weight"))
    if conv is None or table is None or words is None or conv.ndim != 4:
        return []
    blocks = {key.split(".")[3] for key in state if key.startswith("visual.transformer.resblocks.")}
    size = math.isqrt(len(table) - 1) * conv.shape[2]
    found = (conv.shape[0], conv.shape[2], len(blocks), size, *words.shape)
    names = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        defaults = {"width": 768, "patch_size": 16, "layers": 12, "image_size": 224}
        image = [vision.get(key, value) for key, value in defaults.items()]
        if found == (*image, text.get("vocab_size", 49408), text.get("width", 512)):
            names.append(name)
    return sorted(names, key=len)[:3]
