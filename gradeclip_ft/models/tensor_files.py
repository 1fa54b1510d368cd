"""Tensors from files, never executing code: safetensors, or torch's with `weights_only`."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

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
    """The weights in a folder.

    Raises:
        FileNotFoundError: There are none.
    """
    found = next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no weights, expected {FOLDER_FILES[0]}")
    return found


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
        raise ValueError(f"{file} is not a readable weights file, or damaged: {reason}") from error


def _unwrap(content: object, file: Path) -> dict[str, Tensor]:
    while isinstance(content, dict):
        if content and all(map(_is_plain, content, content.values())):
            return content
        inner = next((key for key in ("state_dict", "model", "module") if key in content), None)
        if inner is None:
            break
        content = content[inner]
    raise ValueError(
        f"{file} holds {type(content).__name__}, expected tensors by name, plain or below "
        "`state_dict`, `model` or `module`"
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
