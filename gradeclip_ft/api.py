"""The public interface in Python: a model, its heat maps on photos, its features, its numbers.

Every name here is also one of `gradeclip_ft` itself; docs/api.md shows them in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from gradeclip_ft.commands.build import build_evaluator, build_explainers, build_run
from gradeclip_ft.commands.cli import progress_bar
from gradeclip_ft.commands.runs import names_run
from gradeclip_ft.data.regions import letterbox_boxes, letterbox_image
from gradeclip_ft.evaluators.base import Evaluator, evaluating, prepare
from gradeclip_ft.evaluators.regions import square_side
from gradeclip_ft.explain.base import Explainer
from gradeclip_ft.explain.driver import (
    BATCH,
    Explained,
    Picture,
    Supported,
    explain_pictures,
    see,
    targets_of,
    to_display_image,
    warn_of_unread,
)
from gradeclip_ft.explain.page import case_of, explanation_page, in_words
from gradeclip_ft.images import read_image
from gradeclip_ft.models.clip import ImageTransform, LoadedClip
from gradeclip_ft.models.load import from_open_clip, load_clip
from gradeclip_ft.models.other.classifier import LoadedImageModel
from gradeclip_ft.ops.attention import DensePath
from gradeclip_ft.ops.heatmap import pool_boxes
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.report.figures import draw_maps
from gradeclip_ft.report.page import write_page
from gradeclip_ft.results.record import Measured

__all__ = ["dense", "evaluate", "explain", "from_open_clip", "load", "region_embeddings"]

Pictures: TypeAlias = Picture | Iterable[Picture]
"""One picture or several; each a file, a PIL image, or normalised pixels (3, H, W)."""


def load(
    name: str | Path, weights: str | Path | None = None, *, device: str | torch.device | None = None
) -> LoadedClip:
    """A model by name, from a folder, or from a run.

    Args:
        name: A run (its name in runs/, or its folder); a folder in open_clip's layout, such as an
            export; a model name of open_clip; `hf-hub:OWNER/NAME`; or `shapes_tiny`, the small CLIP
            that comes with the package.
        weights: Of a model name: a tag of open_clip, a file, or `random`.
        device: Where to; by default the first GPU, else the CPU.

    Raises:
        ValueError: Unknown name or tag, or weights that do not fit.
        FileNotFoundError: No such file or folder, or a run that has saved no weights yet.
    """
    loaded = (
        build_run(name) if weights is None and names_run(name) else load_clip(str(name), weights)
    )
    loaded.clip.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return loaded


@dataclass(frozen=True, repr=False)
class Explanation:
    """Maps of one picture.

    Attributes:
        picture: As it was handed in.
        texts: What the maps are for, one each.
        found: What the model makes of it.
        model: The model.
        methods: By name.
        geometry: What became of the picture before the model saw it, in words.
    """

    picture: Picture
    texts: tuple[str, ...]
    found: Explained
    model: LoadedImageModel
    methods: Mapping[str, Explainer]
    geometry: str

    @property
    def heat(self) -> Mapping[str, Float[Tensor, "P h w"]]:
        """Maps by method, on the grid of the patches, one per text."""
        return self.found.heat

    @property
    def score(self) -> Float[Tensor, " P"]:
        """Cosine of the picture and each text; of a classifier the logits."""
        return self.found.score

    @property
    def photo(self) -> Image.Image:
        """The picture as a viewer shows it: upright RGB."""
        if isinstance(self.picture, Tensor):
            return Image.fromarray(to_display_image(self.picture.cpu(), self.model).numpy())
        return read_image(self.picture)

    def on_photo(self, method: str | None = None) -> Float[Tensor, "P H W"]:
        """Maps at the size of the photo, bilinear; NaN where the model saw nothing of it.

        The resize, crop and padding of the model are undone.

        Args:
            method: Whose maps; by default those of the first.
        """
        heat = self.heat[method or next(iter(self.heat))]
        return self.found.seen.placement.on_photo(heat)

    def plot(self) -> np.ndarray:
        """Every map over the photo, as a figure of pyplot.

        Returns:
            The axes, a row per method and a column per text.
        """
        titles = [f"{text}  {s:.2f}" for text, s in zip(self.texts, self.score, strict=True)]
        heat = {method: self.on_photo(method).numpy() for method in self.heat}
        return draw_maps(np.asarray(self.photo), heat, titles)

    def save(self, page: str | Path) -> Path:
        """Write the page of this picture, one HTML file; see `Explanations.save`."""
        return Explanations([self]).save(page)


class Explanations(list[Explanation]):
    """Maps of several pictures, in their order."""

    def save(self, page: str | Path) -> Path:
        """Write the page that the command `explain` writes: one HTML file without references."""
        cases = [
            case_of(one.model, one.found, one.texts, source=_called(one.picture, number))
            for number, one in enumerate(self, start=1)
        ]
        first = self[0]
        settings = {"geometry": first.geometry}
        return write_page(explanation_page(first.model, cases, settings, first.methods), Path(page))


def explain(
    model: LoadedImageModel,
    images: Pictures,
    texts: str | Sequence[str],
    methods: str | Sequence[str | Explainer] | Mapping[str, Explainer] = ("grad_eclip",),
    *,
    geometry: str = "model",
    shortest: int = 640,
) -> Explanations:
    """Heat maps of texts in pictures, by one or several methods.

    Args:
        model: From `load` or `from_open_clip`; or a classifier, whose texts are class names.
        images: One picture or several: files, PIL images, or normalised pixels (3, H, W).
        texts: One or several, looked for in every picture, encoded as they are.
        methods: Names of `list explainers`, or methods themselves, which a mapping names.
        geometry: The model's own resize, crop and padding; or `aspect`, the whole picture in
            multiples of the patch.
        shortest: Pixels of the shorter side under `aspect`, at most.

    Returns:
        One per picture, in order, also where there is only one.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No text, no picture, an unreadable one, or a method that the model cannot do.
        ConfigurationError: A method is unknown.
    """
    pictures, words = _listed(images), (texts,) if isinstance(texts, str) else tuple(texts)
    if not words or not pictures:
        what = "images" if words else "texts"
        raise ValueError(f"{what} are empty; give at least one picture and one text")
    if isinstance(model, LoadedClip):
        warn_of_unread(model, words)
    explainers, target = _methods(methods), targets_of(model, words)
    supported = Supported(explainers, model, skip=False)
    found: list[Explained] = []
    for start in range(0, len(pictures), BATCH):
        seen = [see(model, one, geometry, shortest) for one in pictures[start : start + BATCH]]
        found += explain_pictures(model, seen, [target] * len(seen), supported)
    told = in_words(model, geometry, shortest)
    return Explanations(
        Explanation(picture, words, one, model, explainers, told)
        for picture, one in zip(pictures, found, strict=True)
    )


def dense(
    model: LoadedClip, images: Pictures, *, path: DensePath = "value"
) -> Float[Tensor, "B h w D"]:
    """Unit features of the patches, in the space of the texts, on the CPU.

    Their product with `model.encode_texts(...)` is the cosine of every patch and text. They cover
    what the model sees of a picture: with most models the centre of it.

    Args:
        model: From `load` or `from_open_clip`.
        images: One picture or several; tensors of one size.
        path: How the last layer makes them: `value`, or `sclip`, `clearclip`, `naclip`, `vv`.

    Raises:
        UnsupportedTowerError: The image tower has no such features, or the value path alone.
    """
    pictures = _listed(images)
    with evaluating(model.clip):
        parts = [
            torch.stack([see(model, one).pixels for one in pictures[start : start + BATCH]])
            for start in range(0, len(pictures), BATCH)
        ]
        tower, device = model.clip.image, model.clip.device
        return torch.cat([unit(tower.trace(part.to(device)).dense(path)).cpu() for part in parts])


def region_embeddings(
    model: LoadedClip, image: Image.Image | str | Path, boxes: Any
) -> Float[Tensor, "R D"]:
    """Unit embeddings of regions, in the space of the texts, on the CPU.

    As in the box accuracy of `evaluate` (CLIPSelf's protocol): the whole photo is resized into the
    model's square and padded, and RoIAlign pools its dense features.

    Args:
        model: From `load` or `from_open_clip`.
        image: A file or a PIL image.
        boxes: (R, 4), each (left, top, right, bottom) in pixels of the upright photo.

    Raises:
        ValueError: Boxes of another shape, without an area, or not inside the photo.
        UnsupportedTowerError: The image tower has no dense features.
    """
    photo, corners = read_image(image), torch.as_tensor(boxes, dtype=torch.float32)
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise ValueError(
            f"boxes have the shape {tuple(corners.shape)}, expected (R, 4), each left, top, right, "
            "bottom"
        )
    limit = corners.new_tensor([photo.width, photo.height])
    low, high = corners[:, :2], corners[:, 2:]
    bad = ((low < 0) | (high > limit) | (high <= low)).any(1)
    if bad.any():
        raise ValueError(
            f"box {corners[bad][0].tolist()} is not inside the photo of {photo.width} x "
            f"{photo.height} pixels, or has no area; expected left < right and top < bottom"
        )
    side = square_side(model, None, "region_embeddings")
    pixels = ImageTransform((side, side), model.preprocessing)(letterbox_image(photo, side))
    shares = letterbox_boxes(
        torch.cat([low, high - low], 1), height=photo.height, width=photo.width
    )
    owner = torch.zeros(len(shares), dtype=torch.long)
    return pool_boxes(dense(model, pixels), shares, owner)


def evaluate(model: LoadedClip, evaluator: str | Evaluator, *settings: str) -> Measured:
    """The numbers of an evaluator.

    Args:
        model: From `load` or `from_open_clip`.
        evaluator: A name of `list evaluators`, or an evaluator itself.
        settings: Of a named one, as on the command line: `data.annotations=captions.json`.

    Returns:
        `metrics` as fractions by name, beside `protocol`, `data` and `details`.

    Raises:
        ConfigurationError: The evaluator or a setting is unknown.
        FileNotFoundError: Its data are not there.
    """
    chosen = build_evaluator(evaluator, settings) if isinstance(evaluator, str) else evaluator
    prepare(chosen)
    with evaluating(model.clip):
        return chosen(model, track=progress_bar)


def _listed(images: Pictures) -> list[Picture]:
    if isinstance(images, Image.Image | str | Path) or (
        isinstance(images, Tensor) and images.ndim < 4
    ):
        return [images]
    return list(images)


def _methods(
    methods: str | Sequence[str | Explainer] | Mapping[str, Explainer],
) -> dict[str, Explainer]:
    if isinstance(methods, Mapping):
        return dict(methods)
    asked = [methods] if isinstance(methods, str) else list(methods)
    built = build_explainers([one for one in asked if isinstance(one, str)])
    pairs = [
        (one, built[one]) if isinstance(one, str) else (type(one).__name__, one) for one in asked
    ]
    if not pairs or len(dict(pairs)) < len(pairs):
        raise ValueError(
            f"methods are {[name for name, _ in pairs]}, expected one or several with different "
            "names; a mapping names them: {'one': GradEclip(), 'all': GradEclip(heads='all')}"
        )
    return dict(pairs)


def _called(picture: Picture, number: int) -> str:
    """Name of a picture on the page."""
    file = picture if isinstance(picture, str | Path) else getattr(picture, "filename", "")
    return Path(file).name or f"picture {number}"
