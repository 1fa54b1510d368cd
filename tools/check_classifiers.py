"""Full-size classifiers and BLIP with random weights against their libraries: errors and price.

    python tools/check_classifiers.py        # about a minute; needs transformers for BLIP

Prints Markdown; docs/towers.md holds what it printed. Errors are relative, |ours - library's| over
|library's|; times are ratios measured in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import timm
import torch
import transformers
from torch import Tensor

from gradeclip_ft.explain.base import explain_image
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.other.blip import Blip
from gradeclip_ft.models.other.classifier import ImageModel, load_classifier

CLASSIFIERS = (
    "timm:vit_base_patch16_224",
    "timm:deit3_base_patch16_224",
    "torchvision:vit_b_16",
    "torchvision:vit_b_32",
)
ROUNDS = 5


def main() -> None:
    """Print one line per model."""
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, timm {timm.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, fp32, ", end="")
    print(f"{torch.get_num_threads()} threads, batch 2, random weights\n")
    print("| model | pixels | embedding | Grad-ECLIP of 10 targets / library forward |")
    print("|--|--|--|--|")
    for name, model, library, side in models():
        pixels = torch.randn(2, 3, side, side)
        for parameter in model.parameters():  # some start at zero, or at 1e-10
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        with torch.no_grad():
            expected = library(pixels)
            error = (model.image.encode(pixels) - expected).norm() / expected.norm()
        targets = torch.randn(10, expected.shape[1])
        print(f"| {name} | {side} | {error:.0e} | {price(model, library, pixels, targets):.2f} |")


def models() -> Iterator[tuple[str, ImageModel, Callable[[Tensor], Tensor], int]]:
    """Name, model, the library's own embedding, and side of its pictures."""
    for name in CLASSIFIERS:
        loaded = load_classifier(name, "random")
        yield name, loaded.classifier, loaded.classifier.model, loaded.image_size[0]
    config = transformers.BlipConfig(vision_config={"image_size": 384})
    blip = Blip(transformers.BlipForImageTextRetrieval(config)).eval()

    def embed(pixels: Tensor) -> Tensor:
        rows: Tensor = blip.model.vision_model(pixel_values=pixels).last_hidden_state
        embedding: Tensor = blip.model.vision_proj(rows[:, 0])
        return embedding

    yield "BLIP base", blip, embed, 384


def price(
    model: ImageModel, library: Callable[[Tensor], Tensor], pixels: Tensor, targets: Tensor
) -> float:
    """Time of an explanation over that of the library's forward pass, medians of turns."""
    owner, method = torch.arange(10) % len(pixels), GradEclip()
    ours, theirs = [], []
    for turn in range(ROUNDS + 1):
        start = time.perf_counter()
        explain_image(method, model, pixels, targets, owner)
        middle = time.perf_counter()
        with torch.no_grad():
            library(pixels)
        if turn:  # the first is a warm-up
            ours.append(middle - start)
            theirs.append(time.perf_counter() - middle)
    return statistics.median(ours) / statistics.median(theirs)


if __name__ == "__main__":
    main()
