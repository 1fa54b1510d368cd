"""Full-size towers with random weights against their libraries: errors, and the price of a trace.

    python -m tools.check_towers                    # all models and sizes; about ten minutes
    python -m tools.check_towers ViT-B-16 blip      # some

Prints Markdown; docs/towers.md holds what it printed. Errors are relative, |ours - library's| over
|library's|, and exit code 1 if one is above 1e-5; times are ratios measured in turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import timm
import torch
import transformers
from torch import Tensor, nn

from gradeclip_ft.explain.base import explain_image
from gradeclip_ft.explain.grad_eclip import GradEclip, channel_weight
from gradeclip_ft.models.architecture import find_architecture, pair
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.other.blip import Blip
from gradeclip_ft.models.other.classifier import ImageModel, load_classifier
from gradeclip_ft.ops.similarity import cosine
from tools.measure import in_turns

MODELS = (
    *("ViT-B-16", "ViT-L-14", "EVA02-B-16", "EVA02-L-14-336"),
    *("RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "PE-Core-B-16"),
)
OTHERS = (
    *("timm:vit_base_patch16_224", "timm:deit3_base_patch16_224"),
    *("torchvision:vit_b_16", "torchvision:vit_b_32", "blip"),
)
SIZED, SIZES = "EVA02-B-16", ((224, 224), (336, 336), (480, 640), (1024, 1024))
ROUNDS, WORDS, ALLOWED = 5, 10, 1e-5


def main(names: list[str]) -> int:
    """Print one line per model, then the sizes of EVA02-B-16."""
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, timm {timm.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, fp32, ", end="")
    print(f"{torch.get_num_threads()} threads, batch 2, random weights")
    chosen = names or [*MODELS, SIZED, *OTHERS]
    errors: list[float] = []
    print("\n| model | image | text | dense | gradient | trace / library forward |")
    print("|--|--|--|--|--|--|")
    for name in (name for name in dict.fromkeys(chosen) if name not in OTHERS):
        clip = Clip(find_architecture(name).build()).eval()
        pixels = torch.randn(2, 3, *pair(clip.model.visual.image_size))
        found = [error(clip, pixels) for error in ERRORS]
        errors += found
        cost = price(
            torch.no_grad()(partial(clip.image.trace, pixels)), partial(library, clip, pixels)
        )
        cells = " | ".join(f"{error:.0e}" for error in found)
        print(f"| {name} | {cells} | {cost:.2f} |", flush=True)
    print("\n| model | pixels | embedding | Grad-ECLIP of 10 targets / library forward |")
    print("|--|--|--|--|")
    for name in (name for name in chosen if name in OTHERS):
        errors.append(check_other(name))
    if not names:
        print_sizes()
    return 1 if max(errors) > ALLOWED else 0


def image_error(clip: Clip, pixels: Tensor) -> float:
    """Embedding of the trace against the library's."""
    return relative(clip.image.trace(pixels).embedding, library(clip, pixels))


def text_error(clip: Clip, pixels: Tensor) -> float:
    """Embedding of short texts, cut where the tower says so, against the library at full length."""
    ids = torch.full((2, clip.text.context_length), clip.text.pad)
    ids[:, : WORDS + 1] = torch.randint(5, 1000, (2, WORDS + 1))
    text = clip.model.text if hasattr(clip.model, "text") else clip.model
    ids[:, WORDS] = text.token_embedding.num_embeddings - 1  # the end of the text
    expected = text(ids) if hasattr(clip.model, "text") else clip.model.encode_text(ids)
    expected = expected[0] if isinstance(expected, tuple) else expected
    cut = ids[:, : WORDS + 1] if clip.text.cuts_exactly else ids
    return relative(clip.text.trace(cut).embedding, expected)


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
        tokens = trace.tokens if trunk is None else trunk.norm(trace.tokens)
        pooled = [pool(tokens[:, first + i : first + i + 1]) for i in (0, 7)]
        if trunk is None:
            found = [visual.ln_post(each)[:, 0] @ visual.proj for each in pooled]
        else:
            found = [visual.head(trunk.head(trunk.fc_norm(each))) for each in pooled]
        return relative(dense[:, [0, 7]], torch.stack(found, dim=1))
    alone = torch.full((trace.tokens.shape[1],) * 2, -torch.inf).fill_diagonal_(0.0)
    if trunk is None:
        rows = visual.transformer.resblocks[-1](trace.tokens, attn_mask=alone)
        return relative(dense, (visual.ln_post(rows) @ visual.proj)[:, first:])
    rope = getattr(trunk, "rope", None)
    extra = {} if rope is None else {"rope": rope.get_embed()}
    rows = trunk.norm(trunk.blocks[-1](trace.tokens, attn_mask=alone, **extra))
    return relative(dense, visual.head(trunk.head(trunk.fc_norm(rows)))[:, first:])


def gradient_error(clip: Clip, pixels: Tensor) -> float:
    """Channel weight (eq. 15, the model's own heads) against one full backward pass."""
    with torch.enable_grad():
        outputs: list[Tensor] = []
        native = nn.functional.scaled_dot_product_attention

        def record(*args: Any, **kwargs: Any) -> Tensor:
            outputs.append(native(*args, **kwargs))  # (B, A, N, c)
            return outputs[-1]

        with mock.patch.object(nn.functional, "scaled_dot_product_attention", record):
            embedding = library(clip, pixels)
        target = nn.functional.normalize(torch.randn_like(embedding), dim=1)
        (gradient,) = torch.autograd.grad(cosine(embedding, target).sum(), outputs[-1])
        trace = clip.image.trace(pixels).detach()
        weight = channel_weight(trace, target, torch.arange(len(pixels)), heads="all")
    return relative(weight, gradient[:, :, 0].flatten(1))


ERRORS = tuple(
    torch.no_grad()(error) for error in (image_error, text_error, dense_error, gradient_error)
)


def check_other(name: str) -> float:
    """A classifier, or BLIP: one line, and the error of its embedding against the library's own."""
    model: ImageModel
    embed: Callable[[Tensor], Tensor]
    if name == "blip":
        config = transformers.BlipConfig(vision_config={"image_size": 384})
        model, side = Blip(transformers.BlipForImageTextRetrieval(config)).eval(), 384
        parts: Any = model.model
        embed = lambda x: parts.vision_proj(parts.vision_model(x).last_hidden_state[:, 0])  # noqa: E731
    else:
        loaded = load_classifier(name, "random")
        model, side, embed = loaded.classifier, loaded.image_size[0], loaded.classifier.model
    pixels = torch.randn(2, 3, side, side)
    for parameter in model.parameters():  # some start at zero, or at 1e-10
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    with torch.no_grad():
        expected = embed(pixels)
        error = relative(model.image.encode(pixels), expected)
    targets, owner = torch.randn(10, expected.shape[1]), torch.arange(10) % len(pixels)
    maps = partial(explain_image, GradEclip(), model, pixels, targets, owner)
    print(
        f"| {name} | {side} | {error:.0e} | {price(maps, partial(embed, pixels)):.2f} |", flush=True
    )
    return error


@torch.no_grad()
def print_sizes() -> None:
    """EVA02-B-16 at other sizes: grids, and whether all is finite."""
    clip = Clip(find_architecture(SIZED).build()).eval()
    print(f"\n| {SIZED} at | grid | dense features | finite |\n|--|--|--|--|")
    for height, width in SIZES:
        trace = clip.image.trace(torch.randn(1, 3, height, width))
        dense = trace.dense()
        finite = bool(dense.isfinite().all() and trace.embedding.isfinite().all())
        print(f"| {height} x {width} | {trace.grid} | {tuple(dense.shape)} | {finite} |")


def price(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """Time of ours over that of the library's forward pass."""
    variants = {"ours": ours, "theirs": torch.no_grad()(theirs)}
    turns = in_turns(variants, ROUNDS, time.perf_counter)
    return turns.median("ours") / turns.median("theirs")


def library(clip: Clip, pixels: Tensor) -> Tensor:
    """The library's own embedding."""
    result = clip.model.visual(pixels)
    embedding: Tensor = result[0] if isinstance(result, tuple) else result
    return embedding


def relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|."""
    return float((got - expected).norm() / expected.norm())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
