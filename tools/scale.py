"""What a step moves and sees as processes grow, by formula; docs/scale.md holds what this printed.

    python -m tools.scale                                  # the paper's ViT-B/16, 1 to 256 GPUs
    python -m tools.scale model=ViT-B-32 batch=128 bandwidth=12.5

Nothing is measured here except the number of parameters. Symbols: n processes, b pairs and P = b x
`phrases` phrases per process, W trained parameters, D embedding width, fp32 everywhere.
"""

from __future__ import annotations

import sys

import open_clip

from gradeclip_ft.commands.cli import call
from gradeclip_ft.models.architecture import find_architecture

PAPER_PAIRS, PAPER_RATE, FLOAT, LONG = 128, 1e-5, 4, 8
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def scale(
    *,
    model: str = "EVA02-B-16",
    batch: int = 64,
    phrases: int = 5,
    samples: int = 2_905_954,
    workers: int = 8,
    bandwidth: float = 25.0,
) -> None:
    """Print the table.

    Args:
        model: Name in open_clip.
        batch: Pairs per process.
        phrases: Per caption.
        samples: Of the data set.
        workers: Loader processes per process.
        bandwidth: GB/s that one process can send to the next (25: 200 Gbit/s for each GPU).
    """
    clip = find_architecture(model).build()
    weights = sum(parameter.numel() for parameter in clip.parameters())
    width = int(open_clip.get_model_config(model)["embed_dim"])
    print(f"{model}: W = {weights:,} parameters, D = {width}; b = {batch}, P = {batch * phrases}\n")
    print(
        "| processes | pairs per step | negatives | steps per epoch | lr, square root | shards for "
        "resampled=false | gradients, MB | at "
        f"{bandwidth:g} GB/s, ms | embeddings, MB | phrases (negatives: all), MB | "
        "similarities (all), MB |\n" + "|--" * 11 + "|"
    )
    for n in RANKS:
        pairs = n * batch
        gradients = all_reduce(n, weights)
        cells = [
            n,
            f"{pairs:,}",
            f"{pairs - 1:,}",
            f"{samples // pairs:,}",
            f"{PAPER_RATE * (pairs / PAPER_PAIRS) ** 0.5:.1e}",
            f"{n * workers:,}",
            f"{gradients / 1e6:,.0f}",
            f"{gradients / bandwidth / 1e6:.0f}",
            f"{gathered(n, batch, width, kinds=2) / 1e6:.1f}",
            f"{every_phrase(n, batch * phrases, width) / 1e6:.1f}",
            f"{n * (batch * phrases) ** 2 * FLOAT / 1e6:,.1f}",
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


def all_reduce(n: int, weights: int) -> float:
    """Bytes that each process sends for the mean of gradients, by a ring: 2 (n - 1) / n x 4W."""
    return 2 * (n - 1) / n * FLOAT * weights


def gathered(n: int, rows: int, width: int, *, kinds: int) -> float:
    """Bytes that each process receives: (n - 1) x rows x 4D forward, and as many backward."""
    return 2 * kinds * (n - 1) * rows * width * FLOAT


def every_phrase(n: int, rows: int, width: int) -> float:
    """The same for phrases, and (n - 1) x rows x 8 bytes to know equal ones."""
    return gathered(n, rows, width, kinds=1) + (n - 1) * rows * LONG


if __name__ == "__main__":
    sys.exit(call(scale, sys.argv[1:]))
