"""One of two gloo processes of `test_contrastive.py`; rank 0 writes the largest error of each case.

The gradient that DDP would apply is the mean over processes of every process's own gradient; it is
compared with that of one process on the joined batch.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradeclip_ft.losses import AlignmentOptions, alignment_loss, contrastive_loss

WIDTH = 8
COUNTS = [(5, 0), (3, 7), (0, 0)]


def alone(call: object) -> object:
    """Run as if there were one process."""
    import gradeclip_ft.losses as alignment
    import gradeclip_ft.losses as contrastive

    saved = (contrastive.rank, contrastive.world_size, alignment.world_size)
    contrastive.rank = lambda: 0
    contrastive.world_size = alignment.world_size = lambda: 1
    try:
        return call()
    finally:
        contrastive.rank, contrastive.world_size, alignment.world_size = saved


def gradients(loss: Tensor, models: list[nn.Module]) -> list[Tensor]:
    """One gradient per parameter."""
    parameters = [p for model in models for p in model.parameters()]
    return [g.clone() for g in torch.autograd.grad(loss, parameters)]


def error(loss: Tensor, mine: list[Tensor], expected: tuple[Tensor, list[Tensor]]) -> float:
    """Largest difference of the averaged value and gradients, relative to the expected ones."""
    value, reference = expected
    averaged = []
    for tensor in [loss.detach().clone(), *mine]:
        dist.all_reduce(tensor)
        averaged.append(tensor / 2)
    pairs = zip(averaged, [value.detach(), *reference], strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs)


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    one, two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    models = [one, two]
    images, texts, scale = torch.randn(8, WIDTH), torch.randn(8, WIDTH), torch.tensor(9.0)
    report = {}

    part = slice(0, 4) if rank == 0 else slice(4, 8)
    loss = contrastive_loss(one(images[part]), two(texts[part]), scale)
    joined = alone(lambda: contrastive_loss(one(images), two(texts), scale))
    report["global"] = error(loss, gradients(loss, models), (joined, gradients(joined, models)))

    for counts in COUNTS:
        regions, phrases = torch.randn(sum(counts), WIDTH), torch.randn(sum(counts), WIDTH)
        identity, weight = torch.randint(0, 6, (sum(counts),)), torch.rand(sum(counts))
        part = slice(0, counts[0]) if rank == 0 else slice(counts[0], None)
        for kind in ("focal", "contrastive"):
            for reduction in ("sum", "mean") if kind == "focal" else ("mean",):
                options = AlignmentOptions(kind=kind, reduction=reduction, negatives="all")
                report[f"{counts} {kind} {reduction} all"] = compare(
                    models, (regions, phrases, identity, weight), part, scale, options
                )
        report[f"{counts} rank"] = compare_per_rank(
            models, (regions, phrases, identity, weight), counts, rank, scale
        )
    if rank == 0:
        (folder / "report.json").write_text(json.dumps(report))
    dist.barrier()


def compare(
    models: list[nn.Module], data: tuple, part: slice, scale: Tensor, options: object
) -> float:
    """Negatives of all processes: two processes equal one on the joined batch."""
    loss = local(models, data, part, scale, options)
    joined = alone(lambda: local(models, data, slice(None), scale, options))
    return error(loss, gradients(loss, models), (joined, gradients(joined, models)))


def compare_per_rank(
    models: list[nn.Module], data: tuple, counts: tuple[int, int], rank: int, scale: Tensor
) -> float:
    """Negatives per process: the mean of the two halves, each alone."""
    options = AlignmentOptions(negatives="rank")
    halves = [slice(0, counts[0]), slice(counts[0], None)]
    loss = local(models, data, halves[rank], scale, options)
    joined = alone(lambda: sum(local(models, data, rows, scale, options) for rows in halves) / 2)
    return error(loss, gradients(loss, models), (joined, gradients(joined, models)))


def local(
    models: list[nn.Module], data: tuple, rows: slice, scale: Tensor, options: object
) -> Tensor:
    """The local loss of some rows of the joined batch."""
    regions, phrases, identity, weight = (x[rows] for x in data)
    return alignment_loss(
        models[0](regions),
        models[1](phrases),
        identity=identity,
        weight=weight,
        scale=scale,
        options=options,
    ).loss


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
