"""Names and weights to a model that is ready to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import VisionTransformer

from gradeclip_ft.models.architecture import (
    ASSETS,
    Architecture,
    checked_size,
    find_architecture,
    set_image_size,
)
from gradeclip_ft.models.clip import Clip, LoadedClip, Preprocessing
from gradeclip_ft.models.other.blip import BLIP, load_blip
from gradeclip_ft.models.tokenizer import Tokenizer, WordTokenizer, fetch_tokenizer
from gradeclip_ft.models.trace import Foreign
from gradeclip_ft.models.weights import load_state, read_state, weights_file

RANDOM = "random"


def load_clip(
    name: str,
    weights: str | Path | None = None,
    *,
    image_size: int | Sequence[int] | None = None,
) -> LoadedClip:
    """A CLIP with its tokenizer and preprocessing.

    Args:
        name: A model name of open_clip; a folder in open_clip's layout (also `local-dir:FOLDER`,
            `hf-hub:OWNER/NAME`); `blip:FOLDER` or `blip:OWNER/NAME`, Hugging Face's BLIP for
            retrieval; or `shapes_tiny`, the small CLIP of this package.
        weights: A tag of open_clip for this model, a file, a folder of Hugging Face's
            `CLIPModel`, or `random`. May be left out for a folder and for the packaged model,
            which have their own.
        image_size: Side in pixels, or (height, width), where it is not the model's own. Position
            embeddings are interpolated.

    Raises:
        ValueError: Unknown name or tag, weights that do not fit, or a size that is not a
            multiple of the patch.
        FileNotFoundError: No such file or folder.
    """
    if name.startswith(BLIP):
        return load_blip(name, weights, image_size=image_size)
    architecture = find_architecture(name)
    chosen = weights if weights is not None else _own_weights(architecture)
    model, preprocess = _build(architecture, chosen, image_size)
    clip = Clip(model)
    own = architecture.model_cfg["vision_cfg"].get("image_size", 224)
    return LoadedClip(
        clip=clip.eval(),
        tokenizer=_tokenizer(architecture, clip),
        preprocessing=_preprocessing(preprocess),
        image_size=checked_size(image_size, own, clip.image.patch, name),
        architecture=architecture,
        weights=str(chosen) if weights is not None else None,
    )


def _own_weights(architecture: Architecture) -> str | Path:
    """The weights that come with a folder or a packaged model."""
    if architecture.folder is not None:
        return weights_file(architecture.folder)
    if architecture.registered:
        raise ValueError(
            f"no weights given for {architecture.name}; choose a tag "
            f"({_tags(architecture.name)}), a file, or `random`"
        )
    return Path(str(ASSETS / f"{architecture.name}.safetensors"))


def _build(
    architecture: Architecture, weights: str | Path, image_size: int | Sequence[int] | None
) -> tuple[Foreign, Mapping[str, Any]]:
    """The open_clip module with its weights at the wanted size, and how its pixels are made."""
    name, spec = architecture.name, str(weights)
    if architecture.registered and spec in open_clip.list_pretrained_tags_by_model(name):
        try:
            model = open_clip.create_model(name, pretrained=spec, require_pretrained=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"weights {spec!r} of {name} cannot be fetched: {error}. Download them where there "
                "is a network and give the file as weights="
            ) from error
        set_image_size(model, image_size)
        return model, model.visual.preprocess_cfg
    if spec != RANDOM and not Path(spec).exists() and not Path(spec).suffix:
        raise ValueError(
            f"{name} has no weights tag {spec!r}; choose a tag ({_tags(name)}), a file, or `random`"
        )
    model = architecture.build()
    set_image_size(model, image_size)
    if spec != RANDOM:
        load_state(model, read_state(weights), spec)
    return model, architecture.preprocess_cfg or published_preprocess(name)


def published_preprocess(name: str) -> Mapping[str, Any]:
    """Preprocessing that all published weights of a name agree on; empty where they do not."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    found = [
        {key: value for key in keys if (value := open_clip.get_pretrained_cfg(name, tag).get(key))}
        for tag in open_clip.list_pretrained_tags_by_model(name)
    ]
    return found[0] if found and all(one == found[0] for one in found) else {}


def _preprocessing(how: Mapping[str, Any]) -> Preprocessing:
    default = Preprocessing()
    resize = how.get("resize_mode") or "shortest"
    if resize not in ("shortest", "squash"):
        raise ValueError(f"resize_mode is {resize!r}, expected shortest or squash")
    return Preprocessing(
        mean=tuple(how.get("mean") or default.mean),
        std=tuple(how.get("std") or default.std),
        interpolation=how.get("interpolation") or "bicubic",
        resize="squash" if resize == "squash" else "shortest",
    )


def _tokenizer(architecture: Architecture, clip: Clip) -> Tokenizer:
    text = architecture.model_cfg["text_cfg"]
    length = int(text.get("context_length") or clip.text.context_length)
    packs = clip.text.encode_packed is not None
    if architecture.vocabulary is not None:
        return Tokenizer(WordTokenizer(architecture.vocabulary, length), length, packs=packs)
    source = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    extra = dict(text.get("tokenizer_kwargs") or {})
    if source is None:
        tokenize = SimpleTokenizer(context_length=length, **extra)
    else:
        tokenize = fetch_tokenizer(str(source), length, extra)
    own = getattr(getattr(tokenize, "tokenizer", None), "pad_token_id", None)
    pad = clip.text.pad if own is None else int(own)
    return Tokenizer(tokenize, length, exact_cut=clip.text.cuts_exactly, pad=pad, packs=packs)


def _tags(name: str) -> str:
    return ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none is published"


def describe(loaded: LoadedClip) -> dict[str, Any]:
    """Content of an `open_clip_config.json`: architecture and preprocessing.

    The image size is the one that open_clip can build: that of the model for open_clip's own ViT,
    the architecture's for others (`set_image_size`).
    """
    model, how = dict(loaded.architecture.model_cfg), loaded.preprocessing
    if isinstance(loaded.clip.model.visual, VisionTransformer):
        height, width = loaded.image_size
        size = height if height == width else [height, width]
        model["vision_cfg"] = {**model["vision_cfg"], "image_size": size}
    pixels = {"mean": list(how.mean), "std": list(how.std)}
    resizing = {"interpolation": how.interpolation, "resize_mode": how.resize}
    return {"model_cfg": model, "preprocess_cfg": pixels | resizing}
