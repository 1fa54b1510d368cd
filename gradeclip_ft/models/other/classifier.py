"""Image classifiers of timm and torchvision, explained by the logit of a class."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
import torchvision
from jaxtyping import Float
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torchvision.models import vision_transformer
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionVisionTransformer

from gradeclip_ft.models.architecture import checked_size
from gradeclip_ft.models.clip import ImageModel, LoadedImageModel, Preprocessing
from gradeclip_ft.models.tower import (
    ImageTower,
    PassTower,
    image_grid,
    project_fused,
    resample_positions,
)
from gradeclip_ft.models.towers.select import trunk_tower
from gradeclip_ft.models.trace import (
    Foreign,
    Layer,
    Pass,
    Pick,
    UnsupportedTowerError,
    class_token_query,
)
from gradeclip_ft.models.weights import load_exactly, read_tensors
from gradeclip_ft.ops.similarity import product


def classifier_tower(model: Foreign) -> ImageTower:
    """The adapter of a classifier of timm or torchvision.

    Raises:
        UnsupportedTowerError: None is exact.
    """
    if isinstance(model, TorchvisionVisionTransformer):
        return LogitTower(TorchvisionVitTower(model))
    return LogitTower(trunk_tower(SimpleNamespace(trunk=model, head=nn.Identity())))


SHOWN = 6


@dataclass(frozen=True)
class Source(ABC):
    """One model of a library.

    Attributes:
        name: In the library.
        tag: Of its weights, where the user wrote it with the name.
    """

    name: str
    tag: str | None = None

    @abstractmethod
    def tags(self) -> Sequence[str]:
        """Published weights."""

    @abstractmethod
    def fetch(self, tag: str) -> Foreign:
        """The module with published weights, from the cache or the network."""

    @abstractmethod
    def build(self, count: int | None, tensors: Mapping[str, Tensor] | None) -> Foreign:
        """The module with random weights, with so many classes, or of the shapes of a file."""

    @abstractmethod
    def preprocessing(self, model: Foreign, weights: str) -> Preprocessing:
        """Pixel statistics and resizing."""

    @abstractmethod
    def image_size(self, model: Foreign, weights: str) -> int | Sequence[int]:
        """Size that the weights are for."""

    @abstractmethod
    def classes(self, count: int) -> tuple[str, ...] | None:
        """Names of so many classes; None where they are unknown."""

    def known_tags(self) -> str:
        """Published weights, for a message."""
        known = list(self.tags())
        more = f", ... {len(known)} in all" if len(known) > SHOWN else ""
        return (", ".join(known[:SHOWN]) or "none is published") + more


class TimmSource(Source):
    """A model of timm."""

    def tags(self) -> Sequence[str]:
        """Published weights."""
        return [full.partition(".")[2] for full in timm.list_pretrained(f"{self.name}.*")]

    def fetch(self, tag: str) -> Foreign:
        """The module with published weights, by timm's own loader."""
        return timm.create_model(f"{self.name}.{tag}", pretrained=True)

    def build(self, count: int | None, tensors: Mapping[str, Tensor] | None) -> Foreign:
        """The module with random weights."""
        head = (tensors or {}).get("head.weight")
        classes = count if head is None else len(head)
        how: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        return timm.create_model(self.name, **how)

    def preprocessing(self, model: Foreign, weights: str) -> Preprocessing:
        """Of its configuration; the margin that timm crops away is kept."""
        how: Mapping[str, Any] = model.pretrained_cfg
        squash = how.get("crop_mode") == "squash"
        return _preprocessing(how["mean"], how["std"], how["interpolation"], squash=squash)

    def image_size(self, model: Foreign, weights: str) -> int | Sequence[int]:
        """Of its patch embedding."""
        size: Sequence[int] = model.patch_embed.img_size
        return size

    def classes(self, count: int) -> tuple[str, ...] | None:
        """Of the ImageNet with so many classes."""
        subset = infer_imagenet_subset({"num_classes": count})
        return None if subset is None else tuple(ImageNetInfo(subset).label_descriptions())


class TorchvisionSource(Source):
    """A VisionTransformer of torchvision."""

    def tags(self) -> Sequence[str]:
        """Published weights."""
        return [one.name for one in self._published()]

    def fetch(self, tag: str) -> Foreign:
        """The module with published weights, read as tensors alone."""
        tensors = self._published()[tag].get_state_dict(
            progress=False, check_hash=True, weights_only=True
        )
        model = self.build(None, tensors)
        model.load_state_dict(tensors)
        return model

    def build(self, count: int | None, tensors: Mapping[str, Tensor] | None) -> Foreign:
        """The module with random weights; a file's grid and number of classes are its own."""
        how: dict[str, int] = {} if count is None else {"num_classes": count}
        state = tensors or {}
        if (head := state.get("heads.head.weight")) is not None:
            how["num_classes"] = len(head)
        table, patches = state.get("encoder.pos_embedding"), state.get("conv_proj.weight")
        if table is not None and patches is not None and table.ndim == 3:
            how["image_size"] = math.isqrt(table.shape[1] - 1) * patches.shape[-1]
        return torchvision.models.get_model(self.name, weights=None, **how)

    def preprocessing(self, model: Foreign, weights: str) -> Preprocessing:
        """Of the published weights; the margin that torchvision crops away is kept."""
        published = self._published()
        how = (published[weights] if weights in self.tags() else next(iter(published))).transforms()
        return _preprocessing(how.mean, how.std, how.interpolation.value)

    def image_size(self, model: Foreign, weights: str) -> int | Sequence[int]:
        """Of its table of positions."""
        return int(model.image_size)

    def classes(self, count: int) -> tuple[str, ...] | None:
        """ImageNet's, of the published weights."""
        names: Sequence[str] = next(iter(self._published())).meta["categories"]
        return tuple(names) if len(names) == count else None

    def _published(self) -> Any:
        return torchvision.models.get_model_weights(self.name)


def find_source(name: str) -> Source:
    """The model behind `timm:NAME`, `timm:NAME.TAG` or `torchvision:NAME`.

    Raises:
        ValueError: Neither library, or it has no such model.
    """
    library, _, model = name.partition(":")
    if library == "timm":
        model, _, tag = model.partition(".")
        _check(model, timm.list_models(), name)
        return TimmSource(model, tag or None)
    if library == "torchvision":
        _check(model, _vision_transformers(), name)
        return TorchvisionSource(model)
    raise ValueError(
        f"classifier is {name!r}, expected timm:NAME or torchvision:NAME, such as "
        "timm:vit_base_patch16_224 or torchvision:vit_b_16"
    )


def _vision_transformers() -> list[str]:
    models = torchvision.models
    return [
        name
        for name in models.list_models()
        if models.get_model_builder(name).__module__ == vision_transformer.__name__
    ]


def _check(model: str, known: Sequence[str], name: str) -> None:
    if model not in known:
        close = difflib.get_close_matches(model, known, n=3, cutoff=0.4)
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(close or known[:3])}?")


def _preprocessing(
    mean: Sequence[float], std: Sequence[float], interpolation: str, *, squash: bool = False
) -> Preprocessing:
    """Three numbers each, and the nearest of the resizes that this package has."""
    return Preprocessing(
        (mean[0], mean[1], mean[2]),
        (std[0], std[1], std[2]),
        "bilinear" if interpolation == "bilinear" else "bicubic",
        "squash" if squash else "shortest",
    )


CLASSES_SHOWN = 3


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Names from a text file, one a line, in the order of the logits.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It holds none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {file} with class names; give one with a name a line")
    names = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    if not names:
        raise ValueError(f"{file} holds no class name; write one a line, in the order of logits")
    return names


def one_hot(
    wanted: Sequence[str | int], classes: Sequence[str] | None, count: int
) -> Float[Tensor, "P K"]:
    """Unit vectors of classes, whose product with the logits is the logit of the class.

    Args:
        wanted: Names or numbers. A name may be one of several synonyms that commas part, in any
            case; a number may be written as text where no class has that name.
        classes: Names in the order of the logits; None where they are unknown.
        count: K.

    Raises:
        ValueError: No such class, or a name that several have.
    """
    index = _index(classes or ())
    rows = [_number(one, index, count) for one in wanted]
    return torch.nn.functional.one_hot(torch.tensor(rows, dtype=torch.long), count).float()


def _index(classes: Sequence[str]) -> dict[str, list[int]]:
    """Classes by name, and by each of their synonyms."""
    index: dict[str, list[int]] = {}
    for number, name in enumerate(classes):
        for one in dict.fromkeys([name, *name.split(",")]):
            index.setdefault(one.strip().lower(), []).append(number)
    return {name: sorted(set(numbers)) for name, numbers in index.items()}


def _number(wanted: str | int, index: dict[str, list[int]], count: int) -> int:
    if isinstance(wanted, str):
        found = index.get(wanted.strip().lower(), [])
        if len(found) == 1:
            return found[0]
        if found:
            numbers = ", ".join(map(str, found))
            raise ValueError(f"{wanted!r} names several classes; give a number: {numbers}")
        if not wanted.strip().isdecimal():
            raise ValueError(_unknown(wanted, index, count))
    number = int(wanted)
    if not 0 <= number < count:
        raise ValueError(f"class {number} of {count}; choose 0 to {count - 1}")
    return number


def _unknown(wanted: str, index: dict[str, list[int]], count: int) -> str:
    if not index:
        return (
            f"the names of the {count} classes are unknown, so {wanted!r} is none; give a number, "
            "or the names as classes="
        )
    close = difflib.get_close_matches(wanted.lower(), index, n=CLASSES_SHOWN, cutoff=0.5)
    close += [name for name in index if wanted.lower() in name and name not in close][
        :CLASSES_SHOWN
    ]
    hint = (
        f"did you mean {', '.join(close[:CLASSES_SHOWN])}?"
        if close
        else "give a name of its classes,"
    )
    return f"no class {wanted!r} among {count}; {hint} or a number from 0 to {count - 1}"


RANDOM = "random"


class Classifier(ImageModel):
    """A classifier; its image tower's embedding is the logits, its score one of them."""

    def __init__(self, model: Foreign) -> None:
        super().__init__(model, classifier_tower(model))


@dataclass(frozen=True)
class LoadedClassifier(LoadedImageModel):
    """A classifier with its preprocessing and class names.

    Attributes:
        clip: The model, under the name that explanations call it by.
        preprocessing: Pixel statistics and resizing of the model.
        image_size: (height, width) in pixels.
        name: As it was asked for.
        classes: Names in the order of the logits; None where they are unknown.
        count: Number of classes.
        weights: Where its weights came from: a tag, a file, `random`.
    """

    clip: Classifier
    preprocessing: Preprocessing
    image_size: tuple[int, int]
    name: str
    classes: tuple[str, ...] | None
    count: int
    weights: str

    def targets(self, names: Sequence[str | int]) -> Float[Tensor, "P K"]:
        """Unit vectors of classes by name or number: targets of an explanation.

        Raises:
            ValueError: No such class, or a name that several have; close ones are named.
        """
        return one_hot(names, self.classes, self.count)


def load_classifier(
    name: str,
    weights: str | Path | None = None,
    *,
    classes: str | Path | Sequence[str] | None = None,
    image_size: int | Sequence[int] | None = None,
) -> LoadedClassifier:
    """A classifier with a class token, ready to be explained.

    Args:
        name: `timm:NAME`, with the tag behind a dot or not, or `torchvision:NAME`.
        weights: A tag of the library, which is fetched once; a file; or `random`.
        classes: Names in the order of the logits, or a file with one a line; None for those of
            the published weights, which models with as many classes are taken to share.
        image_size: Side in pixels, or (height, width), where it is not the model's own.

    Raises:
        ValueError: Unknown name or tag, weights that do not fit, another number of names than of
            classes, or a size that is no multiple of the patch.
        UnsupportedTowerError: The model has no class token, or a part that is not reproduced.
        FileNotFoundError: No such file.
    """
    source = find_source(name)
    chosen = source.tag if weights is None else str(weights)
    if chosen is None:
        raise ValueError(
            f"no weights given for {name}; choose a tag ({source.known_tags()}), a file, or "
            "`random`"
        )
    names = read_classes(classes) if isinstance(classes, str | Path) else classes
    model = _build(source, chosen, None if names is None else len(names))
    count = int(model.num_classes)
    if count < 1:
        raise ValueError(f"{name} has no head of classes; give classes=, or choose another tag")
    if names is not None and len(names) != count:
        raise ValueError(f"{len(names)} class names, but {name} has {count} classes; give as many")
    clip = _classifier(model, name).eval()
    size = checked_size(image_size, source.image_size(model, chosen), clip.image.patch, name)
    return LoadedClassifier(
        clip=clip,
        preprocessing=source.preprocessing(model, chosen),
        image_size=size,
        name=name,
        classes=source.classes(count) if names is None else tuple(names),
        count=count,
        weights=chosen,
    )


def _build(source: Source, weights: str, count: int | None) -> Foreign:
    """The library's module with its weights."""
    if weights in source.tags():
        try:
            return source.fetch(weights)
        except Exception as error:  # whatever the network says, the remedy is the same
            raise ValueError(
                f"weights {weights!r} of {source.name} cannot be fetched ({type(error).__name__}: "
                f"{str(error).splitlines()[0]}). Download them where there is a network and give "
                "the file as weights="
            ) from error
    if weights == RANDOM:
        return source.build(count, None)
    if not Path(weights).exists() and not Path(weights).suffix:
        raise ValueError(
            f"{source.name} has no weights tag {weights!r}; choose a tag ({source.known_tags()}), "
            "a file, or `random`"
        )
    tensors = read_tensors(weights)
    model = source.build(None, tensors)
    load_exactly(model, tensors, weights)
    return model


def _classifier(model: Foreign, name: str) -> Classifier:
    try:
        return Classifier(model)
    except UnsupportedTowerError as error:
        raise UnsupportedTowerError(
            f"{name} cannot be explained: {error}. Choose a classifier with a class token, such as "
            "timm:vit_base_patch16_224, timm:deit3_base_patch16_224 or torchvision:vit_b_16"
        ) from error


def imagenet_names() -> list[str]:
    """Class names in the order of the sorted WordNet ids, which name the folders of the images."""
    return list(IMAGENET_CLASSNAMES)


def imagenet_templates() -> tuple[str, ...]:
    """The 80 templates with `{}` for the class name."""
    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


class TorchvisionVitTower(PassTower):
    """Image tower around a VisionTransformer of torchvision; its embedding is the class logits."""

    pooling = "class token"

    def __init__(self, model: Foreign) -> None:
        self._model = model
        self._layers = tuple(_layer(block) for block in model.encoder.layers)
        self.width = int(model.hidden_dim)
        self.heads = self._layers[-1].heads
        self.depth = len(self._layers)
        self.patch = int(model.patch_size)

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """This forward pass, at any grid; the query is the class token."""
        grid, model = image_grid(x, self.patch), self._model
        patches = model.conv_proj(x).flatten(2).transpose(1, 2)
        side = model.image_size // self.patch
        positions = resample_positions(model.encoder.pos_embedding[0], (side, side), grid)
        first = model.class_token.expand(len(x), -1, -1)
        tokens = model.encoder.dropout(torch.cat([first, patches], dim=1) + positions)
        query, explained = class_token_query(tokens, grid)
        return Pass(tokens, self._layers, self._head, query, explained, grid)

    def _head(self, rows: Tensor) -> Tensor:
        logits: Tensor = self._model.heads(self._model.encoder.ln(rows))
        return logits


def _layer(block: Foreign) -> Layer:
    """A pre-norm block around torch's MultiheadAttention."""
    attention = block.self_attention

    def attend(tokens: Tensor, pick: Pick) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        return project_fused(block.ln_1(tokens), pick, weight, bias)

    def add(o: Tensor) -> Tensor:
        added: Tensor = block.dropout(attention.out_proj(o))
        return added

    def finish(x: Tensor, o: Tensor) -> Tensor:
        x = x + add(o)
        rows: Tensor = x + block.mlp(block.ln_2(x))
        return rows

    def run(tokens: Tensor, mask: Tensor | None) -> Tensor:
        rows: Tensor = block(tokens)
        return rows

    return Layer(attend, finish, add, attention.out_proj, int(attention.num_heads), run)


class LogitTower(PassTower):
    """Another tower, explained by embedding · target: by the unit vector of a class, its logit."""

    score = staticmethod(product)

    def __init__(self, tower: ImageTower) -> None:
        self._tower = tower
        self.width, self.heads, self.depth = tower.width, tower.heads, tower.depth
        self.patch, self.pooling = tower.patch, tower.pooling

    def open(self, x: Float[Tensor, "B 3 H W"]) -> Pass:
        """The other tower's forward pass."""
        return replace(self._tower.open(x), score=product)
