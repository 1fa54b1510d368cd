"""BLIP's contrastive branch (Hugging Face's BlipForImageTextRetrieval) as a CLIP.

S = cos(vision_proj(class token), text_proj(first token)). The matching head behind cross-attention
is left out: after fusion no linear path leads from a layer's attention to an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gradeclip_ft.models.architecture import Architecture, fetch_repository, read_json
from gradeclip_ft.models.checkpoint import load_exactly
from gradeclip_ft.models.clip import Clip, LoadedClip
from gradeclip_ft.models.image_model import ImageModel
from gradeclip_ft.models.sizes import checked_size
from gradeclip_ft.models.tensor_files import read_tensors
from gradeclip_ft.models.tokenizer import Tokenizer, fetch_tokenizer
from gradeclip_ft.models.tower import Foreign
from gradeclip_ft.models.towers.blip_vision import BlipVisionTower
from gradeclip_ft.models.towers.hf_text import BertTextTower
from gradeclip_ft.models.transform import Preprocessing

BLIP = "blip:"
PICTURES = "preprocessor_config.json"
BILINEAR = 2  # Pillow's number; BLIP's own is 3, bicubic
OMITTED = ("text_encoder.embeddings.position_ids",)  # a constant that older files carry


class Blip(Clip):
    """A BlipForImageTextRetrieval seen through two towers, for explanation and evaluation."""

    def __init__(self, model: Foreign) -> None:
        ImageModel.__init__(self, model, BlipVisionTower(model))
        text = model.text_encoder
        length = int(text.config.max_position_embeddings)
        self.text = BertTextTower(text, model.text_proj, length)

    @property
    def log_scale(self) -> Tensor:
        """Zero: like the library's, scores are bare cosines; no temperature is published."""
        return torch.zeros((), device=self.device)

    def train(self, mode: bool = True) -> Blip:
        """Evaluation mode only.

        Raises:
            ValueError: Training mode is asked for.
        """
        if mode:
            raise ValueError(
                "BLIP is explained and evaluated here, not trained: its published weights have no "
                "temperature to train with; choose a model of open_clip"
            )
        super().train(mode)
        return self


def load_blip(
    name: str,
    weights: str | Path | None = None,
    *,
    image_size: int | Sequence[int] | None = None,
) -> LoadedClip:
    """A BLIP with its BERT tokenizer and preprocessing.

    Args:
        name: Folder or repository of a BlipForImageTextRetrieval, with or without `blip:`.
        weights: A file or folder in its layout, or `random`; None for the folder's own.
        image_size: Side in pixels, or (height, width), where it is not the model's own.

    Raises:
        ValueError: transformers is not installed, another kind of model, or weights that do not
            fit.
        FileNotFoundError: The folder lacks a file.
    """
    folder = _folder(name)
    model = _build(folder)
    if weights != "random":
        state = read_tensors(folder if weights is None else weights)
        kept = {key: value for key, value in state.items() if key not in OMITTED}
        load_exactly(model, kept, str(folder if weights is None else weights))
    clip = Blip(model.float()).eval()
    pictures = _read(folder / PICTURES)
    tokenize = fetch_tokenizer(str(folder), clip.text.context_length, {})
    return LoadedClip(
        clip=clip,
        tokenizer=Tokenizer(tokenize, clip.text.context_length, pad=clip.text.pad),
        preprocessing=_preprocessing(pictures),
        image_size=checked_size(
            image_size, int(model.config.vision_config.image_size), clip.image.patch, name
        ),
        architecture=Architecture(f"{BLIP}{name.removeprefix(BLIP)}", {}, {}, folder=folder),
        weights=None if weights is None else str(weights),
    )


def _folder(name: str) -> Path:
    source = name.removeprefix(BLIP)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise FileNotFoundError(
            f"no folder {source}; give one with config.json, weights, tokenizer and {PICTURES}, or "
            "a repository such as blip:Salesforce/blip-itm-base-coco"
        )
    return fetch_repository(source)


def _build(folder: Path) -> Foreign:
    """The library's module with random weights."""
    try:
        from transformers import BlipConfig, BlipForImageTextRetrieval
    except ImportError as error:
        raise ValueError(
            "BLIP needs transformers; pip install 'gradeclip_ft[huggingface]'"
        ) from error
    config = _read(folder / "config.json")
    if config.get("model_type") != "blip":
        raise ValueError(
            f"{folder / 'config.json'} describes a model of type {config.get('model_type')!r}, "
            "expected 'blip', saved by BlipForImageTextRetrieval"
        )
    return BlipForImageTextRetrieval(BlipConfig.from_dict(config))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}; save model, tokenizer and image processor there "
            "with save_pretrained"
        )
    content: dict[str, Any] = read_json(path)
    return content


def _preprocessing(how: Mapping[str, Any]) -> Preprocessing:
    """BLIP squashes pictures to a square; its mean and deviation are CLIP's unless stated."""
    default = Preprocessing()
    interpolation: Literal["bicubic", "bilinear"] = (
        "bilinear" if how.get("resample") == BILINEAR else "bicubic"
    )
    return Preprocessing(
        mean=tuple(how.get("image_mean") or default.mean),
        std=tuple(how.get("image_std") or default.std),
        interpolation=interpolation,
        resize="squash",
    )
