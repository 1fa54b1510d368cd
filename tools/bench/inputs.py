"""What is measured on: real photos with captions and phrases where they are, else written ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.data.captions import Sample, collate
from gradeclip_ft.data.coco import read_captions
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.text.phrases import PhraseFinder, load_tagger, nltk_problem

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_mini_open"
LISTING = PHOTOS / "annotations" / "captions_val2017.json"
PROMPT = "This is a photo of the {}"
COLOURS = ("red", "blue", "white", "old", "small", "wooden", "striped", "tall", "wet", "bright")
THINGS = ("dog", "car", "table", "boat", "umbrella", "tower", "horse", "kite", "street", "cup")


@dataclass(frozen=True)
class Pair:
    """A picture with its captions and the phrases of all of them."""

    image: Image.Image
    captions: tuple[str, ...]
    phrases: tuple[str, ...]


def tagger_name() -> str:
    """NLTK's tagger where its data are, else TextBlob's."""
    return "nltk" if nltk_problem() is None else "textblob"


def read_pairs(least: int) -> tuple[list[Pair], str]:
    """Pairs with at least so many phrases, and where they are from.

    An image's first caption seldom has more than four; those of its other captions follow.
    """
    if not LISTING.is_file():
        return [written(number) for number in range(64)], "written captions, pixels at random"
    phrases = PhraseFinder(load_tagger(tagger_name()), 100)
    pairs = []
    for entry in read_captions(LISTING):
        found = tuple(dict.fromkeys(p for caption in entry.captions for p in phrases(caption)))
        if len(found) >= least:
            with Image.open(PHOTOS / "images" / entry.file_name) as image:
                pairs.append(Pair(image.convert("RGB"), entry.captions, found))
    return pairs, f"{len(pairs)} COCO photos, phrases by {tagger_name()}"


def written(seed: int) -> Pair:
    """A pair of the same kind: ten phrases, a caption of three of them."""
    draw = torch.Generator().manual_seed(seed)
    colours, things = (torch.randperm(10, generator=draw).tolist() for _ in range(2))
    found = tuple(f"{COLOURS[c]} {THINGS[t]}" for c, t in zip(colours, things, strict=True))
    pixels = torch.randint(256, (480, 640, 3), generator=draw, dtype=torch.uint8)
    caption = f"a {found[0]} stands in front of a {found[1]} next to the {found[2]}"
    return Pair(Image.fromarray(pixels.numpy()), (caption,), found)


def take(pairs: list[Pair], size: int) -> list[Pair]:
    """So many, again from the start if there are fewer."""
    return [pairs[number % len(pairs)] for number in range(size)]


def make_batch(loaded: LoadedClip, pairs: list[Pair], phrases: int) -> CaptionBatch:
    """The batch a loader would give: first captions, the first so many phrases of each."""
    transform = loaded.transform(train=True)
    samples = [
        Sample(str(row), transform(pair.image), pair.captions[0], list(pair.phrases[:phrases]))
        for row, pair in enumerate(pairs)
    ]
    return collate(samples, loaded.tokenizer, PROMPT, {})
