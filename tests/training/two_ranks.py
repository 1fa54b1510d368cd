"""One of two processes of `test_ddp_exact.py`, or one alone: a step of real training per case.

Every case goes through `make_trainer` and `FineTuneModule`, so through Lightning's DDP. Each
process writes the loss, the gradient of every parameter as DDP has averaged them, and its
collectives.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.game import Game
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.losses import AlignmentOptions, alignment_loss
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.objectives.base import Composed, LossTerms, Objective
from gradeclip_ft.objectives.crops import Crops
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.global_only import GlobalOnly
from gradeclip_ft.objectives.keep import Gram, Keep
from gradeclip_ft.objectives.mosaic import Mosaic, tile
from gradeclip_ft.objectives.sff import SFF
from gradeclip_ft.ops.heatmap import pool_boxes
from gradeclip_ft.training.data_module import CaptionDataModule
from gradeclip_ft.training.module import FineTuneModule
from gradeclip_ft.training.optim import adamw, warmup_cosine
from gradeclip_ft.training.trainer import make_trainer
from tests.tiny import make_tiny_clip

IMAGES, RANKS = 4, 2  # images per process
COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all", "all_to_all_single"),
    *("broadcast", "reduce_scatter", "reduce_scatter_tensor"),
)
COUNTS = ((5, 0), (3, 7), (0, 0))


@dataclass(frozen=True)
class Case:
    """What is trained: phrases per process, the loss, what is frozen, which tower."""

    counts: tuple[int, int]
    loss: str
    frozen: str = "nothing"
    family: str = "vit"

    @property
    def name(self) -> str:
        return f"{self.family}-{self.loss}-{self.frozen}-{self.counts[0]}-{self.counts[1]}"


class Unscaled:
    """An objective that never looks at the temperature."""

    def check(self, clip: Clip) -> None:
        pass

    def __call__(self, clip: Clip, batch: CaptionBatch) -> LossTerms:
        """A sum over rows, so that the mean over processes is that over the joined batch."""
        image, text = clip.image.encode(batch.images), clip.text.encode(batch.captions)
        return LossTerms((image * text).sum(-1).mean())


CLIM = Mosaic(grids=(2,), target="caption")
CASES = [
    *(Case(counts, loss) for counts in COUNTS for loss in ("rank", "all")),
    Case((3, 7), "all_contrastive"),
    Case((0, 0), "global"),
    *(Case(counts, loss, "text") for counts in COUNTS for loss in ("rank", "all")),
    Case((5, 0), "all", "temperature"),
    Case((0, 0), "unscaled"),
    *(Case(counts, "frozen_maps") for counts in COUNTS),
    Case((3, 7), "sff"),
    Case((3, 7), "drawn"),
    Case((3, 7), "clim"),
    Case((5, 0), "all", "nothing", "eva02"),
    Case((3, 7), "rank", "nothing", "eva02"),
]


def objective(case: Case) -> Objective:
    """The loss of a case; maps are differentiable."""
    if case.loss == "global":
        return GlobalOnly()
    if case.loss == "unscaled":
        return Unscaled()
    if case.loss == "clim":
        return Composed(terms={"mosaic": CLIM})
    if case.loss == "drawn":
        return Composed(terms={"crops": Crops(grids=(2,), per_image=3), "mosaic": Mosaic()})
    if case.loss == "sff":
        return SFF(GradEclip(), AlignmentOptions(negatives="all"))
    if case.loss == "frozen_maps":
        options = {"kind": "contrastive", "same_image": 0.5, "temperature": "learned"}
        alignment = AlignmentOptions(negatives="all", **options)
        terms = {"keep": Keep(text=1.0), "gram": Gram()}
        return GlobalLocal(Game(), alignment, maps_from="start", terms=terms)
    negatives, _, kind = case.loss.partition("_")
    alignment = AlignmentOptions(negatives=negatives, kind=kind or "focal")
    return GlobalLocal(GradEclip(create_graph=True), alignment)


def joined(counts: tuple[int, int]) -> CaptionBatch:
    """The batch of both processes: the first half of images and its phrases come first."""
    draw = torch.Generator().manual_seed(sum(counts) + counts[0])
    images, phrases = IMAGES * RANKS, sum(counts)
    texts = torch.randint(1, 48, (images + 4, 16), generator=draw)
    texts[:, -1] = 49
    owners = [
        torch.randint(IMAGES, (count,), generator=draw) + IMAGES * rank
        for rank, count in enumerate(counts)
    ]
    used = 4 if phrases else 0
    return CaptionBatch(
        images=torch.randn(images, 3, 32, 32, generator=draw),
        captions=texts[:images],
        distinct=texts[images : images + used, -8:],
        identity=torch.arange(11, 11 + used),
        phrase=torch.randint(4, (phrases,), generator=draw),
        owner=torch.cat(owners),
        keys=tuple(str(number) for number in range(images)),
    )


def part(batch: CaptionBatch, counts: tuple[int, int], rank: int) -> CaptionBatch:
    """What one process sees; without phrases there are no distinct ones either."""
    rows = slice(IMAGES * rank, IMAGES * (rank + 1))
    mine = slice(0, counts[0]) if rank == 0 else slice(counts[0], None)
    some = slice(None) if counts[rank] else slice(0, 0)
    return CaptionBatch(
        images=batch.images[rows],
        captions=batch.captions[rows],
        distinct=batch.distinct[some],
        identity=batch.identity[some],
        phrase=batch.phrase[mine],
        owner=batch.owner[mine] - IMAGES * rank,
        keys=batch.keys[rows],
    )


@dataclass
class OneBatch:
    """A source of one batch, the part of each process."""

    case: Case
    resampled: bool = False
    workers: int = 0
    batch_size: int = IMAGES

    def prepare(self) -> dict[str, Any]:
        return {}

    def loader(
        self, *, seed: int, epoch: int, rank: int, world_size: int, start: int = 0
    ) -> list[CaptionBatch]:
        whole = joined(self.case.counts)
        return [part(whole, self.case.counts, rank)]


class Kept(pl.Callback):
    """Keeps the gradients as the optimiser gets them, and the loss."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        for name, parameter in pl_module.clip.model.named_parameters():
            if parameter.requires_grad:
                self.kept[name] = parameter.grad.clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.kept["loss"] = outputs["loss"].detach().clone()


def module_of(case: Case) -> FineTuneModule:
    """The training step of a case; a rate of 0, so that only gradients are seen."""
    frozen = {} if case.frozen == "nothing" else {f"train_{case.frozen}": False}
    return FineTuneModule(
        make_tiny_clip(case.family),
        objective(case),
        optimizer=partial(adamw, lr=0.0),
        schedule=partial(warmup_cosine, warmup=0, steps=1),
        **frozen,
    )


def step(case: Case, folder: Path) -> dict[str, Tensor]:
    """One step of this process; the gradients after DDP, the loss before."""
    keep = Kept()
    trainer = make_trainer(
        folder / case.name, [], [keep], max_steps=1, devices=RANKS, strategy="ddp"
    )
    trainer.fit(module_of(case), datamodule=CaptionDataModule(OneBatch(case), seed=0))
    loss = keep.kept["loss"]
    torch.distributed.all_reduce(loss)
    return {**keep.kept, "loss": loss / RANKS}


def alone(case: Case) -> dict[str, Tensor]:
    """What one process computes on the joined batch, without DDP, Lightning or gathering.

    Negatives per process, and cells and canvases that each draws, have another meaning: the global
    loss of the joined batch, and the mean of the other losses of the two halves.
    """
    module, batch = module_of(case), joined(case.counts)
    clip, loss_of = module.clip.train(), module.objective
    halves = [part(batch, case.counts, rank) for rank in range(RANKS)]
    if case.loss in ("rank", "drawn"):
        loss = GlobalOnly()(clip, batch).total
        for rank, half in enumerate(halves):
            draw_as(rank)
            local = loss_of(clip, half).total - GlobalOnly()(clip, half).total
            loss = loss + local / RANKS
    elif case.loss == "clim":
        loss = GlobalOnly()(clip, batch).total + clim(clip, halves)
    else:
        loss = loss_of(clip, batch).total
    loss.backward()
    learning = [(name, p) for name, p in clip.model.named_parameters() if p.requires_grad]
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in learning}
    return {**found, "loss": loss.detach()}


def draw_as(rank: int) -> None:
    """The random numbers of the first step of a process, as the module starts them."""
    offset = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(offset * RANKS + rank)


def clim(clip: Clip, halves: list[CaptionBatch]) -> Tensor:
    """CLIM's contrast over the canvases that both processes draw."""
    rows, texts, identity = [], [], []
    for rank, half in enumerate(halves):
        draw_as(rank)
        torch.randint(1, ())
        order = torch.randperm(IMAGES)
        canvases, boxes, owner = tile(half.images, order, 2)
        cells = pool_boxes(clip.image.trace(canvases).dense(), boxes, owner)
        captions = clip.text.encode(half.captions)
        rows += [cells, clip.image.encode(half.images)]
        texts += [captions[order], captions]
        identity += [order + IMAGES * rank, torch.arange(IMAGES) + IMAGES * rank]
    return alignment_loss(
        torch.cat(rows),
        torch.cat(texts),
        identity=torch.cat(identity),
        weight=torch.ones(4 * IMAGES),
        scale=clip.log_scale.exp(),
        options=AlignmentOptions(kind="contrastive"),
    ).loss


def record_collectives() -> list[str]:
    """Name and shape of each collective from now on. DDP's own run below Python."""
    calls: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        native = getattr(torch.distributed, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            shapes = [tuple(x.shape) for x in args if isinstance(x, Tensor)]
            calls.append(f"{name} {shapes}")
            return native(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(torch.distributed, name, recorded(name))
    return calls


def main(folder: Path) -> None:
    """All cases."""
    logging.disable(logging.WARNING)
    calls = record_collectives()
    for case in CASES:
        calls.clear()
        found = {**step(case, folder), "collectives": list(calls)}
        torch.save(found, folder / f"{case.name}.{os.environ['RANK']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
