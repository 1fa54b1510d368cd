"""A CLIP of two layers, data that depends on its position alone, and runs made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import open_clip
import pytest
import torch
from lightning.pytorch.loggers import Logger

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.objectives.base import Objective
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.training.data_module import CaptionDataModule
from gradeclip_ft.training.loggers import files
from gradeclip_ft.training.module import FineTuneModule
from gradeclip_ft.training.optim import adamw, warmup_cosine
from gradeclip_ft.training.run_files import newest_good, read_lines
from gradeclip_ft.training.trainer import make_trainer

VOCABULARY, CONTEXT, IMAGES = 40, 8, 6


def small_clip() -> Clip:
    """The same weights at every call."""
    torch.manual_seed(0)
    both = {"width": 32, "layers": 2}
    vision = {"image_size": 16, "patch_size": 8, "head_width": 16, **both}
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "heads": 2, **both}
    return Clip(open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text))


def make_batch(seed: int, skipped: int = 0) -> CaptionBatch:
    """Random images and texts; the highest token id ends a text, as in CLIP."""
    draw = torch.Generator().manual_seed(seed)
    texts = torch.randint(1, VOCABULARY - 2, (IMAGES + 4, CONTEXT), generator=draw)
    texts[:, -1] = VOCABULARY - 1
    return CaptionBatch(
        images=torch.randn(IMAGES, 3, 16, 16, generator=draw),
        captions=texts[:IMAGES],
        distinct=texts[IMAGES:],
        identity=torch.arange(4),
        phrase=torch.tensor([0, 1, 2, 3, 1]),
        owner=torch.tensor([0, 0, 1, 3, 4]),
        keys=tuple(f"{seed}-{row}" for row in range(IMAGES)),
        skipped={"broken image": skipped} if skipped else {},
    )


@dataclass
class PositionSource:
    """Batches that name their place: (seed, epoch, rank, number in the epoch)."""

    batches: int = 3
    resampled: bool = False
    workers: int = 0
    batch_size: int = IMAGES
    prepared: int = 0
    opened: list[tuple[int, int]] = field(default_factory=list)
    change: Callable[[CaptionBatch], CaptionBatch] = lambda batch: batch

    def prepare(self) -> dict[str, Any]:
        self.prepared += 1
        return {"tagger": "none"}

    def loader(
        self, *, seed: int, epoch: int, rank: int, world_size: int, start: int = 0
    ) -> PositionEpoch:
        return PositionEpoch(self, (seed, epoch, rank), start)


@dataclass
class PositionEpoch:
    """The batches of one epoch from `start` on."""

    source: PositionSource
    place: tuple[int, int, int]
    start: int

    def __len__(self) -> int:
        return self.source.batches

    def __iter__(self) -> Iterator[CaptionBatch]:
        seed, epoch, rank = self.place
        self.source.opened.append((epoch, self.start))
        for number in range(self.start, len(self)):
            place = ((seed * 100 + epoch) * 10 + rank) * 100 + number
            yield self.source.change(make_batch(place, skipped=1))


@dataclass
class SmallRun:
    """A run in a folder; `train` takes it up to a step and may be called again."""

    folder: Path
    steps: int = 8
    source: PositionSource = field(default_factory=PositionSource)

    def train(
        self,
        *,
        resume: bool = False,
        callbacks: tuple[pl.Callback, ...] = (),
        seed: int = 0,
        lr: float = 1e-3,
        clip: Clip | None = None,
        objective: Objective | None = None,
        on_prepared: Callable[[dict[str, Any]], None] = lambda facts: None,
        parts: dict[str, Any] | None = None,
        loggers: list[Logger] | None = None,
        **options: Any,
    ) -> pl.Trainer:
        module = FineTuneModule(
            clip or small_clip(),
            objective or GlobalLocal(GradEclip()),
            **{
                "optimizer": partial(adamw, lr=lr),
                "schedule": partial(warmup_cosine, warmup=2, steps=self.steps),
                "seed": seed,
                **(parts or {}),
            },
        )
        trainer = make_trainer(
            self.folder,
            loggers or files(self.folder, {}),
            callbacks,
            **{"max_steps": self.steps, "log_every": 1, **options},
        )
        data = CaptionDataModule(self.source, seed=seed, on_prepared=on_prepared)
        trainer.fit(
            module,
            datamodule=data,
            ckpt_path=newest_good(self.folder) if resume else None,
            weights_only=True,
        )
        return trainer

    @property
    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "metrics.jsonl")

    @property
    def losses(self) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.lines}


@pytest.fixture(name="small_clip")
def small_clip_fixture() -> Callable[[], Clip]:
    """A CLIP of two layers; the same weights at every call."""
    return small_clip


@pytest.fixture
def small_run(tmp_path: Path) -> Callable[..., SmallRun]:
    """Runs below the test's folder, by name."""
    return lambda name="run", **options: SmallRun(tmp_path / name, **options)
