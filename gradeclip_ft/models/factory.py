"""Names and weights to a model that is ready to use."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
from open_clip.tokenizer import SimpleTokenizer

from gradeclip_ft.models.checkpoint import load_state, read_state
from gradeclip_ft.models.clip import Clip, LoadedClip
from gradeclip_ft.models.tokenizer import Tokenizer, WordTokenizer
from gradeclip_ft.models.tower import Foreign
from gradeclip_ft.models.transform import Preprocessing

PACKAGED = ("shapes_tiny",)


def load_clip(
    name: str, weights: str | Path | None = None, *, image_size: int | None = None
) -> LoadedClip:
    """A CLIP with its tokenizer and preprocessing.

    Args:
        name: A model name of open_clip, or `shapes_tiny`, the small CLIP of this package.
        weights: A tag of open_clip for this model, a weights file, or `random`. May be left out
            only for a packaged model.
        image_size: Side in pixels where it is not the model's own.

    Raises:
        ValueError: Unknown name or tag, weights that do not fit, or a size that is no multiple of
            the patch.
        FileNotFoundError: No such weights file.
        UnsupportedTowerError: No adapter for a tower of this model.
    """
    if name in PACKAGED:
        return _load_packaged(name, weights, image_size)
    _check_name(name, PACKAGED)
    if weights is None:
        raise ValueError(
            f"no weights given for {name}; choose a tag ({_tags(name)}), a file, or `random`"
        )
    _check_size(name, open_clip.get_model_config(name), image_size)
    model = _build(name, str(weights), image_size)
    clip = Clip(model)
    how = model.visual.preprocess_cfg
    tokenizer = open_clip.get_tokenizer(name)
    return LoadedClip(
        clip=clip.eval(),
        tokenizer=Tokenizer(
            tokenize=tokenizer,
            context_length=clip.text.context_length,
            exact_cut=isinstance(tokenizer, SimpleTokenizer),
        ),
        preprocessing=Preprocessing(
            mean=tuple(how["mean"]),
            std=tuple(how["std"]),
            interpolation=how["interpolation"],
            resize="squash" if how["resize_mode"] == "squash" else "shortest",
        ),
        image_size=_pair(model.visual.image_size),
        name=name,
    )


def packaged_config(name: str) -> dict[str, Any]:
    """Architecture, vocabulary and history of a packaged model."""
    text = resources.files("gradeclip_ft").joinpath("assets", f"{name}.json").read_text("utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def _load_packaged(name: str, weights: str | Path | None, image_size: int | None) -> LoadedClip:
    config = packaged_config(name)
    architecture = config["model_cfg"]
    if image_size is not None:
        _check_size(name, architecture, image_size)
        architecture["vision_cfg"]["image_size"] = image_size
    model = open_clip.CLIP(**architecture)
    if weights != "random":
        with resources.as_file(
            resources.files("gradeclip_ft").joinpath("assets", f"{name}.safetensors")
        ) as packaged:
            source = packaged if weights is None else Path(weights)
            load_state(model, read_state(source), str(source))
    length = architecture["text_cfg"]["context_length"]
    how = config["preprocess_cfg"]
    return LoadedClip(
        clip=Clip(model).eval(),
        tokenizer=Tokenizer(WordTokenizer(tuple(config["vocabulary"]), length), length),
        preprocessing=Preprocessing(
            mean=tuple(how["mean"]), std=tuple(how["std"]), interpolation=how["interpolation"]
        ),
        image_size=_pair(architecture["vision_cfg"]["image_size"]),
        name=name,
    )


def _build(name: str, weights: str, image_size: int | None) -> Foreign:
    """The open_clip module with its weights, at the wanted size."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights in tags:
        try:
            return open_clip.create_model(
                name, pretrained=weights, force_image_size=image_size, require_pretrained=True
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"weights {weights!r} of {name} cannot be fetched: {error}. Download them where "
                "there is a network and give the file as weights="
            ) from error
    if weights != "random" and not Path(weights).exists() and not Path(weights).suffix:
        raise ValueError(
            f"{name} has no weights tag {weights!r}; choose a tag ({_tags(name)}), a file, or "
            "`random`"
        )
    resized_after = "timm_model_name" in open_clip.get_model_config(name)["vision_cfg"]
    model = open_clip.create_model(name, force_image_size=None if resized_after else image_size)
    if weights != "random":
        load_state(model, read_state(weights), weights)
    if resized_after and image_size is not None:
        model.visual.set_input_size(image_size)
    return model


def _check_name(name: str, packaged: tuple[str, ...]) -> None:
    known = [*packaged, *open_clip.list_models()]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(
            f"unknown model {name!r}; did you mean {', '.join(close) or 'ViT-B-16'}? "
            "`open_clip.list_models()` lists all"
        )


def _check_size(name: str, architecture: dict[str, Any], image_size: int | None) -> None:
    patch = architecture["vision_cfg"].get("patch_size")
    if patch is None and "patch" in (
        trunk := architecture["vision_cfg"].get("timm_model_name", "")
    ):
        digits = trunk.split("patch", 1)[1].split("_", 1)[0]
        patch = int(digits) if digits.isdigit() else None
    if image_size is not None and patch and image_size % patch:
        below = image_size // patch * patch
        raise ValueError(
            f"image size {image_size} is not a multiple of the patch size {patch} of {name}; use "
            f"{below} or {below + patch}"
        )


def _tags(name: str) -> str:
    return ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none is published"


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
