"""Full-size towers with random weights against their libraries: errors, and the price of a trace.

    python tools/check_towers.py                    # all models and sizes; about ten minutes
    python tools/check_towers.py ViT-B-16 RN50      # some

Prints Markdown; docs/towers.md holds what it printed. Errors are relative, |ours - library's| over
|library's|; times are ratios measured in turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn

from gradeclip_ft.explain.grad_eclip import channel_weight
from gradeclip_ft.models.architecture import find_architecture, pair
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.ops.similarity import cosine

MODELS = (
    "ViT-B-16",
    "ViT-L-14",
    "EVA02-B-16",
    "EVA02-L-14-336",
    "RN50",
    "ViT-B-16-SigLIP",
    "coca_ViT-B-32",
    "PE-Core-B-16",
)
SIZED = "EVA02-B-16"
SIZES = ((224, 224), (336, 336), (480, 640), (1024, 1024))
ROUNDS = 5
WORDS = 10


def main(names: list[str]) -> None:
    """Print one line per model, then the sizes of EVA02-B-16."""
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, timm {timm.__version__}, fp32, ", end="")
    print(f"{torch.get_num_threads()} threads, batch 2, random weights\n")
    print("| model | image | text | dense | gradient | trace / library forward |")
    print("|--|--|--|--|--|--|")
    for name in names or MODELS:
        clip = Clip(find_architecture(name).build()).eval()
        pixels = torch.randn(2, 3, *pair(clip.model.visual.image_size))
        errors = [
            image_error(clip, pixels),
            text_error(clip),
            dense_error(clip, pixels),
            gradient_error(clip, pixels),
        ]
        cells = " | ".join(f"{error:.0e}" for error in errors)
        print(f"| {name} | {cells} | {price(clip, pixels):.2f} |", flush=True)
    if not names:
        print_sizes()


def print_sizes() -> None:
    """EVA02-B-16 at other sizes; at 224 against timm's own forward pass."""
    clip = Clip(find_architecture(SIZED).build()).eval()
    print(f"\n| {SIZED} at | grid | dense features | finite | error against timm |")
    print("|--|--|--|--|--|")
    for height, width in SIZES:
        pixels = torch.randn(1, 3, height, width)
        with torch.no_grad():
            trace = clip.image.trace(pixels)
        dense = trace.dense()
        finite = bool(dense.isfinite().all() and trace.embedding.isfinite().all())
        native = (height, width) == pair(clip.model.visual.image_size)
        error = f"{image_error(clip, pixels):.0e}" if native else "-"
        print(f"| {height} x {width} | {trace.grid} | {tuple(dense.shape)} | {finite} | {error} |")


@torch.no_grad()
def image_error(clip: Clip, pixels: Tensor) -> float:
    """Embedding of the trace against the library's."""
    return relative(clip.image.trace(pixels).embedding, library_image(clip, pixels))


@torch.no_grad()
def text_error(clip: Clip) -> float:
    """Embedding of short texts, cut where the tower says so, against the library at full length."""
    ids = torch.full((2, clip.text.context_length), clip.text.pad)
    ids[:, : WORDS + 1] = torch.randint(5, 1000, (2, WORDS + 1))
    text = clip.model.text if hasattr(clip.model, "text") else clip.model
    ids[:, WORDS] = text.token_embedding.num_embeddings - 1  # the end of the text
    expected = text(ids) if hasattr(clip.model, "text") else clip.model.encode_text(ids)
    expected = expected[0] if isinstance(expected, tuple) else expected
    cut = ids[:, : WORDS + 1] if clip.text.cuts_exactly else ids
    return relative(clip.text.trace(cut).embedding, expected)


@torch.no_grad()
def dense_error(clip: Clip, pixels: Tensor) -> float:
    """Dense features against the library's last layer with attention forced to the identity.

    A block gets a mask that leaves the diagonal; a pool gets one token alone, twice.
    """
    trace, visual = clip.image.trace(pixels), clip.model.visual
    dense = trace.dense().flatten(1, 2)
    trunk = getattr(visual, "trunk", None)
    if hasattr(visual, "attnpool"):
        value = visual.attnpool.v_proj(trace.tokens)
        return relative(dense, visual.attnpool.c_proj(value)[:, 1:])
    pool = getattr(visual, "attn_pool", None) or getattr(trunk, "attn_pool", None)
    first = trace.tokens.shape[1] - dense.shape[1]
    if pool is not None:
        tail = visual_tail(visual)
        tokens = trace.tokens if trunk is None else trunk.norm(trace.tokens)
        found = [tail(pool(tokens[:, first + i : first + i + 1])) for i in (0, 7)]
        return relative(dense[:, [0, 7]], torch.stack(found, dim=1))
    alone = torch.full((trace.tokens.shape[1],) * 2, -torch.inf).fill_diagonal_(0.0)
    if trunk is None:
        rows = visual.transformer.resblocks[-1](trace.tokens, attn_mask=alone)
        return relative(dense, (visual.ln_post(rows) @ visual.proj)[:, first:])
    rope = getattr(trunk, "rope", None)
    extra = {} if rope is None else {"rope": rope.get_embed()}
    rows = trunk.norm(trunk.blocks[-1](trace.tokens, attn_mask=alone, **extra))
    return relative(dense, visual.head(trunk.head(trunk.fc_norm(rows)))[:, first:])


def visual_tail(visual: Any) -> Callable[[Tensor], Tensor]:
    """What the library does behind an attention pool."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        return lambda pooled: visual.ln_post(pooled)[:, 0] @ visual.proj
    return lambda pooled: visual.head(trunk.head(trunk.fc_norm(pooled)))


def gradient_error(clip: Clip, pixels: Tensor) -> float:
    """Channel weight (eq. 15, the model's own heads) against one full backward pass."""
    with recorded_attention() as outputs:
        embedding = library_image(clip, pixels)
    target = nn.functional.normalize(torch.randn_like(embedding), dim=1)
    (gradient,) = torch.autograd.grad(cosine(embedding, target).sum(), outputs[-1])
    trace = clip.image.trace(pixels).detach()
    weight = channel_weight(trace, target, torch.arange(len(pixels)), heads="all")
    return relative(weight, gradient[:, :, 0].flatten(1))


@torch.no_grad()
def price(clip: Clip, pixels: Tensor) -> float:
    """Time of a trace over that of the library's forward pass, medians of turns."""

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    ours, theirs = [], []
    for turn in range(ROUNDS + 1):
        one = seconds(lambda: clip.image.trace(pixels).embedding)
        other = seconds(lambda: library_image(clip, pixels))
        if turn:  # the first is a warm-up
            ours.append(one)
            theirs.append(other)
    return statistics.median(ours) / statistics.median(theirs)


def library_image(clip: Clip, pixels: Tensor) -> Tensor:
    """The library's own embedding."""
    result = clip.model.visual(pixels)
    embedding: Tensor = result[0] if isinstance(result, tuple) else result
    return embedding


@contextmanager
def recorded_attention() -> Iterator[list[Tensor]]:
    """Outputs (B, A, N, c) of every attention that torch computes meanwhile."""
    outputs: list[Tensor] = []
    native = nn.functional.scaled_dot_product_attention

    def record(*args: Any, **kwargs: Any) -> Tensor:
        outputs.append(native(*args, **kwargs))
        return outputs[-1]

    nn.functional.scaled_dot_product_attention = record
    try:
        yield outputs
    finally:
        nn.functional.scaled_dot_product_attention = native


def relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|."""
    return float((got - expected).norm() / expected.norm())


if __name__ == "__main__":
    main(sys.argv[1:])
