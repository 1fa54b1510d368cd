"""BLIP's contrastive branch (Hugging Face's BlipForImageTextRetrieval) as a CLIP.

S = cos(vision_proj(class token), text_proj(first token)). The matching head behind cross-attention
is left out: after fusion no linear path leads from a layer's attention to an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.architecture import Architecture, checked_size, fetch_repository, read_json
from gradeclip_ft.models.clip import Clip, ImageModel, LoadedClip, Preprocessing
from gradeclip_ft.models.tokenizer import Tokenizer, fetch_tokenizer
from gradeclip_ft.models.tower import PassTower, image_grid, project_fused, resample_positions
from gradeclip_ft.models.towers.text import BertTextTower
from gradeclip_ft.models.trace import Foreign, Layer, Pass, Pick, class_token_query
from gradeclip_ft.models.weights import load_exactly, read_tensors


class BlipVisionTower(PassTower):
    """Image tower of a BlipForImageTextRetrieval: the class token, normed and projected."""

    pooling = "class token"

    def __init__(self, model: Foreign) -> None:
        self._model, vision = model, model.vision_model
        self._layers = tuple(_layer(layer) for layer in vision.encoder.layers)
        self.width = int(vision.embeddings.embed_dim)
        self.heads = self._layers[-1].heads
        self.depth = len(self._layers)
        self.patch = int(vision.embeddings.patch_size)

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """This forward pass, at any grid; the query is the class token."""
        grid, parts = image_grid(x, self.patch), self._model.vision_model.embeddings
        patches = parts.patch_embedding(x).flatten(2).transpose(1, 2)
        side = parts.image_size // self.patch
        positions = resample_positions(parts.position_embedding[0], (side, side), grid)
        first = parts.class_embedding.expand(len(x), -1, -1)
        tokens = torch.cat([first, patches], dim=1) + positions
        query, explained = class_token_query(tokens, grid)
        return Pass(tokens, self._layers, self._head, query, explained, grid)

    def _head(self, rows: Tensor) -> Tensor:
        normed = self._model.vision_model.post_layernorm(rows)
        projected: Tensor = self._model.vision_proj(normed)
        return projected


def _layer(layer: Foreign) -> Layer:
    """A pre-norm layer."""
    attention = layer.self_attn

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        qkv = attention.qkv
        return project_fused(layer.layer_norm1(tokens), pick, qkv.weight, qkv.bias)

    def finish(x: Tensor, o: Tensor) -> Tensor:
        x = x + attention.projection(o)
        rows: Tensor = x + layer.mlp(layer.layer_norm2(x))
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        rows: Tensor = layer(tokens)
        return rows

    project = attention.projection
    return Layer(attend, finish, project, project, int(attention.num_heads), run)


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
