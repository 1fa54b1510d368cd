"""Cost of a region evaluation beside the bare encoder forward over the same photos.

The forward reads pixels from memory; the evaluation loads photos and masks, traces, pools and
classifies. Class texts are encoded once per model, whatever the number of photos, and stand apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gradeclip_ft.data.regions import CocoRegions
from gradeclip_ft.evaluators.base import evaluating
from gradeclip_ft.evaluators.regions import RegionEvaluator
from gradeclip_ft.models.clip import LoadedClip, class_embeddings
from gradeclip_ft.models.load import load_clip

from .clock import device_clock, in_turns
from .inputs import PHOTOS
from .publish import Section, publish

FORWARD, WHOLE, TEXTS = "encoder forward, pixels in memory", "evaluation", "class texts"


def evaluate(
    *,
    annotations: Path = PHOTOS / "annotations" / "instances_val2017.json",
    images: Path = PHOTOS / "images",
    model: str = "ViT-B-16",
    weights: str = "random",
    image_size: int = 224,
    photos: int = 100,
    batch_size: int = 16,
    workers: int = 0,
    rounds: int = 7,
    threads: int = 1,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """A region evaluation, photos loaded and decoded, beside the forward pass alone."""
    torch.set_num_threads(threads)
    loaded = load_clip(model, weights)
    loaded.clip.to(device)
    data = CocoRegions(str(annotations), str(images), limit=photos)
    sentence = ["a photo of the {}."]
    regions = RegionEvaluator(
        "bench", data, image_size, sentence, batch_size=batch_size, workers=workers
    )
    opened = data(image_size=image_size, patch=loaded.patch, mean=loaded.mean, std=loaded.std)
    pixels = [batch.images.to(device) for batch in opened.batches(batch_size, 0)]
    variants: dict[str, Callable[[], object]] = {
        FORWARD: partial(_forward, loaded, pixels),
        WHOLE: partial(regions, loaded),
        TEXTS: partial(_texts, loaded, opened.classes, sentence),
    }
    now = time.perf_counter if workers else device_clock(device)  # workers have clocks of their own
    turns = in_turns(variants, rounds=rounds, now=now)
    rows: dict[str, dict[str, float | str]] = {
        name: {"seconds": turns.median(name)} for name in variants
    }
    share = turns.ratio(WHOLE, FORWARD) - turns.ratio(TEXTS, FORWARD)
    rows["evaluation without class texts / forward"] = {"ratio": share}
    notes = [
        f"{len(opened)} photos at {image_size} px, {opened.counts['things']} regions; medians over "
        f"{rounds} rounds in turns behind one of warm-up."
    ]
    publish(Section(f"evaluate, {model}, {device}", rows, notes), out, threads=threads)


def _forward(loaded: LoadedClip, pixels: list[torch.Tensor]) -> None:
    with evaluating(loaded.clip):
        for batch in pixels:
            loaded.clip.image.encode(batch)


def _texts(loaded: LoadedClip, names: list[str], sentences: list[str]) -> None:
    with evaluating(loaded.clip):
        class_embeddings(loaded.clip, loaded.tokenizer, names, sentences)
