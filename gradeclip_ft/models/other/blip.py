"""BLIP's contrastive branch (Hugging Face's BlipForImageTextRetrieval) as a CLIP.

S = cos(vision_proj(class token), text_proj(first token)). The matching head after cross-attention
is left out: after fusion no linear path leads from a layer's attention to an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradeclip_ft.models.architecture import Architecture, checked_size, fetch_repository, read_json
from gradeclip_ft.models.clip import LoadedClip, Preprocessing
from gradeclip_ft.models.tokenizer import Tokenizer, fetch_tokenizer
from gradeclip_ft.models.tower import (
    Tower,
    embed_patches,
    image_grid,
    image_pass,
    project_fused,
    residual_layer,
)
from gradeclip_ft.models.towers.text import bert_text_tower
from gradeclip_ft.models.trace import Foreign, Layer, Pass, Pick
from gradeclip_ft.models.weights import PICTURES, load_exactly, pixels_of_processor, read_tensors

BLIP = "blip:"
OMITTED = ("text_encoder.embeddings.position_ids",)  # a constant that older files carry


class Blip(nn.Module):
    """A BlipForImageTextRetrieval seen through two towers, for explanation and evaluation."""

    def __init__(self, model: Foreign) -> None:
        super().__init__()
        self.model: Foreign = model
        self.image = _image_tower(model)
        text = model.text_encoder
        length = int(text.config.max_position_embeddings)
        self.text = bert_text_tower(text, lambda rows: model.text_proj(rows), length)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def log_scale(self) -> Tensor:
        """Zero: like the library's, scores are bare cosines; no temperature is published."""
        return torch.zeros((), device=self.device)


def _image_tower(model: Foreign) -> Tower:
    """The image tower: the class token, normed and projected."""
    vision, parts = model.vision_model, model.vision_model.embeddings
    layers = tuple(_layer(layer) for layer in vision.encoder.layers)
    patch = int(parts.patch_size)

    def head(rows: Tensor) -> Tensor:
        projected: Tensor = model.vision_proj(vision.post_layernorm(rows))
        return projected

    def open_pass(x: Float[Tensor, "B 3 H W"]) -> Pass:
        grid, side = image_grid(x, patch), parts.image_size // patch
        token, table = parts.class_embedding, parts.position_embedding[0]
        tokens = embed_patches(x, parts.patch_embedding, token, table, (side, side), grid)
        return image_pass(tokens, layers, head, grid)

    return Tower(
        open_pass,
        width=int(parts.embed_dim),
        heads=layers[-1].heads,
        depth=len(layers),
        pooling="class token",
        patch=patch,
    )


def _layer(layer: Foreign) -> Layer:
    """A pre-norm layer."""
    attention = layer.self_attn

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        qkv = attention.qkv
        return project_fused(layer.layer_norm1(tokens), pick, qkv.weight, qkv.bias)

    return residual_layer(
        attend,
        add=attention.projection,
        mix=lambda x: layer.mlp(layer.layer_norm2(x)),
        project=attention.projection,
        heads=int(attention.num_heads),
        run=lambda tokens, mask: layer(tokens),
    )


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
        image_size: As for `load_clip`.

    Raises:
        ValueError: transformers is not installed, another kind of model, or weights that do not
            fit.
        FileNotFoundError: The folder lacks a file.
    """
    source = name.removeprefix(BLIP)
    folder = _folder(source)
    model = _build(folder)
    chosen = folder if weights is None else weights
    if chosen != "random":
        state = {key: x for key, x in read_tensors(chosen).items() if key not in OMITTED}
        load_exactly(model, state, str(chosen))
    clip = Blip(model.float()).eval()
    squashed = {**pixels_of_processor(_read(folder / PICTURES)), "resize_mode": "squash"}
    length = clip.text.context_length
    return LoadedClip(
        clip=clip,
        tokenizer=Tokenizer(fetch_tokenizer(str(folder), length, {}), length, pad=clip.text.pad),
        preprocessing=Preprocessing.of(squashed),
        image_size=checked_size(
            image_size, int(model.config.vision_config.image_size), clip.image.patch, name
        ),
        architecture=Architecture(f"{BLIP}{source}", {}, {}, folder=folder),
        weights=None if weights is None else str(weights),
    )


def _folder(source: str) -> Path:
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
