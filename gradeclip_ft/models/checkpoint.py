"""Weights from files, strictly: nothing is ignored, and what does not fit is named.

Never executes code: safetensors, or torch files read with `weights_only`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from open_clip.factory import resize_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gradeclip_ft.models.tower import Foreign

PREFIXES = ("module.", "model.", "_orig_mod.", "clip.")
SHOWN = 5


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors`, `.pt`, `.pth` or Lightning `.ckpt` file under open_clip's keys.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a weights file, or one that needs to execute code.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"weights file {file} does not exist; give a .safetensors or .pt file, a tag of "
            "`open_clip.list_pretrained()`, or `random`"
        )
    state = _unwrap(_read(file), file)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def load_state(model: Foreign, state: Mapping[str, Tensor], source: str) -> None:
    """Copy the tensors into the model; position embeddings of another grid are interpolated.

    Raises:
        ValueError: Keys are missing or unexpected, shapes differ, or values are not finite.
    """
    # Half precision has no bicubic interpolation; the model's own precision stays.
    tensors = {
        key: value.float() if value.is_floating_point() else value for key, value in state.items()
    }
    if "positional_embedding" in tensors and hasattr(model, "text"):
        raise ValueError(
            f"{source} holds a model of another architecture (its text tower is not nested under "
            "`text.`); name the architecture that it was trained with"
        )
    if getattr(model.visual, "positional_embedding", None) is not None:
        resize_pos_embed(tensors, model, interpolation="bicubic", antialias=True)
    _compare(model.state_dict(), tensors, source)
    model.load_state_dict(tensors, strict=True)


def _read(file: Path) -> object:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} cannot be read without executing code that it carries; it is refused. Ask "
            "for a .safetensors file, or one with plain tensors only"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} is not a readable weights file, or truncated: {error}") from error


def _unwrap(content: object, file: Path) -> dict[str, Tensor]:
    while isinstance(content, dict):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return content
        inner = next((key for key in ("state_dict", "model", "module") if key in content), None)
        if inner is None:
            break
        content = content[inner]
    raise ValueError(
        f"{file} holds {type(content).__name__}, expected tensors by name, plain or below "
        "`state_dict`, `model` or `module`"
    )


def _compare(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], source: str) -> None:
    missing = [key for key in expected if key not in got]
    unexpected = [key for key in got if key not in expected]
    shapes = [
        f"{key}: got {tuple(got[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in got and got[key].shape != value.shape
    ]
    broken = [
        key
        for key, value in got.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "of another shape": shapes,
        "not finite": broken,
    }
    lines = [
        f"  {len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for what, names in problems.items()
        if names
    ]
    if lines:
        report = "\n".join(lines)
        raise ValueError(
            f"{source} ({len(got)} tensors) does not fit the model ({len(expected)} tensors):\n"
            f"{report}\nname the architecture that the file was trained with (model.name=...)"
        )
