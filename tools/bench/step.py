"""One training step in five ways: open_clip's, ours, and ours with maps as published."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.losses import AlignmentOptions, alignment_loss, contrastive_loss
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.models.trace import Pass
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.global_only import GlobalOnly
from gradeclip_ft.ops.attention import attend
from gradeclip_ft.ops.heatmap import pool_heatmap, to_grid
from gradeclip_ft.ops.similarity import cosine, unit
from gradeclip_ft.training.module import MAX_LOG_SCALE
from gradeclip_ft.training.optim import adamw

from .inputs import PROMPT, make_batch, read_pairs, take
from .measure import Rows, in_turns, publish

OPEN_CLIP, ORDINARY, GRAD_ECLIP = "open_clip, 77 tokens", "ordinary", "Grad-ECLIP"
PUBLISHED, PUBLISHED_77 = "published maps", "published maps, phrases of 77 tokens"
NAMES = (OPEN_CLIP, ORDINARY, GRAD_ECLIP, PUBLISHED, PUBLISHED_77)
RATIOS = (
    *((GRAD_ECLIP, OPEN_CLIP), (GRAD_ECLIP, ORDINARY)),
    *((PUBLISHED, GRAD_ECLIP), (PUBLISHED_77, GRAD_ECLIP)),
)


class Steps:
    """A model, its optimiser and the pairs of its batches; random weights."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.loaded = load_clip(model, "random")
        self.clip = self.loaded.require_clip("trained").train()
        self.pairs, self.source = read_pairs(5)
        self.optimizer = adamw(self.clip.named_parameters())

    def variants(self, size: int, phrases: int) -> dict[str, Callable[[], None]]:
        """A step of each kind on the same batch."""
        clip, pairs = self.clip, take(self.pairs, size)
        batch = make_batch(self.loaded, pairs, phrases)
        captions = self.loaded.tokenizer([pair.captions[0] for pair in pairs])
        texts = [PROMPT.format(text) for pair in pairs for text in pair.phrases[:phrases]]
        every = self.loaded.tokenizer(texts) if texts else batch.distinct
        ours = GlobalLocal(GradEclip(create_graph=True))
        model: Any = clip.model
        losses: dict[str, Callable[[], Tensor]] = {
            OPEN_CLIP: lambda: ClipLoss()(*model(batch.images, captions)[:3]),
            ORDINARY: lambda: GlobalOnly()(clip, batch).total,
            GRAD_ECLIP: lambda: ours(clip, batch).total,
            PUBLISHED: lambda: published(clip, batch, None),
            PUBLISHED_77: lambda: published(clip, batch, every),
        }
        return {name: partial(self._run, loss, name) for name, loss in losses.items()}

    def _run(self, loss: Callable[[], Tensor], name: str) -> None:
        self.optimizer.zero_grad()
        torch.autograd.backward(loss())
        if name != OPEN_CLIP:  # what our trainer does before the optimiser: look, clip
            norm = nn.utils.clip_grad_norm_(self.clip.parameters(), 1.0)
            if not bool(norm.isfinite()):
                raise RuntimeError(f"the gradient norm is {norm}; nothing was measured")
        self.optimizer.step()
        with torch.no_grad():
            self.clip.log_scale.clamp_(0.0, MAX_LOG_SCALE)

    def notes(self, size: int, phrases: int, rounds: int) -> list[str]:
        """What a reader must know."""
        batch = make_batch(self.loaded, take(self.pairs, size), phrases)
        return [
            f"Batch of {size}, {len(batch.phrase)} phrases ({len(batch.distinct)} distinct); "
            f"{self.source}; random weights, fp32.",
            f"CPU seconds of the process; medians over {rounds} rounds in turns after a warm-up.",
            "Ours includes the trainer's look at the gradient norm and clipping, open_clip's not.",
        ]


def step(
    *,
    model: str = "ViT-B-16",
    batch_size: int = 8,
    phrases: int = 3,
    rounds: int = 7,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Forward, backward and optimiser of one batch: open_clip's way, and ours in four ways."""
    steps = Steps(model, threads)
    rows = in_turns(steps.variants(batch_size, phrases), rounds).rows(RATIOS)
    publish(f"step, {model}, cpu", rows, steps.notes(batch_size, phrases, rounds), out, threads)


def scaling(
    *,
    model: str = "ViT-B-16",
    phrases: tuple[int, ...] = (0, 1, 3, 5, 10),
    batches: tuple[int, ...] = (4, 16),
    rounds: int = 7,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """The Grad-ECLIP step against phrases per caption at batch 8, and against the batch."""
    steps = Steps(model, threads)
    points = {f"{count} phrases": (8, count) for count in phrases}
    points |= {f"batch {size}, 3 phrases": (size, 3) for size in batches}
    variants = {name: steps.variants(*point)[GRAD_ECLIP] for name, point in points.items()}
    turns, base = in_turns(variants, rounds), "1 phrases"
    rows: Rows = {
        name: {
            "seconds": turns.median(name),
            "per image": turns.median(name) / size,
            "against 1 phrase": turns.ratio(name, base),
            "rounds": turns.spread(name, base),
        }
        for name, (size, _) in points.items()
    }
    notes = steps.notes(8, max(phrases), rounds)
    publish(f"scaling, {model}, cpu", rows, notes, out, threads)


def memory(
    *,
    model: str = "ViT-B-16",
    batch_size: int = 8,
    phrases: int = 3,
    repeats: int = 3,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Most memory that two steps take, each variant in a process of its own."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(repeats):
        for name in NAMES:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                job = pool.submit(peak, model, name, batch_size, phrases, threads)
                found[name].append(job.result())
    middle = {name: statistics.median(values) for name, values in found.items()}
    rows: Rows = {
        name: {
            "peak GiB": value,
            "against open_clip": value / middle[OPEN_CLIP],
            "processes": ", ".join(f"{each:.2f}" for each in found[name]),
        }
        for name, value in middle.items()
    }
    notes = [f"Batch of {batch_size}, {phrases} phrases per caption; median of the processes."]
    publish(f"memory, {model}, cpu", rows, notes, out, threads)


def peak(model: str, name: str, size: int, phrases: int, threads: int) -> float:
    """GiB; runs in a process that does nothing else."""
    run = Steps(model, threads).variants(size, phrases)[name]
    for _ in range(2):  # the second one has the optimiser's state
        run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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
