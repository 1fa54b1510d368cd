"""Image classifiers of timm and torchvision, explained by the logit of a class."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import timm
import torch
import torchvision
from jaxtyping import Float
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torchvision.models import vision_transformer

from gradeclip_ft.models.architecture import checked_size
from gradeclip_ft.models.clip import (
    ImageTextModel,
    ImageTransform,
    LoadedClip,
    Preprocessing,
    hash_weights,
)
from gradeclip_ft.models.tower import (
    Tower,
    embed_patches,
    image_grid,
    image_pass,
    project_fused,
    residual_layer,
)
from gradeclip_ft.models.towers.timm import trunk_tower
from gradeclip_ft.models.trace import Foreign, Layer, Pass, Pick, UnsupportedTowerError
from gradeclip_ft.models.weights import load_exactly, read_tensors
from gradeclip_ft.ops.similarity import product

RANDOM = "random"
TAGS_SHOWN, CLASSES_SHOWN = 6, 3


class Classifier(nn.Module):
    """A classifier; its image tower's embedding is the logits, its score one of them."""

    def __init__(self, model: Foreign) -> None:
        super().__init__()
        self.model: Foreign = model
        if isinstance(model, vision_transformer.VisionTransformer):
            tower = _torchvision_tower(model)
        else:
            tower = trunk_tower(SimpleNamespace(trunk=model, head=nn.Identity()))

        # Embedding · target instead of their cosine: with the unit vector of a class as target,
        # that is the logit of the class.
        def open_pass(x: Tensor) -> Pass:
            return replace(tower.open(x), score=product)

        self.image = replace(tower, open=open_pass, score=product)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier with its preprocessing and class names.

    Attributes:
        image_size: (height, width) in pixels.
        name: As it was asked for.
        classes: Names in the order of the logits; None where they are unknown.
        count: Number of classes.
        weights: Where its weights came from: a tag, a file, `random`.
    """

    classifier: Classifier
    preprocessing: Preprocessing
    image_size: tuple[int, int]
    name: str
    classes: tuple[str, ...] | None
    count: int
    weights: str

    @property
    def image_model(self) -> Classifier:
        """The model; a LoadedClip has it under this name too."""
        return self.classifier

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the current parameters and buffers, independent of any file format."""
        return hash_weights(self.classifier.model)

    def transform(self) -> ImageTransform:
        """Picture to normalised pixels."""
        return ImageTransform(self.image_size, self.preprocessing)

    def pixels(self, images: Sequence[Image.Image | str | Path]) -> Float[Tensor, "B 3 H W"]:
        """Pictures, or their files, as the model takes them, on its device."""
        return self.transform().stack(images).to(self.classifier.device)

    def targets(self, names: Sequence[str | int]) -> Float[Tensor, "P K"]:
        """Unit vectors of classes by name or number: targets of an explanation.

        Args:
            names: A name may be one of several synonyms that commas part, in any case; a number
                may be written as text where no class has that name.

        Raises:
            ValueError: No such class, or a name that several have; close ones are named.
        """
        index: dict[str, set[int]] = {}
        for number, name in enumerate(self.classes or ()):
            for one in (name, *name.split(",")):
                index.setdefault(one.strip().lower(), set()).add(number)
        rows = [_class_number(name, index, self.count) for name in names]
        return torch.eye(self.count)[rows]


ImageModel: TypeAlias = ImageTextModel | Classifier
"""What explaining pictures takes."""
LoadedImageModel: TypeAlias = LoadedClip | LoadedClassifier
"""The same with its pixels."""


def load_classifier(
    name: str,
    weights: str | Path | None = None,
    *,
    classes: str | Path | Sequence[str] | None = None,
    image_size: int | Sequence[int] | None = None,
) -> LoadedClassifier:
    """A classifier with a class token, ready to be explained.

    Args:
        name: `timm:NAME`, with the tag after a dot or not, or `torchvision:NAME`.
        weights: A tag of the library, which is fetched once; a file; or `random`.
        classes: Names in the order of the logits, or a file with one a line; None for those of
            the published weights, which models with as many classes are taken to share.
        image_size: Side in pixels, or (height, width), where it is not the model's own.

    Raises:
        ValueError: Unknown name or tag, weights that do not fit, another number of names than of
            classes, or a size that is not a multiple of the patch.
        UnsupportedTowerError: The model has no class token, or a part that is not reproduced.
        FileNotFoundError: No such file.
    """
    names = _read_classes(classes) if isinstance(classes, str | Path) else classes
    library, _, model_name = name.partition(":")
    if library not in LIBRARIES:
        raise ValueError(
            f"classifier is {name!r}, expected timm:NAME or torchvision:NAME, such as "
            "timm:vit_base_patch16_224 or torchvision:vit_b_16"
        )
    tag = None
    if library == "timm":
        model_name, _, tag = model_name.partition(".")
    chosen = (tag or None) if weights is None else str(weights)
    asked = None if names is None else len(names)
    model, preprocessing, own_size, own_names = LIBRARIES[library](model_name, chosen, asked)
    count = int(model.num_classes)
    if count < 1:
        raise ValueError(f"{name} has no head of classes; give classes=, or choose another tag")
    if names is not None and len(names) != count:
        raise ValueError(f"{len(names)} class names, but {name} has {count} classes; give as many")
    try:
        classifier = Classifier(model).eval()
    except UnsupportedTowerError as error:
        raise UnsupportedTowerError(
            f"{name} cannot be explained: {error}. Choose a classifier with a class token, such as "
            "timm:vit_base_patch16_224, timm:deit3_base_patch16_224 or torchvision:vit_b_16"
        ) from error
    return LoadedClassifier(
        classifier=classifier,
        preprocessing=preprocessing,
        image_size=checked_size(image_size, own_size, classifier.image.patch, name),
        name=name,
        classes=own_names if names is None else tuple(names),
        count=count,
        weights=str(chosen),
    )


Found: TypeAlias = tuple[Foreign, Preprocessing, int | Sequence[int], tuple[str, ...] | None]
"""A library's module, how its pixels are made, their size, and the names of its classes."""


def _from_timm(name: str, weights: str | None, count: int | None) -> Found:
    _check_name(name, timm.list_models())

    def build(tensors: Mapping[str, Tensor]) -> Foreign:
        head = tensors.get("head.weight")
        classes = count if head is None else len(head)
        how: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        return timm.create_model(name, **how)

    model = _with_weights(
        name,
        weights,
        [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")],
        build,
        lambda: timm.create_model(f"{name}.{weights}", pretrained=True),
    )
    how = model.pretrained_cfg
    subset = infer_imagenet_subset({"num_classes": model.num_classes})
    return (
        model,
        # The margin that both libraries crop away is kept: nothing of a picture goes unexplained.
        Preprocessing(
            *(how["mean"], how["std"], _interpolation(how["interpolation"])),
            resize="squash" if how.get("crop_mode") == "squash" else "shortest",
        ),
        model.patch_embed.img_size if hasattr(model, "patch_embed") else how["input_size"][1:],
        None if subset is None else tuple(ImageNetInfo(subset).label_descriptions()),
    )


def _from_torchvision(name: str, weights: str | None, count: int | None) -> Found:
    models = torchvision.models
    ours = [
        one
        for one in models.list_models()
        if models.get_model_builder(one).__module__ == vision_transformer.__name__
    ]
    _check_name(name, ours)
    published = models.get_model_weights(name)

    def build(tensors: Mapping[str, Tensor]) -> Foreign:
        """A file's grid and number of classes are its own."""
        how: dict[str, int] = {} if count is None else {"num_classes": count}
        if (head := tensors.get("heads.head.weight")) is not None:
            how["num_classes"] = len(head)
        table, patches = tensors.get("encoder.pos_embedding"), tensors.get("conv_proj.weight")
        if table is not None and patches is not None and table.ndim == 3:
            how["image_size"] = math.isqrt(table.shape[1] - 1) * patches.shape[-1]
        return models.get_model(name, weights=None, **how)

    def fetch() -> Foreign:
        tensors = published[weights].get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
        model = build(tensors)
        model.load_state_dict(tensors)
        return model

    tags = [one.name for one in published]
    model = _with_weights(name, weights, tags, build, fetch)
    first = next(iter(published))
    how = (published[weights] if weights in tags else first).transforms()
    names = tuple(first.meta["categories"])
    return (
        model,
        Preprocessing(tuple(how.mean), tuple(how.std), _interpolation(how.interpolation.value)),
        int(model.image_size),
        names if len(names) == model.num_classes else None,
    )


LIBRARIES: dict[str, Callable[[str, str | None, int | None], Found]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
}


def _with_weights(
    name: str,
    weights: str | None,
    tags: Sequence[str],
    build: Callable[[Mapping[str, Tensor]], Foreign],
    fetch: Callable[[], Foreign],
) -> Foreign:
    """The library's module with published weights, those of a file, or random ones."""
    if weights == RANDOM:
        return build({})
    if weights in tags:
        try:
            return fetch()
        except Exception as error:  # whatever the network says, the remedy is the same
            raise ValueError(
                f"weights {weights!r} of {name} cannot be fetched ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}). Download them where there is a network and give "
                "the file as weights="
            ) from error
    if weights is None or (not Path(weights).exists() and not Path(weights).suffix):
        wrong = f"no weights tag {weights!r}" if weights else "no weights given"
        more = f", ... {len(tags)} in all" if len(tags) > TAGS_SHOWN else ""
        known = (", ".join(tags[:TAGS_SHOWN]) or "none is published") + more
        raise ValueError(f"{name}: {wrong}; choose a tag ({known}), a file, or `random`")
    tensors = read_tensors(weights)
    model = build(tensors)
    load_exactly(model, tensors, weights)
    return model


def _check_name(name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
        raise ValueError(f"unknown classifier {name!r}; did you mean {', '.join(close)}?")


def _interpolation(name: str) -> Literal["bicubic", "bilinear"]:
    return "bilinear" if name == "bilinear" else "bicubic"


def _read_classes(path: str | Path) -> tuple[str, ...]:
    """Names from a text file, one a line, in the order of the logits."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {file} with class names; give one with a name per line")
    names = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    if not names:
        raise ValueError(f"{file} holds no class name; write one per line, in the order of logits")
    return names


def _class_number(wanted: str | int, index: Mapping[str, set[int]], count: int) -> int:
    if isinstance(wanted, str):
        found = index.get(wanted.strip().lower(), set())
        if len(found) == 1:
            return next(iter(found))
        if found:
            numbers = ", ".join(map(str, sorted(found)))
            raise ValueError(f"{wanted!r} names several classes; give a number: {numbers}")
        if not wanted.strip().isdecimal():
            if not index:
                raise ValueError(
                    f"the names of the {count} classes are unknown, so there is no {wanted!r}; "
                    "give a number, or the names as classes="
                )
            close = difflib.get_close_matches(wanted.lower(), index, n=CLASSES_SHOWN, cutoff=0.5)
            close += [name for name in index if wanted.lower() in name and name not in close]
            hint = "give a name of its classes"
            if close:
                hint = f"did you mean {', '.join(close[:CLASSES_SHOWN])}? Give a name"
            raise ValueError(
                f"no class {wanted!r} among {count}; {hint} or a number from 0 to {count - 1}"
            )
    if not 0 <= int(wanted) < count:
        raise ValueError(f"class {int(wanted)} of {count}; choose 0 to {count - 1}")
    return int(wanted)


def _torchvision_tower(model: Foreign) -> Tower:
    """The tower around a VisionTransformer of torchvision."""
    layers = tuple(_torchvision_layer(block) for block in model.encoder.layers)
    patch = int(model.patch_size)

    def head(rows: Tensor) -> Tensor:
        logits: Tensor = model.heads(model.encoder.ln(rows))
        return logits

    def open_pass(x: Float[Tensor, "B 3 H W"]) -> Pass:
        grid, side = image_grid(x, patch), model.image_size // patch
        token, table = model.class_token, model.encoder.pos_embedding[0]
        tokens = embed_patches(x, model.conv_proj, token, table, (side, side), grid)
        return image_pass(model.encoder.dropout(tokens), layers, head, grid)

    return Tower(
        open_pass,
        width=int(model.hidden_dim),
        heads=layers[-1].heads,
        depth=len(layers),
        pooling="class token",
        patch=patch,
    )


def _torchvision_layer(block: Foreign) -> Layer:
    """A pre-norm block around torch's MultiheadAttention."""
    attention = block.self_attention

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        return project_fused(block.ln_1(tokens), pick, weight, bias)

    return residual_layer(
        attend,
        add=lambda o: block.dropout(attention.out_proj(o)),
        mix=lambda x: block.mlp(block.ln_2(x)),
        project=attention.out_proj,
        heads=int(attention.num_heads),
        run=lambda tokens, mask: block(tokens),
    )
