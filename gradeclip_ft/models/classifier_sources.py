"""Where classifiers come from: timm and torchvision, with what each knows of its models."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torchvision
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import Tensor
from torchvision.models import vision_transformer

from gradeclip_ft.models.tower import Foreign
from gradeclip_ft.models.transform import Preprocessing

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
