"""Our options to a `lightning.Trainer` with everything that belongs around the steps."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from gradeclip_ft.training.callbacks import Bar, MetricsRecorder, NonFiniteGuard, StopOnSignal
from gradeclip_ft.training.checkpoints import Checkpoints, OnSaveError

# Parameters stay in fp32: in bf16, with 8 bits, a weight would not move by a step of 1e-5 of it.
Precision = Literal["32-true", "16-mixed", "bf16-mixed"]


def make_trainer(
    folder: Path,
    loggers: Sequence[Logger],
    callbacks: Sequence[pl.Callback] = (),
    *,
    max_steps: int,
    stop_at: int | None = None,
    accelerator: Literal["cpu", "gpu", "auto"] = "cpu",
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: Precision = "32-true",
    gradient_clip: float | None = None,
    accumulate: int = 1,
    log_every: int | None = None,
    checkpoint_every: int | None = None,
    max_non_finite: int = 0,
    keep: int = 2,
    on_save_error: OnSaveError = "stop",
    timeout_minutes: int = 30,
    threads: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> pl.Trainer:
    """A trainer that records, checkpoints, and stops where a loss is not finite.

    Checkpoints and metrics go to `folder`, the run's; conf/trainer/cpu.yaml says what each option
    means.

    Raises:
        ValueError: A number of steps is below 1, the precision is not offered or not possible on
            the device, or Lightning cannot serve the request on this machine.
    """
    if max_steps < 1 or (stop_at is not None and stop_at < 1):
        raise ValueError(
            f"max_steps is {max_steps} and stop_at {stop_at}; training needs 1 step or more"
        )
    if precision not in get_args(Precision):
        raise ValueError(
            f"trainer.precision={precision}: choose {', '.join(get_args(Precision))}; weights stay "
            "in fp32"
        )
    if log_every is None:
        log_every = min(10, max(1, max_steps // 20))
    if checkpoint_every is None:
        checkpoint_every = min(500, max(1, max_steps // 4))
    timeout = timedelta(minutes=timeout_minutes)
    if threads is not None:
        torch.set_num_threads(threads)
    bar = sys.stdout.isatty()
    recorder = MetricsRecorder(every=log_every, lines=not bar)
    checkpoints = Checkpoints(
        folder, recorder.collect, every=checkpoint_every, keep=keep, on_error=on_save_error
    )
    guard = NonFiniteGuard(folder, checkpoints, recorder, most=max_non_finite)
    # In the order of their turns: a step is saved before it is evaluated, which may take longer
    # than a node lives.
    own = [guard, recorder, StopOnSignal(checkpoints), checkpoints]
    arguments: dict[str, Any] = {
        "max_steps": max_steps if stop_at is None else min(stop_at, max_steps),
        "accelerator": accelerator,
        "devices": devices,
        "num_nodes": num_nodes,
        "strategy": DDPStrategy(timeout=timeout) if strategy == "ddp" else strategy,
        "precision": precision,
        "gradient_clip_val": gradient_clip,
        "accumulate_grad_batches": accumulate,
        "logger": list(loggers),
        "callbacks": [*own, *([Bar(recorder)] if bar else []), *callbacks],
        "log_every_n_steps": log_every,
        "default_root_dir": folder,
        "enable_progress_bar": bar,
        # Without Lightning's own way of requeueing: the batch script does it.
        "plugins": [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [],
        "max_epochs": -1,
        "enable_checkpointing": False,  # Lightning's own
        "inference_mode": False,  # explanations need gradients, also in evaluation
        "use_distributed_sampler": False,
        "enable_model_summary": False,
    }
    if taken := sorted(arguments.keys() & (extra or {}).keys()):
        raise ValueError(f"trainer.extra holds {', '.join(taken)}, which the trainer sets itself")
    try:
        trainer = pl.Trainer(**arguments, **(extra or {}))
    except MisconfigurationException as error:
        found = torch.cuda.device_count()
        if accelerator == "gpu" and str(devices).isdigit() and found < int(devices):
            raise ValueError(
                f"{devices} GPUs wanted, {found} found; choose trainer=cpu"
                + " or gpu" * bool(found)
            ) from error
        asked = f"{accelerator=!s} {devices=!s} {strategy=!s}"
        raise ValueError(f"{asked}: {error} trainer=cpu works on every machine") from error
    _require_precision(precision, trainer)
    return trainer


def _require_precision(precision: str, trainer: pl.Trainer) -> None:
    """Refuse a number type that the device has not: Lightning takes another, or emulates it."""
    if trainer.precision != precision:
        raise ValueError(
            f"trainer.precision={precision} needs a GPU, and Lightning would take "
            f"{trainer.precision} on this device; set trainer.precision=32-true, or "
            "bf16-mixed where the processor is fast at it"
        )
    on_gpu = isinstance(trainer.accelerator, CUDAAccelerator)
    emulated = on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16-mixed" and emulated:
        raise ValueError(
            f"trainer.precision=bf16-mixed: {torch.cuda.get_device_name()} has no bf16; set "
            "trainer.precision=16-mixed"
        )


def silence_libraries() -> None:
    """Silence library warnings that users cannot act on, in the whole process."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What it says when it ends a job of which one process has died; otherwise that job ends mute.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel("INFO")
    for message in (
        "The .* does not have many workers",
        r"Found \d+ module\(s\) in eval mode",  # models are loaded so, frozen parts stay so
        r"`isinstance\(treespec, LeafSpec\)`",
        r"torch\.distributed\.nn\.functional\.all_gather is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
