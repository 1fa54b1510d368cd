"""How long things take: what is measured on, variants in turns, and one training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from open_clip.loss import ClipLoss
from PIL import Image
from torch import Tensor, nn

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.data.captions import (
    Sample,
    collate,
)
from gradeclip_ft.data.coco import read_captions
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.losses import AlignmentOptions, alignment_loss, contrastive_loss
from gradeclip_ft.models.clip import Clip, LoadedClip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.models.trace import Pass
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.global_only import GlobalOnly
from gradeclip_ft.ops.attention import attend
from gradeclip_ft.ops.heatmap import pool_heatmap, to_grid
from gradeclip_ft.ops.similarity import cosine, unit
from gradeclip_ft.text.phrases import PhraseFinder, load_tagger, nltk_problem
from gradeclip_ft.training.module import MAX_LOG_SCALE
from gradeclip_ft.training.optim import adamw

Rows = dict[str, dict[str, Any]]

# What is measured on: real photos with captions and phrases where they are, else written ones.

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini_open"
LISTING = PHOTOS / "annotations" / "captions_val2017.json"
SHARDS = PHOTOS.parent / "flickr_photos"
PROMPT = "This is a photo of the {}"
COLOURS = ("red", "blue", "white", "old", "small", "wooden", "striped", "tall", "wet", "bright")
THINGS = ("dog", "car", "table", "boat", "umbrella", "tower", "horse", "kite", "street", "cup")


class Pair(NamedTuple):
    """A picture with its captions and the phrases of all of them."""

    image: Image.Image
    captions: Sequence[str]
    phrases: Sequence[str]


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
        found = list(dict.fromkeys(p for caption in entry.captions for p in phrases(caption)))
        if len(found) >= least:
            with Image.open(PHOTOS / "images" / entry.file_name) as image:
                pairs.append(Pair(image.convert("RGB"), entry.captions, found))
    return pairs, f"{len(pairs)} COCO photos, phrases by {tagger_name()}"


def written(seed: int, size: tuple[int, int] = (480, 640)) -> Pair:
    """A pair of the same kind: pixels at random, ten phrases, a caption of three of them."""
    draw = torch.Generator().manual_seed(seed)
    colours, things = (torch.randperm(10, generator=draw).tolist() for _ in range(2))
    found = [f"{COLOURS[c]} {THINGS[t]}" for c, t in zip(colours, things, strict=True)]
    pixels = torch.randint(256, (*size, 3), generator=draw, dtype=torch.uint8)
    caption = f"a {found[0]} stands in front of a {found[1]} next to the {found[2]}"
    return Pair(Image.fromarray(pixels.numpy()), [caption], found)


def make_batch(loaded: LoadedClip, pairs: Sequence[Pair], phrases: int) -> CaptionBatch:
    """The batch a loader would give: first captions, the first so many phrases of each."""
    transform = loaded.transform(train=True)
    samples = [
        Sample(str(row), transform(pair.image), pair.captions[0], list(pair.phrases[:phrases]))
        for row, pair in enumerate(pairs)
    ]
    return collate(samples, loaded.tokenizer, PROMPT, {})


# How long it takes: variants in turns, so that other work on the machine hits all alike.


class Turns(dict[str, list[float]]):
    """Seconds of every variant, one number per round."""

    def median(self, name: str) -> float:
        """Median seconds of a variant."""
        return statistics.median(self[name])

    def against(self, name: str, base: str) -> tuple[float, str]:
        """Seconds of a variant over another one's, round by round: median, smallest and largest."""
        ratios = [mine / other for mine, other in zip(self[name], self[base], strict=True)]
        return statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"

    def rows(self, pairs: Iterable[tuple[str, str]] = ()) -> Rows:
        """Seconds of every variant, then ratio and spread of each pair."""
        rows: Rows = {name: {"seconds": self.median(name)} for name in self}
        for name, base in pairs:
            ratio, rounds = self.against(name, base)
            rows[f"{name} / {base}"] = {"ratio": ratio, "rounds": rounds}
        return rows


def in_turns(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    now: Callable[[], float] = time.process_time,  # all threads of this process, no other program
    warm_up: int = 1,
) -> Turns:
    """Run every variant once per round, forwards and backwards in turn, after a warm-up."""
    turns = Turns({name: [] for name in variants})
    for number in range(-warm_up, rounds):
        order = list(variants.items())
        for name, run in order if number % 2 == 0 else reversed(order):
            start = now()
            run()
            if number >= 0:
                turns[name].append(now() - start)
    return turns


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown, with all columns of all rows."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = f"| {' | '.join(columns)} |\n|{'--|' * len(columns)}\n".replace("|  |", "| |")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        shown = (f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells)
        text += f"| {' | '.join(shown)} |\n"
    return text


# One training step: open_clip's, ours, and ours with maps as published.

OPEN_CLIP, ORDINARY, GRAD_ECLIP = "open_clip, 77 tokens", "ordinary", "Grad-ECLIP"
PUBLISHED, PUBLISHED_77 = "published maps", "published maps, phrases of 77 tokens"
NAMES = (OPEN_CLIP, ORDINARY, GRAD_ECLIP, PUBLISHED, PUBLISHED_77)
RATIOS = (
    *((GRAD_ECLIP, OPEN_CLIP), (GRAD_ECLIP, ORDINARY)),
    *((PUBLISHED, GRAD_ECLIP), (PUBLISHED_77, GRAD_ECLIP)),
)


class Steps:
    """Training steps of a model, in fp32 on a CPU and in bf16 on a GPU."""

    def __init__(self, loaded: LoadedClip, device: str = "cpu", **extra: Any) -> None:
        self.loaded, self.device = loaded, device
        self.clip = loaded.require_clip("trained").to(device).train()
        self.optimizer = adamw(self.clip.named_parameters(), extra=extra)

    def variants(self, pairs: Sequence[Pair], phrases: int) -> dict[str, Callable[[], None]]:
        """A step of each kind on the same batch."""
        clip, tokenizer = self.clip, self.loaded.tokenizer
        batch = make_batch(self.loaded, pairs, phrases).to(self.device)
        captions = tokenizer([pair.captions[0] for pair in pairs]).to(self.device)
        texts = [PROMPT.format(text) for pair in pairs for text in pair.phrases[:phrases]]
        every = tokenizer(texts).to(self.device) if texts else batch.distinct
        ours = GlobalLocal(GradEclip(create_graph=True))
        model: Any = clip.model
        losses: dict[str, Callable[[], Tensor]] = {
            OPEN_CLIP: lambda: ClipLoss()(*model(batch.images, captions)[:3]),
            ORDINARY: lambda: GlobalOnly()(clip, batch).total,
            GRAD_ECLIP: lambda: ours(clip, batch).total,
            PUBLISHED: lambda: published(clip, batch, None),
            PUBLISHED_77: lambda: published(clip, batch, every),
        }
        return {name: partial(self.run, loss, name) for name, loss in losses.items()}

    def run(self, loss: Callable[[], Tensor], name: str) -> None:
        """Forward, backward, optimiser."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            value = loss()
        torch.autograd.backward(value)
        if name != OPEN_CLIP:  # what our trainer does before the optimiser
            nn.utils.clip_grad_norm_(self.clip.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.clip.log_scale.clamp_(0.0, MAX_LOG_SCALE)


def cpu_steps(model: str) -> tuple[Callable[[int, int], dict[str, Callable[[], None]]], str]:
    """Makes variants for a batch size and a number of phrases; and what a reader must know."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps, (pairs, source) = Steps(load_clip(model, "random")), read_pairs(5)

    def variants(size: int, phrases: int) -> dict[str, Callable[[], None]]:
        chosen = [pairs[number % len(pairs)] for number in range(size)]
        return steps.variants(chosen, phrases)

    return variants, (
        f"{source}; random weights, fp32; CPU seconds of the process, medians over the rounds in "
        "turns after a warm-up. Ours includes clipping of the gradient norm, open_clip's does not."
    )


def published(clip: Clip, batch: CaptionBatch, full: Tensor | None) -> Tensor:
    """The loss with stopped maps computed as published, each part by a pass of its own.

    Args:
        clip: The model.
        batch: The batch.
        full: Phrases at the full context, each computed however often it comes; None for those of
            the batch, cut and distinct.
    """
    opened = clip.image.open(batch.images)
    tokens = opened.run(opened.tokens, 0, len(opened.layers) - 1)
    last = opened.layers[-1]
    assert last.run is not None
    assert opened.grid is not None
    embedding = opened.head(last.run(tokens, opened.mask))[:, 0]  # the native block in full
    captions = clip.text.encode(batch.captions)
    if full is None:
        phrases = clip.text.encode(batch.distinct)[batch.phrase]
    else:
        phrases = clip.text.encode(full)
    _, _, v = last.attend(tokens, lambda rows: rows[:, 0])
    dense = opened.head(last.finish(tokens[:, 1:], v[:, 1:]))
    dense = dense.view(len(tokens), *opened.grid, -1)
    heat = published_heat(opened, tokens, phrases, batch.owner)
    scale = clip.log_scale.exp()
    local = alignment_loss(
        pool_heatmap(dense, heat, batch.owner),
        phrases,
        identity=batch.identity[batch.phrase],
        weight=heat.amax((1, 2)),
        scale=scale.detach(),
        options=AlignmentOptions(),
    )
    return contrastive_loss(embedding, captions, scale) + local.loss


def published_heat(opened: Pass, tokens: Tensor, target: Tensor, owner: Tensor) -> Tensor:
    """Maps (P, h, w) as published: a full last block, one backward pass per phrase, no graph.

    Written from equations (7), (15), (19) and (20): the last block runs once more with a single
    head on all tokens of one image, and the gradient of each cosine goes back through it to the
    whole attention output, of which the class token's row is kept.
    """
    assert opened.grid is not None
    maps = torch.zeros(len(owner), tokens.shape[1])
    last = opened.layers[-1]
    for image in set(owner.tolist()):
        x = tokens[image : image + 1].detach()
        with torch.no_grad():
            q, k, v = (rows.float() for rows in last.attend(x, lambda rows: rows))
            o, _ = attend(q, k, v, heads=1)
        near = cosine(q[0, :1].expand_as(k[0]), k[0])[1:]  # class token and patches, (n,)
        spatial = (near - near.min()) / (near.max() - near.min())
        with torch.enable_grad():
            embedding = opened.head(last.finish(x, o.requires_grad_()))[:, 0].float()
            for phrase in (owner == image).nonzero().flatten().tolist():
                text = unit(target[phrase : phrase + 1].detach())
                score = cosine(embedding, text).sum()
                (weight,) = torch.autograd.grad(score, o, retain_graph=True)
                maps[phrase, 1:] = (spatial * (v[0, 1:] @ weight[0, 0])).relu().detach()
    return to_grid(maps, opened.grid)
