"""Scenes of the shapes world in memory, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradeclip_ft.data.shapes import PROMPT, Sample, Split, make_sample
from gradeclip_ft.data.shapes_scenes import COLOURS, boxes_of, thing_names
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.tokenizer import WordTokenizer
from gradeclip_ft.ops.heatmap import pool_boxes
from gradeclip_ft.ops.similarity import unit

PAINTERS, FEW = 2, 1000
PREPROCESSING: dict[str, Any] = {
    "mean": [0.68, 0.66, 0.65],
    "std": [0.22, 0.22, 0.22],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


@dataclass(frozen=True)
class World:
    """Scenes in memory.

    Attributes:
        images: uint8 (N, 3, 64, 64).
        captions: Token ids (N, K, L): K sentences per scene.
        boxes: xyxy in [0, 1] of all objects, (R, 4).
        labels: Class of each object.
        owner: Scene of each object.
        colours: Number of the first object's colour, by scene.
    """

    images: Tensor
    captions: Tensor
    boxes: Tensor
    labels: Tensor
    owner: Tensor
    colours: Tensor

    def pixels(self, rows: Tensor | slice) -> Tensor:
        """Normalised images."""
        mean, std = (torch.tensor(PREPROCESSING[key]).view(3, 1, 1) for key in ("mean", "std"))
        normal: Tensor = (self.images[rows].float() / 255 - mean) / std
        return normal


def draw_world(split: Split, count: int, seed: int, tokenizer: WordTokenizer) -> World:
    """Scenes 0 to count - 1 of a split; many are drawn by several processes."""
    sample = partial(make_sample, seed, split)
    if count <= FEW:
        samples = [sample(index) for index in range(count)]
    else:
        with ProcessPoolExecutor(PAINTERS, mp_context=get_context("spawn")) as pool:
            samples = list(pool.map(sample, range(count), chunksize=100))
    names, colours = thing_names(), list(COLOURS)
    pictures = np.stack([np.asarray(each.drawing.image) for each in samples])
    captions = [tokenizer(each.captions) for each in samples]
    regions = [(row, *region) for row, each in enumerate(samples) for region in _regions(each)]
    return World(
        images=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
        captions=torch.stack(captions),
        boxes=torch.tensor([box for _, box, _ in regions]) / 64,
        labels=torch.tensor([names.index(name) for _, _, name in regions]),
        owner=torch.tensor([row for row, _, _ in regions]),
        colours=torch.tensor([colours.index(each.scene.things[0].colour) for each in samples]),
    )


@torch.no_grad()
def measure(model: nn.Module, world: World, tokenizer: WordTokenizer) -> dict[str, float]:
    """Retrieval with all captions, and the classes of ground-truth boxes from dense features."""
    clip = Clip(model)
    traces = [
        clip.image.trace(world.pixels(slice(k, k + 100))) for k in range(0, len(world.images), 100)
    ]
    images = unit(torch.cat([trace.embedding for trace in traces]))
    texts = unit(clip.text.encode(world.captions.flatten(0, 1)))
    classes = unit(clip.text.encode(tokenizer([PROMPT.format(name) for name in thing_names()])))
    dense = torch.cat([trace.dense() for trace in traces])
    regions = pool_boxes(dense, world.boxes, world.owner)
    scores = regions @ classes.T
    result = {f"boxes/top{k}": hits(scores, world.labels, k) for k in (1, 5)}
    owner = torch.arange(len(images)).repeat_interleave(world.captions.shape[1])
    similarity = images @ texts.T
    for k in (1, 5, 10):
        result[f"image_retrieval_recall@{k}"] = hits(similarity.T, owner, k)
        best = owner[similarity.topk(k, dim=1).indices]
        found = (best == torch.arange(len(images))[:, None]).any(1)
        result[f"text_retrieval_recall@{k}"] = round(found.float().mean().item(), 4)
    return result


def hits(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share of rows whose label is among the k highest scores."""
    return round((scores.topk(k, dim=1).indices == labels[:, None]).any(1).float().mean().item(), 4)


def _regions(sample: Sample) -> list[tuple[Sequence[int], str]]:
    """(xyxy in pixels, class name) of every object."""
    things = sample.scene.things
    boxes = boxes_of(sample.drawing.owner, len(things))
    return [
        ((x, y, x + width, y + height), thing.name)
        for (x, y, width, height), thing in zip(boxes, things, strict=True)
    ]
