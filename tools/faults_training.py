"""Faults of numbers and of the tracker, in runs of a CLIP of one layer."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import open_clip
import torch
from lightning.pytorch.loggers import Logger

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.training import loggers
from gradeclip_ft.training.callbacks import DUMP, NonFiniteError
from gradeclip_ft.training.data_module import CaptionDataModule
from gradeclip_ft.training.loggers import files, files_and_wandb, read_lines
from gradeclip_ft.training.module import FineTuneModule
from gradeclip_ft.training.optim import adamw, warmup_cosine
from gradeclip_ft.training.trainer import make_trainer
from tools.faults_data import Row, logged

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
STEPS, IMAGES = 6, 4


@dataclass
class Batches:
    """Random batches by number; some are broken."""

    broken: tuple[int, ...] = ()
    start: int = 0
    resampled: bool = False
    workers: int = 0
    batch_size: int = IMAGES

    def prepare(self) -> dict[str, Any]:
        """Nothing to do."""
        return {}

    def loader(
        self, *, seed: int, epoch: int, rank: int, world_size: int, start: int = 0
    ) -> Batches:
        """The batches from `start` on."""
        return replace(self, start=start)

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[CaptionBatch]:
        for number in range(self.start, STEPS):
            draw = torch.Generator().manual_seed(number)
            texts = torch.randint(1, 38, (IMAGES + 3, 8), generator=draw)
            texts[:, -1] = 39
            images = torch.randn(IMAGES, 3, 16, 16, generator=draw)
            images[0] += torch.nan if number in self.broken else 0.0
            yield CaptionBatch(
                images=images,
                captions=texts[:IMAGES],
                distinct=texts[IMAGES:],
                identity=torch.arange(3),
                phrase=torch.tensor([0, 1, 2]),
                owner=torch.tensor([0, 0, 2]),
                keys=tuple(f"batch{number}-{row}" for row in range(IMAGES)),
            )


class BrokenGradient(pl.Callback):
    """A finite loss with a gradient that is not."""

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At the third step."""
        gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
        if trainer.global_step == 2:
            gradient.view(-1)[0] = torch.inf


def train(
    folder: Path,
    *,
    broken: tuple[int, ...] = (),
    callbacks: tuple[pl.Callback, ...] = (),
    receivers: list[Logger] | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Six steps."""
    torch.manual_seed(0)
    module = FineTuneModule(
        Clip(open_clip.CLIP(8, VISION, TEXT)),
        GlobalLocal(GradEclip()),
        optimizer=partial(adamw, lr=1e-3),
        schedule=partial(warmup_cosine, warmup=1, steps=STEPS),
    )
    receivers = files(folder, {}) if receivers is None else receivers
    settings = {"max_steps": STEPS, "log_every": 1, "checkpoint_every": 2, **options}
    trainer = make_trainer(folder, receivers, callbacks, **settings)
    data = CaptionDataModule(Batches(broken), seed=0)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer


def rows(folder: Path) -> Iterator[Row]:
    """All of them."""
    yield _numbers(folder / "a", "a batch whose loss is NaN", broken=(2,), most=1)
    yield _numbers(
        folder / "b", "a gradient that is infinite", callbacks=(BrokenGradient(),), most=1
    )
    yield _numbers(folder / "c", "more such steps than max_non_finite", broken=(2, 3), most=1)
    yield _numbers(folder / "d", "bf16-mixed", precision="bf16-mixed", most=0)
    with mock.patch("importlib.util.find_spec", return_value=None):
        yield _tracker(folder / "e", "wandb is not installed")
    with _fake_wandb(start=ConnectionError("api_key=0123456789abcdef was refused")):
        yield _tracker(folder / "f", "wandb cannot start, and says the key")
    with _fake_wandb(log=ConnectionError("no route to host")):
        yield _tracker(folder / "g", "wandb fails in the middle")
    yield _tracker(folder / "h", "wandb offline", mode="offline")
    yield _tracker(folder / "i", "wandb's own process is killed in the middle", kill=True)


def _numbers(folder: Path, fault: str, *, most: int, **options: Any) -> Row:
    message, outcome = "", "survived"
    with logged() as lines:
        try:
            trainer = train(folder, max_non_finite=most, **options)
            state = trainer.lightning_module.state_dict()
        except NonFiniteError as error:
            message, outcome = str(error).splitlines()[0], "stopped"
            state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    message = message or next((line for line in lines if "finite" in line), "")
    finite = all(bool(value.isfinite().all()) for value in state.values())
    dumped = (folder / DUMP).exists() == bool(message)
    stops = "more such" in fault
    handled = finite and dumped and (outcome == "stopped") == stops
    lost = "none" if not message else "that step" if outcome == "survived" else "none: saved before"
    return Row(fault, outcome, lost, message.replace(str(folder), "runs/name"), handled)


def _tracker(folder: Path, fault: str, *, mode: Any = "offline", kill: bool = False) -> Row:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        receivers = files_and_wandb(folder, {}, mode=mode)
        train(folder, receivers=receivers, callbacks=(Kill(),) if kill else ())
    said = [str(entry.message) for entry in seen if "sent" in str(entry.message)]
    complete = [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [
        *range(1, STEPS + 1)
    ]
    handled = complete and len(said) <= 1 and "0123456789abcdef" not in "".join(said)
    return Row(fault, "survived", "none", said[0] if said else "", handled)


class Kill(pl.Callback):
    """Kills the processes that wandb started, after the second step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """When it is time."""
        if trainer.global_step == 2:
            for child in children(os.getpid()):
                if "wandb" in child[1]:
                    os.kill(child[0], signal.SIGKILL)


def children(parent: int) -> list[tuple[int, str]]:
    """Processes below this one, with their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
        except (OSError, ValueError):
            continue
        if above == parent:
            found += [(int(entry.name), command), *children(int(entry.name))]
    return found


def _fake_wandb(start: Exception | None = None, log: Exception | None = None) -> Any:
    """A tracker that fails in starting, or from the third step on."""
    calls = iter(range(1000))

    def fail(metrics: Mapping[str, float]) -> None:
        if log is not None and next(calls) >= 2:
            raise log

    def begin(settings: Mapping[str, Any]) -> Any:
        if start is not None:
            raise start
        return SimpleNamespace(log=fail, finish=lambda exit_code: None)

    return mock.patch.object(loggers, "_start_wandb", begin)
