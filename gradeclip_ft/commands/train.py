"""`train`: fine-tune a model, evaluate it before and after."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from gradeclip_ft.commands import runs
from gradeclip_ft.commands.build import build, require, settle
from gradeclip_ft.commands.cli import (
    INTERRUPTED,
    lost_contact,
    process_rank,
    require_as_started,
    started_by_us,
    stay_with_parent,
)

if TYPE_CHECKING:
    from gradeclip_ft.commands.build import Training


def train(cfg: DictConfig) -> None:
    """Fine-tune a model on captioned images, and evaluate it before and after.

    A run writes to runs_dir/name: config.yaml, environment.json, metrics.jsonl and metrics.csv,
    evaluations/, last.ckpt and weights.safetensors. Without name= it is called as its experiment.

    python -m gradeclip_ft train data=photos data.table=captions.csv data.images=photos
    python -m gradeclip_ft train +exp=shapes                   the shapes world, on any machine
    python -m gradeclip_ft train +exp=cc3m_vitb16              the paper's run; `list experiments`
    python -m gradeclip_ft train +exp=cc3m_vitb16 resume=auto  continue after an interruption
    python -m gradeclip_ft train -m +exp=shapes seed=0,1       two runs, shapes_0 and shapes_1
    """
    require_as_started(cfg)
    settle(cfg)
    folder = runs.run_dir(cfg.name, cfg.runs_dir)
    rank = process_rank()
    if rank == 0:
        runs.would_begin_or_continue(folder, cfg, resume=cfg.resume)  # the quickest answer first
    from gradeclip_ft.training.trainer import silence_libraries

    silence_libraries()
    require(cfg, folder)
    with _claimed(folder, cfg, rank) as checkpoint:
        stay_with_parent()

        def on_prepared(facts: dict[str, Any]) -> None:
            if rank == 0:
                runs.record(folder, {"data": facts})

        command = f"python -m gradeclip_ft {shlex.join(sys.argv[1:])}"
        job = build(cfg, folder, command=command, on_prepared=on_prepared)
        if rank == 0:
            print(f"{cfg.trainer.max_steps} steps; {job.room}")
        _fit(job, checkpoint, rank)
        if rank == 0:
            _finish(job, cfg, folder)


def _fit(job: Training, checkpoint: Path | None, rank: int) -> None:
    """Train; where the run ends early, say how to continue it."""
    from gradeclip_ft.data.loading import naming_killed_workers

    try:
        with naming_killed_workers():
            job.trainer.fit(
                job.module, datamodule=job.data, ckpt_path=checkpoint, weights_only=True
            )
    except SystemExit as end:  # our answer to a signal, after all is saved
        if rank == 0:
            print(f"interrupted after step {job.trainer.global_step}; continue with resume=auto")
        # Lightning ends Ctrl-C with 1, and kills the first process as soon as one that it started
        # ends with an error.
        code = INTERRUPTED if isinstance(end.__context__, KeyboardInterrupt) else end.code
        raise SystemExit(0 if started_by_us() else code) from end
    except UnpicklingError:
        raise ValueError(
            f"{checkpoint} cannot be read without executing code that it carries; it is refused. "
            "Remove it to continue from an older checkpoint, or train again"
        ) from None
    except Exception as error:
        if job.trainer.world_size > 1 and lost_contact(error):
            raise RuntimeError(
                f"process {rank} of {job.trainer.world_size} lost contact with another one of this "
                f"job at step {job.trainer.global_step + 1}: that one died, or did not answer in "
                "time; its own message, if any, is above. Start the job again with "
                f"resume=auto ({str(error).splitlines()[0]})"
            ) from error
        raise


@contextmanager
def _claimed(folder: Path, cfg: DictConfig, rank: int) -> Iterator[Path | None]:
    """The run's folder; a new one is removed again if nothing came of the run.

    What was measured, or written down about a failure, stays; `resume=auto` then starts again.
    """
    new = rank == 0 and not folder.exists()
    with runs.locked(folder) if rank == 0 else nullcontext():
        checkpoint = runs.claim(folder, cfg, resume=cfg.resume, rank=rank)  # refused: not ours
        try:
            yield checkpoint
        except BaseException:
            if new and not any((folder / name).exists() for name in runs.OUTCOMES):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _finish(job: Training, cfg: DictConfig, folder: Path) -> None:
    """Evaluate what an interruption left out, and tell the user what came out."""
    from gradeclip_ft.export.openclip import by_name
    from gradeclip_ft.results.table import metrics_table, render
    from gradeclip_ft.training.detector import DetectorModule

    step = job.trainer.global_step
    if cfg.evaluation.after and job.evaluate.evaluated != step:
        job.module.to(job.trainer.strategy.root_device)
        job.evaluate.measure(job.trainer)
    before, after = _metrics(folder, 0), _metrics(folder, step)
    if before or after:
        print(render(metrics_table({"before": before, "after": after})), end="")
    if step < cfg.trainer.max_steps:
        print(f"stopped after step {step} of {cfg.trainer.max_steps}; continue with resume=auto")
    weights, loaded = folder / runs.WEIGHTS, job.evaluate.loaded
    if isinstance(job.module, DetectorModule):
        use = "for evaluate and detect"
    elif call := by_name(loaded, weights):
        use = f"for {call}, or export run={folder.name} for its pixels and tokens too"
    else:
        use = f"for evaluate, explain and report; export run={folder.name} writes it for open_clip"
    if after and not isinstance(job.module, DetectorModule):
        use += f"; report {folder} writes a page"
    print(f"{weights}  {use}")


def _metrics(folder: Path, step: int) -> Mapping[str, float]:
    """Metrics of every evaluator at a step, by evaluator and name."""
    from gradeclip_ft.commands.build import EVALUATIONS
    from gradeclip_ft.results.record import read

    results = map(read, sorted((folder / EVALUATIONS).glob(f"*@{step}.json")))
    return {f"{r.evaluator}/{name}": value for r in results for name, value in r.metrics.items()}
