"""Cost of explanations beside the bare encoders, and beside the published loop over pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradeclip_ft.explain.base import explain_image
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip

from .clock import device_clock, in_turns
from .inputs import PROMPT, read_pairs
from .publish import Section, publish
from .published import published_heat

FEW, MANY, IMAGES = 10, 64, 8
PAIRS, PHRASES = "loop over 8 x 10 pairs", "loop over 10 phrases, for 8 images"


def explain(
    *,
    model: str = "ViT-B-16",
    rounds: int = 7,
    threads: int = 1,
    device: str = "cpu",
    out: Path | None = None,
) -> None:
    """Grad-ECLIP on one image and on eight, beside encode_image, encode_text and a pair loop."""
    torch.set_num_threads(threads)
    loaded = load_clip(model, "random")
    loaded.clip.to(device)
    pairs, source = read_pairs(5)
    texts = list(dict.fromkeys(PROMPT.format(text) for pair in pairs for text in pair.phrases))
    pixels = loaded.pixels([pair.image for pair in pairs[:IMAGES]])
    few, many = texts[:FEW], texts[:MANY]
    variants: dict[str, Callable[[], object]] = {
        "encode_image, 1 image": lambda: _encode(loaded, pixels[:1], None),
        "encoders, 1 image, 10 phrases": partial(_encode, loaded, pixels[:1], _full(loaded, few)),
        "map, 1 image, 10 embeddings": partial(_maps, loaded, pixels[:1], None, FEW),
        "maps, 1 image, 10 phrases": partial(_maps, loaded, pixels[:1], _cut(loaded, few), FEW),
        "encoders, 1 image, 64 phrases": partial(_encode, loaded, pixels[:1], _full(loaded, many)),
        "maps, 1 image, 64 phrases": partial(_maps, loaded, pixels[:1], _cut(loaded, many), MANY),
        "maps, 8 images x 10 phrases": partial(_maps, loaded, pixels, _cut(loaded, few), FEW),
        PAIRS: partial(_pairs, loaded, pixels[:1], _full(loaded, few)),
        PHRASES: partial(_published, loaded, pixels[:1], _full(loaded, few)),
    }
    turns = in_turns(variants, rounds=rounds, now=device_clock(device))
    for loop in (PAIRS, PHRASES):
        turns.seconds[loop][:] = [IMAGES * seconds for seconds in turns.seconds[loop]]
    rows: dict[str, dict[str, float | str]] = {
        name: {"seconds": turns.median(name)} for name in variants
    }
    compared = (
        ("map, 1 image, 10 embeddings", "encode_image, 1 image"),
        ("maps, 1 image, 10 phrases", "encoders, 1 image, 10 phrases"),
        ("maps, 1 image, 64 phrases", "encoders, 1 image, 64 phrases"),
        (PAIRS, "maps, 8 images x 10 phrases"),
        (PHRASES, "maps, 8 images x 10 phrases"),
    )
    rows |= turns.compared(compared)
    notes = [
        f"{source}; medians over {rounds} rounds in turns behind one of warm-up.",
        "encoders: open_clip's encode_image and encode_text, texts of 77 tokens, without a graph. "
        "maps: phrases of their own length are encoded, too.",
        "loop over pairs: both encoders, a full last block and a backward pass for every pair; "
        "loop over phrases: encoders once, a backward pass for every phrase. Both are timed on one "
        f"image and counted {IMAGES} times: every image costs the same.",
    ]
    publish(Section(f"explain, {model}, {device}", rows, notes), out, threads=threads)


def _full(loaded: LoadedClip, texts: list[str]) -> Tensor:
    return loaded.tokenizer(texts).to(loaded.clip.log_scale.device)


def _cut(loaded: LoadedClip, texts: list[str]) -> Tensor:
    return loaded.tokenizer(texts, trim=True).to(loaded.clip.log_scale.device)


@torch.no_grad()
def _encode(loaded: LoadedClip, pixels: Tensor, ids: Tensor | None) -> None:
    model: Any = loaded.clip.model
    model.encode_image(pixels)
    if ids is not None:
        model.encode_text(ids)


def _maps(loaded: LoadedClip, pixels: Tensor, ids: Tensor | None, count: int) -> Tensor:
    """Maps of every image for every phrase; without ids from embeddings at random."""
    if ids is None:
        target = torch.randn(count, 512, device=pixels.device)
    else:
        with torch.no_grad():
            target = loaded.clip.text.encode(ids)
    owner = torch.arange(len(pixels), device=pixels.device).repeat_interleave(count)
    return explain_image(GradEclip(), loaded.clip, pixels, target.repeat(len(pixels), 1), owner)


def _pairs(loaded: LoadedClip, pixels: Tensor, ids: Tensor) -> None:
    for image in pixels:
        for text in ids:
            _published(loaded, image.unsqueeze(0), text.unsqueeze(0))


def _published(loaded: LoadedClip, image: Tensor, ids: Tensor) -> Tensor:
    """The authors' way: native text, image up to the last block, then block and gradients."""
    model: Any = loaded.clip.model
    with torch.no_grad():
        target = model.encode_text(ids)
        opened = loaded.clip.image.open(image)
        tokens = opened.run(opened.tokens, 0, len(opened.layers) - 1)
    owner = torch.zeros(len(ids), dtype=torch.long, device=image.device)
    return published_heat(opened, tokens, target, owner)
