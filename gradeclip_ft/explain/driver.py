"""Pictures and phrases to maps, by several methods on the same pixels and the same text vectors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from gradeclip_ft.explain.base import Able, Explainer, explain_image, explain_text
from gradeclip_ft.images import open_picture
from gradeclip_ft.models.clip import ImageTransform, LoadedClip, LoadedImageModel
from gradeclip_ft.models.trace import UnsupportedTowerError
from gradeclip_ft.ops.heatmap import to_pixels

Geometry: TypeAlias = Literal["model", "aspect"]
Picture: TypeAlias = Image.Image | str | Path | Tensor
"""A picture, its file, or its normalised pixels (3, H, W), which are taken as they are."""

ROWS = 64  # maps per call at most: several layers of each are kept at a time


@dataclass(frozen=True)
class Explained:
    """What a model makes of one picture.

    Attributes:
        pixels: The normalised pixels that every method saw.
        heat: Maps by method, on the grid of the patches.
        score: Cosine of picture and phrase; of a classifier the class logit.
        embedding: Of the picture, not normalised.
    """

    pixels: Float[Tensor, "3 H W"]
    heat: Mapping[str, Float[Tensor, "P h w"]]
    score: Float[Tensor, " P"]
    embedding: Float[Tensor, " D"]

    def at_pixels(self, method: str) -> Float[Tensor, "P H W"]:
        """Maps of one method at the size of `pixels`, bilinear."""
        return to_pixels(self.heat[method], (self.pixels.shape[1], self.pixels.shape[2]))


def explain_pictures(
    loaded: LoadedImageModel,
    pictures: Sequence[Picture],
    targets: Sequence[Float[Tensor, "_ D"]],
    methods: Mapping[str, Explainer],
    *,
    geometry: Geometry = "model",
    longest: int = 640,
    rows: int = ROWS,
    skip: bool = False,
) -> list[Explained]:
    """Maps of every phrase by every method, pictures of one size together.

    Args:
        loaded: The model, on its device.
        pictures: Of any size and mode.
        targets: Embeddings of the phrases of each picture.
        methods: By name; those with texts of their own are already `prepared`.
        geometry: See `transform_for`.
        longest: See `transform_for`.
        rows: Phrases per call at most; bounds memory, not the result.
        skip: Leave out, with a word in the log, what this model cannot do.

    Returns:
        One per picture, on the CPU.

    Raises:
        UnsupportedTowerError: The model cannot do a method and `skip` is false, or it can do none.
        ValueError: Counts of pictures and targets differ, or a file is no picture.
    """
    if len(pictures) != len(targets):
        raise ValueError(f"{len(targets)} sets of phrases for {len(pictures)} pictures; give each")
    pixels = [pixels_of(loaded, picture, geometry, longest) for picture in pictures]
    able = Able(methods, skip=skip)
    return [
        explained
        for some in _together(pixels, targets, rows)
        for explained in _explain_together(
            loaded, [pixels[row] for row in some], [targets[row] for row in some], able, rows
        )
    ]


def _explain_together(
    loaded: LoadedImageModel,
    pixels: Sequence[Tensor],
    targets: Sequence[Tensor],
    able: Able,
    rows: int,
) -> list[Explained]:
    """Pictures of one size in one call for each `rows` phrases."""
    device = loaded.clip.device
    stacked, target = torch.stack(list(pixels)).to(device), torch.cat(list(targets)).to(device)
    counts = [len(target) for target in targets]
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
    parts = list(zip(torch.split(target, rows), torch.split(owner, rows), strict=True))

    def draw(method: Explainer) -> tuple[Tensor, ...]:
        maps = [explain_image(method, loaded.clip, stacked, *part) for part in parts]
        return torch.split(torch.cat(maps).cpu(), counts)

    heat = able.each(draw)
    with torch.no_grad():
        embedding = loaded.clip.image.encode(stacked).float()
        score = loaded.clip.image.score(embedding[owner], target.float())
    scores = torch.split(score.cpu(), counts)
    return [
        Explained(picture, {name: maps[row] for name, maps in heat.items()}, scores[row], own.cpu())
        for row, (picture, own) in enumerate(zip(pixels, embedding, strict=True))
    ]


def pixels_of(
    loaded: LoadedImageModel, picture: Picture, geometry: Geometry = "model", longest: int = 640
) -> Float[Tensor, "3 H W"]:
    """Normalised pixels of one picture; see `transform_for`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no picture, or a tensor is not (3, H, W).
    """
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or len(picture) != 3 or not picture.is_floating_point():
            raise ValueError(
                f"a picture is a tensor of shape {tuple(picture.shape)} and type {picture.dtype}, "
                "expected normalised pixels (3, H, W); give a PIL image or a file otherwise"
            )
        return picture
    upright = open_picture(picture)
    return transform_for(loaded, upright, geometry, longest)(upright)


def transform_for(
    loaded: LoadedImageModel, picture: Image.Image, geometry: Geometry, longest: int
) -> ImageTransform:
    """How a picture becomes pixels.

    Args:
        loaded: The model.
        picture: The picture.
        geometry: The model's own resize and crop; or `aspect`, as the Grad-ECLIP authors do: each
            side brought to the nearest multiple of the patch, nothing cropped.
        longest: Pixels of the longer side under `aspect`, at most.

    Raises:
        ValueError: The model takes pictures of one size only, or `longest` is below 1.
    """
    if longest < 1:
        raise ValueError(f"longest is {longest}; give the pixels of the longer side, 1 or more")
    if geometry == "model":
        return loaded.transform()
    patch = loaded.patch
    if not patch:
        raise ValueError("this model takes pictures of one size; choose geometry=model")
    scale = min(1.0, longest / max(picture.size))
    width, height = (max(1, round(side * scale / patch)) * patch for side in picture.size)
    how = loaded.preprocessing
    whole = type(how)(how.mean, how.std, how.interpolation, resize="squash")
    return ImageTransform(size=(height, width), preprocessing=whole)


def prepared(methods: Mapping[str, Explainer], loaded: LoadedImageModel) -> dict[str, Explainer]:
    """Methods that compare with texts of their own, with these encoded by this model if it can."""
    return {
        name: method.prepare(loaded)
        if hasattr(method, "prepare") and isinstance(loaded, LoadedClip)
        else method
        for name, method in methods.items()
    }


def shown(pixels: Float[Tensor, "3 H W"], loaded: LoadedImageModel) -> Tensor:
    """The picture as the model saw it, (H, W, 3) in bytes: maps belong on this one."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (loaded.mean, loaded.std))
    return ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)


def _together(
    pixels: Sequence[Tensor], targets: Sequence[Tensor], rows: int
) -> Iterator[Sequence[int]]:
    """Runs of neighbouring pictures of one size with at most `rows` phrases; at least one each."""
    some: list[int] = []
    count = 0
    for row, (picture, target) in enumerate(zip(pixels, targets, strict=True)):
        if some and (picture.shape != pixels[some[0]].shape or count + len(target) > rows):
            yield some
            some, count = [], 0
        some.append(row)
        count += len(target)
    if some:
        yield some


Merge = Literal["sum", "max", "mean"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sentence:
    """What each word says for a picture.

    Attributes:
        words: Those that the model reads.
        cut: The rest of the text, beyond its context.
        values: Relevance of every word by method; with `sum` they sum to 1, less what stands on a
            word that the context cuts in two, or are all 0.
    """

    words: tuple[str, ...]
    cut: str
    values: Mapping[str, Float[Tensor, " W"]]


def explain_sentences(
    loaded: LoadedClip,
    texts: Sequence[str],
    target: Float[Tensor, "P D"],
    methods: Mapping[str, Explainer],
    *,
    owner: Int[Tensor, " P"] | None = None,
    merge: Merge = "sum",
    skip: bool = False,
) -> list[Sentence]:
    """Relevance of the words of texts for pictures.

    Args:
        loaded: The model, on its device.
        texts: Sentences.
        target: Embeddings of pictures, any length.
        methods: By name.
        owner: Text of each picture; None for one each.
        merge: How the tokens of a word become its value. Relevance is a distribution over tokens,
            so their sum is the default; the authors merge nothing.
        skip: Leave out, with a word in the log, what this model cannot do.

    Returns:
        One per picture, in the order of `target`.

    Raises:
        UnsupportedTowerError: The text tower cannot do a method and `skip` is false.
        ValueError: Counts of texts and pictures differ without an `owner`.
    """
    if owner is None:
        if len(texts) != len(target):
            raise ValueError(
                f"{len(texts)} texts for {len(target)} pictures; give one each, or owner="
            )
        owner = torch.arange(len(texts))
    read = [loaded.tokenizer.words(text) for text in texts]
    ids = loaded.tokenizer(texts, trim=True).to(loaded.clip.log_scale.device)
    found: dict[str, Tensor] = {}
    left: dict[str, list[str]] = {}
    for name, method in methods.items():
        try:
            found[name] = explain_text(method, loaded.clip, ids, target, owner).cpu()
        except UnsupportedTowerError as error:
            if not skip:
                raise
            left.setdefault(str(error), []).append(name)
    for reason, names in left.items():
        log.warning("words by %s are left out: %s", ", ".join(names), reason)
    first = _first_words(loaded, ids) if found else torch.zeros(len(texts), dtype=torch.long)
    sentences = []
    for row, text in enumerate(owner.tolist()):
        words, cut = read[text]
        pieces = [word.pieces for word in words]
        values = {
            name: merge_pieces(relevance[row, int(first[text]) :], pieces, merge)
            for name, relevance in found.items()
        }
        sentences.append(Sentence(tuple(word.text for word in words), cut, values))
    return sentences


def merge_pieces(
    relevance: Float[Tensor, " N"], pieces: Sequence[int], merge: Merge = "sum"
) -> Float[Tensor, " W"]:
    """Relevance per token to relevance per word.

    Args:
        relevance: From the first word's first token on; what follows the last word is ignored.
        pieces: Tokens of every word.
        merge: Sum, largest or mean.
    """
    ends = list(accumulate(pieces))
    parts = [relevance[end - count : end] for count, end in zip(pieces, ends, strict=True)]
    how: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": torch.sum,
        "max": torch.amax,
        "mean": torch.mean,
    }
    return torch.stack([how[merge](part) for part in parts]) if parts else relevance.new_zeros(0)


def _first_words(loaded: LoadedClip, ids: Int[Tensor, "M L"]) -> Int[Tensor, " M"]:
    """Position of the first token of the first word."""
    with torch.no_grad():
        explained = loaded.clip.text.open(ids).explained
    return explained.int().argmax(1).cpu()
