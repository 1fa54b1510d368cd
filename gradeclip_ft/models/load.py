"""Names and weights to a model that is ready to use."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import VisionTransformer
from PIL import Image

from gradeclip_ft.models.architecture import (
    ASSETS,
    Architecture,
    check_stated,
    checked_size,
    find_architecture,
    pair,
    set_image_size,
)
from gradeclip_ft.models.clip import Clip, ImageTransform, LoadedClip, Preprocessing
from gradeclip_ft.models.other.blip import BLIP, load_blip
from gradeclip_ft.models.tokenizer import Tokenizer, WordTokenizer, fetch_tokenizer
from gradeclip_ft.models.trace import Foreign
from gradeclip_ft.models.weights import (
    is_run,
    load_state,
    read_state,
    stated_config,
    weights_file,
)

log = logging.getLogger(__name__)

RANDOM = "random"
QUICK_GELU = "-quickgelu"
MOST_TOKENS = 4096  # of a file's text positions; a mask of their square is built


def usual_weights(name: str) -> tuple[str, str]:
    """Name and tag of open_clip to begin with: OpenAI's weights, else the first that it lists.

    OpenAI trained with QuickGELU, which is another name in open_clip.

    Raises:
        ValueError: There are none.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tags:
        raise ValueError(
            f"model={name}: open_clip has no weights of it; add model.weights=FILE, or "
            f"model.weights={RANDOM} to begin without"
        )
    if "openai" in tags and f"{name}{QUICK_GELU}" in open_clip.list_models():
        return f"{name}{QUICK_GELU}", "openai"
    return name, "openai" if "openai" in tags else tags[0]


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
    spec, unknown = str(chosen), False
    pixels: Mapping[str, Any] = architecture.preprocess_cfg
    if architecture.registered and spec in open_clip.list_pretrained_tags_by_model(
        _home(name, spec)
    ):
        model, pixels = _fetch(architecture, spec, image_size)
    elif spec == RANDOM:
        model = architecture.build()
        set_image_size(model, image_size)
    elif not Path(spec).exists() and not Path(spec).suffix:
        raise ValueError(
            f"{name} has no weights tag {spec!r}; choose a tag ({_tags(name)}), a file, or `random`"
        )
    else:
        architecture, model, pixels, unknown = _read(architecture, Path(spec), image_size)
    clip = Clip(model)
    own = architecture.model_cfg["vision_cfg"].get("image_size", 224)
    return LoadedClip(
        clip=clip.eval(),
        tokenizer=_tokenizer(architecture, clip),
        preprocessing=Preprocessing.of(pixels or published_preprocess(name)),
        image_size=checked_size(image_size, own, clip.image.patch, name),
        architecture=architecture,
        weights=spec if weights is not None else None,
        activation_unknown=unknown,
    )


def from_open_clip(model: Foreign, preprocess: Foreign, tokenizer: Foreign) -> LoadedClip:
    """A model in memory with what open_clip gives beside it.

    The parameters stay those of the model, on its device, and it keeps its mode.

    Args:
        model: As `open_clip.create_model_and_transforms` returns it, in float32.
        preprocess: The last one that it returns, which is for evaluation.
        tokenizer: Of `open_clip.get_tokenizer`, or any other function from a list of texts to token
            ids (M, L) at the full context.

    Raises:
        ValueError: The model is not one of open_clip's or not in float32, or the transform does
            something else than open_clip's.
    """
    name = type(model).__name__
    if not hasattr(model, "visual"):
        raise ValueError(
            f"model is a {name}, expected one of open_clip's, with its image tower as `visual`; of "
            "a model in a wrapper give what it wraps, such as model.module"
        )
    if (dtype := next(model.parameters()).dtype) != torch.float32:
        raise ValueError(f"the model is in {dtype}, expected torch.float32; give model.float()")
    clip, transform = Clip(model), _transform_of(preprocess)
    length = getattr(tokenizer, "context_length", None) or clip.text.context_length
    return LoadedClip(
        clip=clip,
        tokenizer=_around(tokenizer, int(length), clip),
        preprocessing=transform.preprocessing,
        image_size=checked_size(None, transform.size, clip.image.patch, name),
        architecture=Architecture(name, {}, {}),
    )


def _transform_of(preprocess: Foreign) -> ImageTransform:
    """The same transform as one of ours, which knows where its pixels come from.

    Raises:
        ValueError: It does something else.
    """
    steps = {type(step).__name__: step for step in getattr(preprocess, "transforms", ())}
    resize = steps.get("Resize") or steps.get("ResizeKeepRatio")
    crop = steps.get("CenterCrop") or steps.get("CenterCropOrPad")
    if resize and "Normalize" in steps:
        whole = getattr(resize, "longest", 0) == 1
        how = Preprocessing(
            mean=tuple(steps["Normalize"].mean),
            std=tuple(steps["Normalize"].std),
            interpolation=resize.interpolation.value,
            resize="squash" if crop is None else "longest" if whole else "shortest",
        )
        ours = ImageTransform(pair((crop or resize).size), how)
        if same_pixels(ours, preprocess):
            return ours
    raise ValueError(
        f"preprocess ({type(preprocess).__name__}) is not what open_clip's "
        "create_model_and_transforms returns last, its transform for evaluation, with black as its "
        "padding; give that one, and pixels of your own making as normalised tensors (3, H, W)"
    )


def same_pixels(ours: ImageTransform, theirs: Foreign) -> bool:
    """Whether two transforms make the same of noise that is wide, and of noise that is high."""
    noise = np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8)
    for image in map(Image.fromarray, (noise, noise.transpose(1, 0, 2).copy())):
        one, other = ours(image), theirs(image)
        if one.shape != other.shape or not torch.allclose(one, other, atol=1e-3):
            return False
    return True


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


def _fetch(
    architecture: Architecture, tag: str, image_size: int | Sequence[int] | None
) -> tuple[Foreign, Mapping[str, Any]]:
    """The open_clip module with published weights, and how their pixels are made."""
    name = architecture.name
    quick = check_activation(name, tag)
    try:
        model = open_clip.create_model(
            _home(name, tag), pretrained=tag, require_pretrained=True, force_quick_gelu=quick
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"weights {tag!r} of {name} cannot be fetched: {error}. Download them where there "
            "is a network and give the file as weights="
        ) from error
    set_image_size(model, image_size)
    return model, model.visual.preprocess_cfg


def check_activation(name: str, tag: str) -> bool:
    """Whether published weights want QuickGELU.

    open_clip only warns where a tag was trained with another activation than a name computes, and
    does not know it of two of OpenAI's ResNets; all of OpenAI's were trained with QuickGELU.

    Raises:
        ValueError: The architecture of that name computes the other one.
    """
    published = open_clip.get_pretrained_cfg(_home(name, tag), tag)
    quick = bool(published.get("quick_gelu", tag == "openai"))
    own = bool((open_clip.get_model_config(name) or {}).get("quick_gelu"))
    other = name.removesuffix(QUICK_GELU) if name.endswith(QUICK_GELU) else name + QUICK_GELU
    if published and quick != own and other in open_clip.list_models():
        raise ValueError(
            f"weights {tag!r} were trained with {'QuickGELU' if quick else 'GELU'}, which {name} "
            f"does not compute; give name={other}"
        )
    return quick


def _home(name: str, tag: str) -> str:
    """The name under which open_clip lists a tag; it lists some without the activation's suffix."""
    listed = tag in open_clip.list_pretrained_tags_by_model(name)
    return name if listed else name.removesuffix(QUICK_GELU)


def _read(
    architecture: Architecture, weights: Path, image_size: int | Sequence[int] | None
) -> tuple[Architecture, Foreign, Mapping[str, Any], bool]:
    """Architecture and module as the file wants them, its pixels, and if the activation is unknown.

    The architecture gets the file's number of text positions: a causal tower needs no more.
    """
    name = architecture.name
    stated, pixels = stated_config(weights, architecture.model_cfg)
    if stated is not None:
        check_stated(architecture, stated, str(weights), sizes=image_size is None)
    state = read_state(weights)
    text = architecture.model_cfg["text_cfg"]
    table = state.get("positional_embedding", state.get("text.positional_embedding"))
    own = text.get("context_length", 77)
    length = own if table is None or text.get("embed_cls") else len(table)
    if length != own and length <= MOST_TOKENS:
        log.warning(
            "%s has %d text positions instead of the %d of %s; texts are read up to there",
            *(weights, length, own, name),
        )
        cfg = {**architecture.model_cfg, "text_cfg": {**text, "context_length": length}}
        architecture = replace(architecture, model_cfg=cfg, registered=False)
    model = architecture.build()
    set_image_size(model, image_size)
    load_state(model, state, str(weights))
    names = {plain := name.removesuffix(QUICK_GELU), plain + QUICK_GELU}
    unknown = stated is None and names <= set(open_clip.list_models()) and not is_run(weights)
    if unknown:
        log.warning(
            "%s does not say whether it was trained with GELU or QuickGELU (as OpenAI's and "
            "MetaCLIP's were); %s computes %s",
            *(weights, name, "QuickGELU" if name.endswith(QUICK_GELU) else "GELU"),
        )
    return architecture, model, pixels or architecture.preprocess_cfg, unknown


def published_preprocess(name: str) -> Mapping[str, Any]:
    """Preprocessing that all published weights of a name agree on; empty where they do not."""
    keys = ("mean", "std", "interpolation", "resize_mode")
    found = [
        {key: value for key in keys if (value := open_clip.get_pretrained_cfg(name, tag).get(key))}
        for tag in open_clip.list_pretrained_tags_by_model(name)
    ]
    return found[0] if found and all(one == found[0] for one in found) else {}


def _tokenizer(architecture: Architecture, clip: Clip) -> Tokenizer:
    text = architecture.model_cfg["text_cfg"]
    length = int(text.get("context_length") or clip.text.context_length)
    if architecture.vocabulary is not None:
        packs = clip.text.encode_packed is not None
        return Tokenizer(WordTokenizer(architecture.vocabulary, length), length, packs=packs)
    source = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    extra = dict(text.get("tokenizer_kwargs") or {})
    if source is None:
        return _around(SimpleTokenizer(context_length=length, **extra), length, clip)
    return _around(fetch_tokenizer(str(source), length, extra), length, clip)


def _around(tokenize: Foreign, length: int, clip: Clip) -> Tokenizer:
    own = getattr(getattr(tokenize, "tokenizer", None), "pad_token_id", None)
    return Tokenizer(
        tokenize,
        length,
        exact_cut=clip.text.cuts_exactly,
        pad=clip.text.pad if own is None else int(own),
        packs=clip.text.encode_packed is not None,
    )


def _tags(name: str) -> str:
    return ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none is published"


def open_clip_config(loaded: LoadedClip) -> dict[str, Any]:
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
