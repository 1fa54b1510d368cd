"""Image classifiers of timm and torchvision, explained by the logit of a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from gradeclip_ft.models.checkpoint import load_exactly
from gradeclip_ft.models.class_names import one_hot, read_classes
from gradeclip_ft.models.classifier_sources import Source, find_source
from gradeclip_ft.models.image_model import ImageModel, LoadedImageModel
from gradeclip_ft.models.sizes import checked_size
from gradeclip_ft.models.tensor_files import read_tensors
from gradeclip_ft.models.tower import Foreign, UnsupportedTowerError
from gradeclip_ft.models.towers.select import classifier_tower
from gradeclip_ft.models.transform import Preprocessing

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
