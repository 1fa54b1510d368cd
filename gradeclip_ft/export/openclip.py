"""Weights in the forms that open_clip loads: one file, beside it a description of the model.

The file goes into `open_clip.create_model(name, pretrained=FILE)`. As safetensors the folder also
goes into `open_clip.create_model("local-dir:FOLDER")`, which needs no registered name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.openclip import CONFIG_NAME, describe, is_registered

FILES = {
    "safetensors": "open_clip_model.safetensors",
    "pt": "open_clip_model.pt",
}


def write_openclip(loaded: LoadedClip, folder: Path, *, form: str = "safetensors") -> Path:
    """Write the model's weights and description into `folder`, each replaced in one step.

    Args:
        loaded: The model.
        folder: Made if absent.
        form: "safetensors" or "pt".

    Returns:
        The weights file.

    Raises:
        ValueError: If the form is unknown, or does not suit an architecture without a registered
            name.
    """
    if form not in FILES:
        raise ValueError(f"format={form} is unknown; use {' or '.join(FILES)}")
    if form != "safetensors" and not is_registered(loaded):
        raise ValueError(
            f"open_clip knows no architecture {loaded.name}, so its export is a folder with a "
            "description, whose weights are safetensors; use format=safetensors"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[form]
    save_state(loaded.clip.model.state_dict(), path)
    description = json.dumps(describe(loaded), indent=2) + "\n"
    aside = folder / f".{CONFIG_NAME}.{os.getpid()}"
    aside.write_text(description, encoding="utf-8")
    aside.replace(folder / CONFIG_NAME)
    return path


def save_state(state: Mapping[str, Tensor], path: Path) -> None:
    """A plain dict of tensors as .safetensors or .pt, complete before it has its name."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".safetensors":
            save_file(tensors, aside, metadata={"format": "pt"})
        else:
            torch.save(tensors, aside)
        aside.chmod(0o644)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
