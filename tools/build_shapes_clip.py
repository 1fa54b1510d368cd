"""Builds the small CLIPs of `gradeclip_ft/assets`: the global loss alone, on scenes of its own.

    python tools/build_shapes_clip.py            shapes_tiny: world 1, 64 px, 8 x 8 cells
    python tools/build_shapes_clip.py world=2    shapes2_tiny: world 2, 128 px, 16 x 16 cells

draws the scenes, trains, measures, and writes NAME.safetensors (half precision, open_clip's own
names) and NAME.json. The json's `built` entry holds the settings and what was measured. Equal
settings give an equal model on the same machine. With one thread it takes about 15 minutes, world
2 about 18 on a busy machine.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradeclip_ft.commands.cli import call
from gradeclip_ft.data.shapes import PROMPT, Split, make_sample, vocabulary
from gradeclip_ft.data.shapes_scenes import COLOURS, boxes_of, thing_names
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.tokenizer import WordTokenizer
from gradeclip_ft.ops.heatmap import pool_boxes
from gradeclip_ft.ops.similarity import unit

FEW = 1000
ASSETS = Path(__file__).resolve().parents[1] / "gradeclip_ft" / "assets"
MEAN, STD = [0.68, 0.66, 0.65], [0.22, 0.22, 0.22]
PREPROCESSING = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}


SETTINGS: dict[int, dict[str, Any]] = {
    1: {"scenes": 24_000, "steps": 3_000, "warmup": 200, "dropped": 0.0},
    2: {"scenes": 8_000, "steps": 600, "warmup": 60, "dropped": 0.5},
}
"""What differs between the worlds beside `SIZES`. World 2 begins with the weights of world 1: from
random ones, 2,200 steps told no shapes (27 % of pictures of one object). `dropped` is the share of
patches that a training step leaves out, all but the last `WHOLE` steps (Li et al., "Scaling
Language-Image Pre-training via Masking"), which makes a step on 256 patches three times faster."""

Words: TypeAlias = Callable[[Sequence[str]], Tensor]
SIZES = {1: {"image_size": 64, "context": 32}, 2: {"image_size": 128, "context": 40}}
WHOLE = 60
NAMES = {1: "shapes_tiny", 2: "shapes2_tiny"}


@dataclass(frozen=True)
class Scenes:
    """Scenes in memory.

    Attributes:
        images: uint8 (N, 3, S, S).
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

    @property
    def single(self) -> Tensor:
        """Which objects are the only one of their scene, (R)."""
        return (torch.bincount(self.owner) == 1)[self.owner]

    def pixels(self, rows: Tensor | slice) -> Tensor:
        """Normalised images."""
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
        normal: Tensor = (self.images[rows].float() / 255 - mean) / std
        return normal


def draw_world(
    split: Split, count: int, seed: int, tokenizer: Words, image_size: int, world: int
) -> Scenes:
    """Scenes 0 to count - 1 of a split; many are drawn by several processes."""
    sample = partial(make_sample, seed, split, image_size=image_size, world=world)
    if count <= FEW:
        samples = [sample(index) for index in range(count)]
    else:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            samples = list(pool.map(sample, range(count), chunksize=100))
    names, colours = thing_names(), list(COLOURS)
    boxes, labels, owner = [], [], []
    for row, each in enumerate(samples):
        things = each.scene.things
        for (x, y, width, height), thing in zip(
            boxes_of(each.drawing.owner, len(things)), things, strict=True
        ):
            boxes.append((x, y, x + width, y + height))
            labels.append(names.index(thing.name))
            owner.append(row)
    pictures = np.stack([np.asarray(each.drawing.image) for each in samples])
    return Scenes(
        images=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
        captions=torch.stack([tokenizer(each.captions) for each in samples]),
        boxes=torch.tensor(boxes) / image_size,
        labels=torch.tensor(labels),
        owner=torch.tensor(owner),
        colours=torch.tensor([colours.index(each.scene.things[0].colour) for each in samples]),
    )


def build(
    *,
    world: int = 1,
    scenes: int | None = None,
    steps: int | None = None,
    batch: int = 128,
    rate: float = 1e-3,
    decay: float = 0.1,
    warmup: int | None = None,
    width: int = 96,
    layers: int = 3,
    text_layers: int = 2,
    seed: int = 0,
    threads: int = 1,
    out: Path = ASSETS,
) -> None:
    """Draws, trains, measures, saves; what is None is that of the world in `SETTINGS`."""
    given = {name: value for name, value in locals().items() if name != "out" and value is not None}
    if world not in SETTINGS:
        raise ValueError(f"world is {world}; there are 1 and 2")
    settings: dict[str, Any] = SETTINGS[world] | SIZES[world] | given
    size, context = settings["image_size"], settings["context"]
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    words = vocabulary()
    tokenizer = WordTokenizer(tuple(words), context)
    vision = {"image_size": size, "patch_size": 8, "layers": layers, "width": width}
    text = {"context_length": context, "vocab_size": len(words) + 4, "width": width}
    architecture: dict[str, Any] = {
        "embed_dim": width,
        "vision_cfg": {**vision, "head_width": 32, "mlp_ratio": 4.0},
        "text_cfg": {**text, "heads": width // 32, "layers": text_layers},
    }
    model: open_clip.CLIP = open_clip.CLIP(**architecture)
    if world > 1:
        begin_from(model, ASSETS / f"{NAMES[1]}.safetensors")
    start = time.perf_counter()
    kind = (seed, tokenizer, size, world)
    judge = partial(measure, model, draw_world("val", 500, *kind), tokenizer)
    pictures = draw_world("pretrain", settings["scenes"], *kind)
    names = ("steps", "batch", "rate", "decay", "warmup", "seed", "dropped")
    for step in train(model, pictures, **{name: settings[name] for name in names}):
        if step % 500 == 499:
            print(judge(), flush=True)
    minutes = (time.perf_counter() - start) / 60
    with torch.no_grad():  # what is saved in half precision is what is measured
        for value in model.parameters():
            value.copy_(value.half())
    built = {
        "command": f"python tools/build_shapes_clip.py{'' if world == 1 else f' world={world}'}",
        "settings": settings,
        "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
        "minutes": round(minutes, 1),
        "measured": judge(),
        "measured_on": "500 val scenes of seed 0; five captions each in retrieval",
    }
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    (out / f"{NAMES[world]}.safetensors").write_bytes(save(state))
    content = {
        "model_cfg": architecture,
        "preprocess_cfg": PREPROCESSING,
        "vocabulary": list(words),
        "word_classes": words,
        "built": built,
    }
    (out / f"{NAMES[world]}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(built, indent=1))


def begin_from(model: open_clip.CLIP, weights: Path) -> None:
    """Weights of a model of the same widths and words, its positions brought to this one's."""
    state = {name: tensor.float() for name, tensor in load_file(weights).items()}
    open_clip.model.resize_pos_embed(state, model)
    open_clip.model.resize_text_pos_embed(state, model)
    model.load_state_dict(state)


def train(
    model: open_clip.CLIP,
    world: Scenes,
    *,
    steps: int,
    batch: int,
    rate: float,
    decay: float,
    warmup: int,
    seed: int,
    dropped: float,
) -> Iterator[int]:
    """AdamW, warm-up and cosine, open_clip's loss in bfloat16, temperature of at most 100."""
    plain = [value for value in model.parameters() if value.ndim < 2]
    matrices = [value for value in model.parameters() if value.ndim >= 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6)
    loss_of, random = open_clip.ClipLoss(), torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    model.train()
    for step, rows in zip(range(steps), batches(world, batch, random), strict=False):
        chosen = torch.randint(world.captions.shape[1], (len(rows),), generator=random)
        done = (step - warmup) / max(1, steps - warmup)
        share = (step + 1) / warmup if done < 0 else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        whole = not dropped or step >= steps - WHOLE
        model.visual.patch_dropout = (
            nn.Identity() if whole else open_clip.transformer.PatchDropout(dropped)
        )
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # 1.4 x faster
            output = model(world.pixels(rows), world.captions[rows, chosen])
        loss: Tensor = loss_of(*(part.float() for part in output))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.visual.patch_dropout = nn.Identity()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 50 == 0 or step == steps - 1:
            seconds = time.perf_counter() - began
            print(f"step {step:5d}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
        yield step
    model.eval()


def batches(world: Scenes, size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Rows of the world, without end: by turns any scenes, and scenes of one colour.

    Colours alone tell most scenes of a mixed batch apart, and a small model stops there. Where all
    scenes of a batch share a colour, the shape has to be learned.
    """
    colour = world.colours
    while True:
        order = torch.randperm(len(colour), generator=random)
        mixed = torch.split(order, size)
        alike = torch.split(order[torch.argsort(colour[order], stable=True)], size)
        for number in torch.randperm(len(colour) // size, generator=random).tolist():
            yield mixed[number]
            yield alike[number]


@torch.no_grad()
def measure(model: nn.Module, world: Scenes, tokenizer: WordTokenizer) -> Mapping[str, float]:
    """Retrieval with all captions, and the classes of ground-truth boxes from dense features."""
    clip = Clip(model)
    starts = range(0, len(world.images), 100)
    traces = [clip.image.trace(world.pixels(slice(start, start + 100))) for start in starts]
    images = unit(torch.cat([trace.embedding for trace in traces]))
    texts = unit(clip.text.encode(world.captions.flatten(0, 1)))
    classes = unit(clip.text.encode(tokenizer([PROMPT.format(name) for name in thing_names()])))
    dense = torch.cat([trace.dense() for trace in traces])
    scores = pool_boxes(dense, world.boxes, world.owner) @ classes.T
    owner = torch.arange(len(images)).repeat_interleave(world.captions.shape[1])
    similarity = images @ texts.T
    single = images[world.owner[world.single]] @ classes.T
    found = {f"boxes/top{k}": hits(scores, world.labels[:, None], k) for k in (1, 5)}
    found["one_object/top1"] = hits(single, world.labels[world.single, None], 1)
    for k in (1, 5, 10):
        found[f"image_retrieval_recall@{k}"] = hits(similarity.T, owner[:, None], k)
        mine = torch.arange(len(texts)).view(len(images), -1)  # columns of each image's texts
        found[f"text_retrieval_recall@{k}"] = hits(similarity, mine, k)
    return found


def hits(scores: Tensor, right: Tensor, k: int) -> float:
    """Share of rows of which a right column is among the k highest scores."""
    best = scores.topk(k, dim=1).indices
    return round((best[:, :, None] == right[:, None]).any(2).any(1).float().mean().item(), 4)


if __name__ == "__main__":
    sys.exit(call(build, sys.argv[1:]))
