"""Several methods on the same pixels and the same text vectors, from one image pass.

`heat_maps` is the one driver of `explain`, `report` and the pointing game; `explain_pictures` and
`explain_sentences` put files and texts around it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby, pairwise
from math import inf
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from gradeclip_ft.explain.base import (
    Explainer,
    InputExplainer,
    RecordExplainer,
    SharedPass,
    shared_pass,
)
from gradeclip_ft.images import read_image
from gradeclip_ft.models.clip import ImageTransform, LoadedClip, Placement
from gradeclip_ft.models.other.classifier import LoadedImageModel
from gradeclip_ft.models.trace import UnsupportedTowerError
from gradeclip_ft.ops.heatmap import to_pixels
from gradeclip_ft.report.content import Words

Picture: TypeAlias = Image.Image | str | Path | Tensor
"""A picture, its file, or its normalised pixels (3, H, W), which are taken as they are."""
GEOMETRIES = ("model", "aspect")
Answer = TypeVar("Answer")

ROWS = 64  # phrases at a time: records keep several layers of each; costs no image pass
BATCH = 16  # pictures at a time
log = logging.getLogger(__name__)


class Supported:
    """Explainers that a model supports; another is dropped, with a warning, when it first fails.

    `methods` are those left; `left_out` says why the others are not. Without `skip` none may be
    dropped. Those that compare with texts of their own have them encoded here.
    """

    def __init__(
        self, methods: Mapping[str, Explainer], loaded: LoadedImageModel, *, skip: bool = True
    ) -> None:
        self.methods: dict[str, Explainer] = {
            name: method.prepare(loaded) if hasattr(method, "prepare") else method
            for name, method in methods.items()
        }
        self.left_out: dict[str, str] = {}
        self._skip = skip

    def run(
        self, work: Callable[[Explainer], Answer], names: Iterable[str] | None = None
    ) -> dict[str, Answer]:
        """Answers of those of the methods that the model supports; of all for None.

        Raises:
            UnsupportedTowerError: It supports none at all, or not all, and none may be dropped.
        """
        answers: dict[str, Answer] = {}
        for name in list(self.methods if names is None else names):
            try:
                if name in self.methods:
                    answers[name] = work(self.methods[name])
            except UnsupportedTowerError as error:
                if not self._skip:
                    raise
                log.warning("%s is left out: %s", name, error)
                self.left_out[name] = str(error)
                del self.methods[name]
                if not self.methods:
                    raise UnsupportedTowerError(
                        f"this model supports none of {', '.join(self.left_out)}: {error}"
                    ) from error
        return answers


def heat_maps(
    supported: Supported,
    shared: SharedPass,
    target: Float[Tensor, "P D"],
    owner: Int[Tensor, " P"],
) -> dict[str, Float[Tensor, "P h w"]]:
    """Maps of every target by every method that the model supports, from one pass."""

    def layers(name: str) -> float:  # of the record that a method reads
        method = supported.methods[name]
        if not isinstance(method, RecordExplainer):
            return 0.0
        return inf if method.depth is None else float(method.depth)

    # Methods with passes of their own go over the phrases themselves: RISE has one set of masked
    # pictures for all. The others share what they read, those with the deepest record first.
    methods = supported.methods.items()
    alone = [name for name, method in methods if isinstance(method, InputExplainer)]
    sharing = sorted((n for n in supported.methods if n not in alone), key=layers, reverse=True)
    parts = list(zip(torch.split(target, ROWS), torch.split(owner, ROWS), strict=True))
    found: dict[str, list[Tensor]] = {name: [] for name in supported.methods}
    for names, chunks in ((sharing, parts), (alone, [(target, owner)])):
        for some, of in chunks:
            work = partial(shared.heat, target=some, owner=of)
            for name, heat in supported.run(work, names).items():
                found[name].append(heat)
    return {name: torch.cat(found[name]) for name in supported.methods}


@dataclass(frozen=True)
class Seen:
    """One picture as a model sees it.

    Attributes:
        pixels: Normalised.
        placement: Where they are on the upright picture.
    """

    pixels: Float[Tensor, "3 H W"]
    placement: Placement


@dataclass(frozen=True)
class Explained:
    """What a model makes of one picture.

    Attributes:
        seen: What every method saw.
        heat: Maps by method, on the grid of the patches.
        score: Cosine of picture and phrase; of a classifier the class logit.
        embedding: Of the picture, not normalised.
    """

    seen: Seen
    heat: Mapping[str, Float[Tensor, "P h w"]]
    score: Float[Tensor, " P"]
    embedding: Float[Tensor, " D"]

    def at_pixels(self, method: str) -> Float[Tensor, "P H W"]:
        """Maps of one method at the size of the pixels that were seen, bilinear."""
        return to_pixels(self.heat[method], self.seen.placement.size)


def explain_pictures(
    loaded: LoadedImageModel,
    pictures: Sequence[Picture | Seen],
    targets: Sequence[Float[Tensor, "_ D"]],
    methods: Mapping[str, Explainer] | Supported,
    *,
    skip: bool = False,
) -> list[Explained]:
    """Maps of every phrase by every method, neighbours of one size in one pass.

    Args:
        loaded: The model, on its device.
        pictures: Of any size and mode; see `see`.
        targets: Embeddings of the phrases of each picture.
        methods: By name; or those that earlier pictures have left.
        skip: Drop, with a warning, what this model does not support.

    Raises:
        UnsupportedTowerError: The model cannot do a method and `skip` is false, or it can do none.
        ValueError: Counts of pictures and targets differ, or a file is not a picture.
    """
    if len(pictures) != len(targets):
        raise ValueError(f"{len(targets)} sets of phrases for {len(pictures)} pictures; give each")
    supported = methods
    if not isinstance(supported, Supported):
        supported = Supported(supported, loaded, skip=skip)
    seen = [one if isinstance(one, Seen) else see(loaded, one) for one in pictures]
    found: list[Explained] = []
    for _, group in groupby(range(len(seen)), key=lambda row: seen[row].placement.size):
        same = list(group)
        for at in range(0, len(same), BATCH):
            some = slice(same[at], same[at] + len(same[at : at + BATCH]))
            found += _explain_batch(loaded, seen[some], targets[some], supported)
    return found


def _explain_batch(
    loaded: LoadedImageModel,
    seen: Sequence[Seen],
    targets: Sequence[Tensor],
    supported: Supported,
) -> list[Explained]:
    model, counts = loaded.image_model, [len(target) for target in targets]
    tower, device = model.image, model.device
    target = torch.cat(list(targets)).to(device)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)
    pixels = torch.stack([one.pixels for one in seen]).to(device)
    with shared_pass(model, tower, pixels) as shared:
        maps = heat_maps(supported, shared, target, owner)
        embedding = shared.embedding
        score = tower.score(embedding[owner], target.float())
    heat = {name: torch.split(found.cpu(), counts) for name, found in maps.items()}
    return [
        Explained(one, {name: found[row] for name, found in heat.items()}, scores, own)
        for row, (one, scores, own) in enumerate(
            zip(seen, torch.split(score.cpu(), counts), embedding.cpu(), strict=True)
        )
    ]


def targets_of(loaded: LoadedImageModel, texts: Sequence[str]) -> Float[Tensor, "P D"]:
    """What maps are for: embeddings of the texts, or of a classifier the classes of these names."""
    return loaded.encode_texts(texts) if isinstance(loaded, LoadedClip) else loaded.targets(texts)


def warn_of_unread(loaded: LoadedClip, texts: Sequence[str]) -> None:
    """Log what of the texts the model cannot read, where its tokenizer knows words."""
    loaded.tokenizer.warn_of_unknown(dict.fromkeys(texts))
    for text in dict.fromkeys(texts):
        try:
            read, cut = loaded.tokenizer.words(text)
        except ValueError:  # a function of a user's own, from texts to ids
            return
        if cut:
            length, end = loaded.tokenizer.context_length, " ".join(w.text for w in read[-3:])
            log.warning(
                "%s reads %d tokens; it leaves out '%s' after '%s'", loaded.name, length, cut, end
            )


def see(
    loaded: LoadedImageModel,
    picture: Picture,
    geometry: str = "model",
    shortest: int = 640,
) -> Seen:
    """One picture as the model sees it.

    Args:
        loaded: The model.
        picture: The picture.
        geometry: The model's own resize, crop and padding; or `aspect`, as the Grad-ECLIP authors
            do: each side brought to the nearest multiple of the patch (half a patch up), nothing
            cropped.
        shortest: Pixels of the shorter side under `aspect`, at most.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is not a picture, a tensor is not (3, H, W), `shortest` is below 1, or
            the model takes pictures of one size only.
    """
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or len(picture) != 3 or not picture.is_floating_point():
            raise ValueError(
                f"a picture is a tensor of shape {tuple(picture.shape)} and type {picture.dtype}, "
                "expected normalised pixels (3, H, W); give a PIL image or a file otherwise"
            )
        size = (picture.shape[1], picture.shape[2])
        return Seen(picture, Placement(size, size))
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry is {geometry!r}, expected {' or '.join(GEOMETRIES)}")
    upright, transform = read_image(picture), loaded.transform()
    if geometry == "aspect":
        transform = _whole(loaded, upright, shortest)
    return Seen(transform(upright), transform.placement(upright))


def _whole(loaded: LoadedImageModel, upright: Image.Image, shortest: int) -> ImageTransform:
    """Of one picture, under `aspect`."""
    patch = loaded.image_model.image.patch
    if shortest < 1:
        raise ValueError(f"shortest is {shortest}; give the pixels of the shorter side, 1 or more")
    if not patch:
        raise ValueError("this model takes pictures of one size; choose geometry=model")
    scale = min(1.0, shortest / min(upright.size))
    width, height = (max(1, int(side * scale / patch + 0.5)) * patch for side in upright.size)
    whole = replace(loaded.preprocessing, resize="squash")
    return ImageTransform(size=(height, width), preprocessing=whole)


def to_display_image(pixels: Float[Tensor, "3 H W"], loaded: LoadedImageModel) -> Tensor:
    """The picture as the model saw it, (H, W, 3) in bytes: maps belong on this one."""
    how = loaded.preprocessing
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (how.mean, how.std))
    return ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)


def explain_sentences(
    loaded: LoadedClip,
    texts: Sequence[str],
    target: Float[Tensor, "P D"],
    methods: Mapping[str, Explainer],
    *,
    skip: bool = False,
) -> list[Words]:
    """Relevance of the words of texts for pictures, by all methods from one text pass.

    A word has the sum of its tokens' shares (the authors merge nothing), so the values of a method
    sum to 1, less what is on a word that the context cuts in two, or are all 0. With `skip` methods
    that this model does not support are left out, with a warning.

    Raises:
        UnsupportedTowerError: The text tower cannot do a method and `skip` is false.
        ValueError: Counts of texts and pictures differ.
    """
    if len(texts) != len(target):
        raise ValueError(f"{len(texts)} texts for {len(target)} pictures; give one each")
    owner = torch.arange(len(texts))
    found: dict[str, Tensor] = {}
    left: dict[str, list[str]] = {}
    first = torch.zeros(len(texts), dtype=torch.long)
    ids = loaded.tokenizer(texts, trim=True).to(loaded.clip.device)
    with shared_pass(loaded.clip, loaded.clip.text, ids) as shared:
        for name, method in methods.items():
            try:
                found[name] = shared.word_shares(method, target, owner).cpu()
            except UnsupportedTowerError as error:
                if not skip:
                    raise
                left.setdefault(str(error), []).append(name)
        if found:
            first = shared.opened.explained.int().argmax(1).cpu()  # position of the first word
    for reason, names in left.items():
        log.warning("words by %s are left out: %s", ", ".join(names), reason)
    sentences = []
    for row, (text, start) in enumerate(zip(texts, first.tolist(), strict=True)):
        words, cut = loaded.tokenizer.words(text)
        ends = [start, *(start + end for end in accumulate(word.pieces for word in words))]
        values = {
            name: [float(shares[row, a:b].sum()) for a, b in pairwise(ends)]
            for name, shares in found.items()
        }
        sentences.append(Words([word.text for word in words], values, cut))
    return sentences
