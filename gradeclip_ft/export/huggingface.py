"""A folder in the layout of the Hugging Face hub, for open_clip and, where it fits, transformers.

open_clip reads `open_clip_config.json` and `open_clip_model.safetensors`; `CLIPModel` reads
`config.json` and `model.safetensors`. Each finds its own file first.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradeclip_ft.export.job import (
    VOCABULARY,
    Job,
    Written,
    read_tensors,
    save_state,
    write_clip_tokenizer,
    write_json,
)
from gradeclip_ft.export.openclip import code, write_openclip
from gradeclip_ft.export.verify import ExportError, check_embeddings, check_tensors
from gradeclip_ft.models.load import open_clip_config
from gradeclip_ft.models.names import clip_config, from_huggingface, misfit, to_huggingface

TRANSFORMERS = "model.safetensors"
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # numbers of Pillow


class AsEncoders(nn.Module):
    """A `transformers.CLIPModel` with open_clip's two methods."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def encode_image(self, pixels: Tensor) -> Any:
        """Image embeddings."""
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def encode_text(self, tokens: Tensor) -> Any:
        """Text embeddings."""
        return self.model.get_text_features(input_ids=tokens).pooler_output


def write_huggingface(job: Job, stage: Path) -> Written:
    """Everything of the folder; read back by open_clip and by transformers where it fits.

    Raises:
        ExportError: Read back, it is another model.
    """
    written = write_openclip(replace(job, form="safetensors"), stage)
    loaded = job.loaded
    model = open_clip_config(loaded)["model_cfg"]
    padded = "padding of pictures" if loaded.preprocessing.resize == "longest" else None
    if (reason := misfit(model) or padded) is not None:
        said = f"no files for transformers: its CLIPModel has no {reason}"
        return Written((*written.checks, said), written.usage)
    row = loaded.tokenizer(["a"])[0]
    config = clip_config(
        model,
        start=int(row[0]),
        end=int(row.max()),  # pooling by arg-max: the end has the largest id
        dtype=str(job.facts["precision"]),
    )
    write_json(config, stage / "config.json")
    write_json(_preprocessor(job), stage / "preprocessor_config.json")
    write_clip_tokenizer(loaded, stage)
    renamed = to_huggingface(job.state)
    save_state(renamed, stage / TRANSFORMERS, job.facts)
    stored = read_tensors(stage / TRANSFORMERS)
    check_tensors(renamed, stored, TRANSFORMERS)
    nested = "text.positional_embedding" in job.state
    check_tensors(job.state, from_huggingface(stored, nested=nested), f"{TRANSFORMERS} renamed")
    checks = (
        *written.checks,
        f"{TRANSFORMERS}: renamed back, all {len(job.state)} tensors bit-equal",
        _load_in_transformers(job, stage),
    )
    return Written(checks, f"{written.usage}\n\n{_usage(job, (stage / VOCABULARY).is_file())}")


def _usage(job: Job, has_tokens: bool) -> str:
    """Lines from a photo and two texts to their similarities, where there is a tokenizer."""
    call = f'model = CLIPModel.from_pretrained("{job.folder}")'
    if not has_tokens:
        return code("from transformers import CLIPModel", call)
    return code(
        "from PIL import Image",
        "from transformers import CLIPModel, CLIPProcessor",
        call,
        f'processor = CLIPProcessor.from_pretrained("{job.folder}")',
        'given = {"images": Image.open("photo.jpg"), "text": ["a dog", "a cat"], "padding": True}',
        'found = model(**processor(**given, return_tensors="pt"))',
        "print(found.image_embeds @ found.text_embeds.T)",
    )


def _preprocessor(job: Job) -> dict[str, Any]:
    how = job.loaded.preprocessing
    height, width = job.inputs.pixels.shape[2:]
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


def _load_in_transformers(job: Job, stage: Path) -> str:
    """Load the folder as transformers does and compare; a sentence about what was found."""
    if importlib.util.find_spec("transformers") is None:
        return (
            "transformers is not installed, so its CLIPModel was not tried; "
            "pip install 'gradeclip_ft[huggingface]' and export again"
        )
    from transformers import CLIPModel  # an extra: present only where asked for

    load: Any = CLIPModel.from_pretrained
    model, found = load(str(stage), dtype=torch.float32, output_loading_info=True)
    if wrong := [f"{kind} {keys}" for kind, keys in found.items() if keys]:
        raise ExportError(
            f"transformers' CLIPModel does not take {TRANSFORMERS} as it is: {'; '.join(wrong)}. "
            "The export is not kept; use to=[openclip]"
        )
    difference = check_embeddings(job.loaded, AsEncoders(model), job.inputs, half=job.half)
    return f"transformers.CLIPModel: loads again, embeddings equal to {difference:.0e}"
