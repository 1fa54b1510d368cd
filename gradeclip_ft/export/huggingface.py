"""A folder in the layout of the Hugging Face hub, for open_clip and, where it fits, transformers.

open_clip reads `open_clip_config.json` and `open_clip_model.safetensors`; `CLIPModel` reads
`config.json` and `model.safetensors`. Each finds its own file first.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradeclip_ft.export.card import as_strings
from gradeclip_ft.export.job import (
    Job,
    Written,
    read_tensors,
    save_state,
    write_clip_tokenizer,
    write_description,
    write_json,
)
from gradeclip_ft.export.openclip import FILES, check_folder, code, folder_call
from gradeclip_ft.export.verify import ExportError, check_embeddings, check_tensors
from gradeclip_ft.models.architecture import CONFIG_NAME, pair
from gradeclip_ft.models.load import describe
from gradeclip_ft.models.names import clip_config, from_huggingface, misfit, to_huggingface

OPENCLIP = FILES["safetensors"]
TRANSFORMERS = "model.safetensors"
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # numbers of Pillow


class AsEncoders(nn.Module):
    """A `transformers.CLIPModel` with open_clip's two methods."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Image embeddings."""
        embeddings: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return embeddings

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Text embeddings."""
        embeddings: Tensor = self.model.get_text_features(input_ids=tokens).pooler_output
        return embeddings


def write_huggingface(job: Job, stage: Path) -> Written:
    """Everything of the folder; read back by open_clip and by transformers where it fits.

    Raises:
        ExportError: Read back, it is another model.
    """
    parts = write_description(job.loaded, stage)
    note = as_strings(job.facts)
    save_state(job.state, stage / OPENCLIP, note)
    check_tensors(job.state, read_tensors(stage / OPENCLIP), OPENCLIP)
    difference = check_folder(job, stage, parts=parts)
    checks = [
        f"{OPENCLIP}: {len(job.state)} tensors read back bit-equal",
        f"open_clip from the folder: loads again, embeddings equal to {difference:.0e}",
    ]
    usage = code("import open_clip", folder_call(job.folder, parts=parts))
    description = json.loads((stage / CONFIG_NAME).read_text(encoding="utf-8"))
    reason = misfit(description["model_cfg"])
    if reason is not None:
        checks.append(f"no files for transformers: its CLIPModel has no {reason}")
        return Written(tuple(checks), usage)
    _write_transformers(job, stage, note)
    checks += _check_transformers(job, stage)
    call = f'model = CLIPModel.from_pretrained("{job.folder}")'
    return Written(tuple(checks), f"{usage}\n\n{code('from transformers import CLIPModel', call)}")


def _write_transformers(job: Job, stage: Path, note: dict[str, str]) -> None:
    loaded = job.loaded
    row = loaded.tokenizer(["a"])[0]
    config = clip_config(
        describe(loaded)["model_cfg"],
        start=int(row[0]),
        end=int(row.max()),  # pooling by arg-max: the end has the largest id
        dtype=str(job.facts["precision"]),
    )
    write_json(config, stage / "config.json")
    write_json(_preprocessor(job), stage / "preprocessor_config.json")
    write_clip_tokenizer(loaded, stage)
    renamed = to_huggingface(job.state)
    save_state(renamed, stage / TRANSFORMERS, note)
    stored = read_tensors(stage / TRANSFORMERS)
    check_tensors(renamed, stored, TRANSFORMERS)
    nested = "text.positional_embedding" in job.state
    check_tensors(job.state, from_huggingface(stored, nested=nested), f"{TRANSFORMERS} renamed")


def _preprocessor(job: Job) -> dict[str, Any]:
    how = job.loaded.preprocessing
    height, width = pair(describe(job.loaded)["model_cfg"]["vision_cfg"]["image_size"])
    size = {"height": height, "width": width}
    squash = how.resize == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size if squash else {"shortest_edge": height},
        "resample": RESAMPLE[how.interpolation],
        "do_center_crop": not squash,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }


def _check_transformers(job: Job, stage: Path) -> list[str]:
    counted = f"{TRANSFORMERS}: renamed back, all {len(job.state)} tensors bit-equal"
    if importlib.util.find_spec("transformers") is None:
        return [
            counted,
            "transformers is not installed, so its CLIPModel was not tried; "
            "pip install 'gradeclip_ft[huggingface]' and export again",
        ]
    from transformers import CLIPModel  # an extra: present only where asked for

    load: Any = CLIPModel.from_pretrained
    model, found = load(str(stage), dtype=torch.float32, output_loading_info=True)
    if wrong := [f"{kind} {keys}" for kind, keys in found.items() if keys]:
        raise ExportError(
            f"transformers' CLIPModel does not take {TRANSFORMERS} as it is: {'; '.join(wrong)}. "
            "The export is not kept; use to=[openclip]"
        )
    difference = check_embeddings(job.loaded, AsEncoders(model), job.inputs, half=job.half)
    return [
        counted,
        f"transformers.CLIPModel: loads again, embeddings equal to {difference:.0e}",
    ]
