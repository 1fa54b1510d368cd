"""Cost of a region evaluation beside the bare encoder forward over the same photos.

    python -m tools.bench_regions annotations=instances_val2017.json images=val2017

Both are timed in turns, so that other work on the machine hits both alike; the table has medians.
Without workers a CPU's own seconds are counted, else those of the clock.
The forward reads pixels from memory; the evaluation loads photos and masks, traces, pools and
classifies. Class texts are encoded once per model, whatever the number of photos, and stand apart.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from gradeclip_ft.commands.plain import call
from gradeclip_ft.data.regions import CocoRegions
from gradeclip_ft.evaluators.base import evaluating
from gradeclip_ft.evaluators.regions import RegionEvaluator
from gradeclip_ft.models.class_embeddings import class_embeddings
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.factory import load_clip


def bench(
    *,
    annotations: Path,
    images: Path,
    model: str = "ViT-B-16",
    weights: str = "random",
    image_size: int = 224,
    photos: int = 100,
    batch_size: int = 16,
    workers: int = 0,
    rounds: int = 3,
    device: str = "cpu",
) -> None:
    """Print the table."""
    loaded = load_clip(model, weights)
    loaded.clip.to(device)
    data = CocoRegions(str(annotations), str(images), limit=photos)
    sentence = ["a photo of the {}."]
    regions = RegionEvaluator(
        "bench", data, image_size, sentence, batch_size=batch_size, workers=workers
    )
    opened = data(image_size=image_size, patch=loaded.patch, mean=loaded.mean, std=loaded.std)
    pixels = [batch.images.to(device) for batch in opened.batches(batch_size, 0)]
    forward, whole, texts = [], [], []
    for _ in range(rounds):
        forward.append(_forward(loaded, pixels, workers))
        start = _now(device, workers)
        regions(loaded)
        whole.append(_now(device, workers) - start)
        start = _now(device, workers)
        with evaluating(loaded.clip):
            class_embeddings(loaded.clip, loaded.tokenizer, opened.names, sentence)
        texts.append(_now(device, workers) - start)
    costs = [total - text for total, text in zip(whole, texts, strict=True)]
    ratios = [cost / bare for cost, bare in zip(costs, forward, strict=True)]
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"{model} at {image_size} px, {len(opened)} photos, {opened.counts['things']} regions")
    print(f"encoder forward, pixels in memory   {statistics.median(forward):8.2f} s")
    print(f"regions, photos loaded and decoded  {statistics.median(costs):8.2f} s")
    print(f"class texts, one sentence each      {statistics.median(texts):8.2f} s")
    print(f"regions / forward: {statistics.median(ratios):.2f} (rounds: {each})")


def _forward(loaded: LoadedClip, pixels: list[torch.Tensor], workers: int) -> float:
    device = str(pixels[0].device)
    with evaluating(loaded.clip):
        start = _now(device, workers)
        for batch in pixels:
            loaded.clip.image.encode(batch)
        return _now(device, workers) - start


def _now(device: str, workers: int) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and not workers else time.perf_counter()


if __name__ == "__main__":
    call(bench, sys.argv[1:])
