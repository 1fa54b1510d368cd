"""Configuration to objects, in one visible order. Below this file nobody has heard of Hydra.

A name comes from yaml or from here, never from both: what exists only while running (the model, its
tokenizer and transform, the run's folder) is added here by keyword.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands.config import recorded, signature
from gradeclip_ft.commands.runs import resolve_weights

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from gradeclip_ft.evaluators.base import Evaluator
    from gradeclip_ft.models.clip import LoadedClip
    from gradeclip_ft.objectives.base import Objective
    from gradeclip_ft.training.callbacks import Evaluate
    from gradeclip_ft.training.data_module import CaptionDataModule, CaptionSource
    from gradeclip_ft.training.module import FineTuneModule


EVALUATIONS = "evaluations"


@dataclass(frozen=True)
class Training:
    """Everything a training run consists of."""

    loaded: LoadedClip
    data: CaptionDataModule
    module: FineTuneModule
    evaluate: Evaluate
    trainer: pl.Trainer


def build(cfg: DictConfig, folder: Path, *, command: str | None = None) -> Training:
    """All objects of a training run.

    Args:
        cfg: Composed from conf/train.yaml.
        folder: Of the run.
        command: Command line for the record.
    """
    import torch

    from gradeclip_ft.training.data_module import CaptionDataModule

    torch.manual_seed(cfg.seed)  # for weights that are not loaded but drawn
    loaded = build_clip(cfg)
    objective = build_objective(cfg)
    data = CaptionDataModule(build_data(cfg, loaded), seed=cfg.seed)
    module = build_module(cfg, loaded, objective)
    evaluate = build_evaluate(cfg, folder, loaded, command)
    trainer = build_trainer(cfg, folder, [evaluate])
    return Training(loaded, data, module, evaluate, trainer)


def build_clip(cfg: DictConfig) -> LoadedClip:
    """The model, from its own weights or from those of `init_from`.

    Raises:
        ValueError: It has no text tower.
    """
    start = cfg.get("init_from")
    weights = {} if start is None else {"weights": str(resolve_weights(start, cfg.runs_dir))}
    from gradeclip_ft.models.clip import LoadedClip

    loaded = make(cfg.model, **weights)
    if not isinstance(loaded, LoadedClip):
        raise ValueError(
            f"{loaded.name} is a classifier, expected a model of images and texts; `explain` alone "
            "takes classifiers"
        )
    return loaded


def build_objective(cfg: DictConfig) -> Objective:
    """Batch to loss."""
    objective: Objective = make(cfg.objective)
    return objective


def build_data(cfg: DictConfig, loaded: LoadedClip) -> CaptionSource:
    """Captioned images, tokenised and sized for the model."""
    source: CaptionSource = make(cfg.data)(
        tokenizer=loaded.tokenizer, transform=loaded.transform(train=True)
    )
    return source


def build_evaluators(cfg: DictConfig) -> dict[str, Evaluator]:
    """Evaluators by their key below `evaluator`."""
    return {str(key): make(node) for key, node in (cfg.get("evaluator") or {}).items()}


def build_module(cfg: DictConfig, loaded: LoadedClip, objective: Objective) -> FineTuneModule:
    """The training step with optimiser and schedule."""
    module: FineTuneModule = make(cfg.optim)(
        loaded.require_clip("trained"), objective, seed=cfg.seed
    )
    return module


def build_evaluate(
    cfg: DictConfig, folder: Path, loaded: LoadedClip, command: str | None
) -> Evaluate:
    """Evaluation before, during and after training."""
    from gradeclip_ft.training.callbacks import Evaluate

    return Evaluate(
        build_evaluators(cfg),
        loaded,
        folder=folder / EVALUATIONS,
        run=folder.name,
        command=command,
        **_plain(cfg.evaluation),
    )


def build_trainer(cfg: DictConfig, folder: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
    """The trainer with its loggers."""
    loggers = make(cfg.logger)(folder, recorded(cfg))
    trainer: pl.Trainer = make(cfg.trainer)(folder, loggers, callbacks)
    return trainer


def make(node: Any, **runtime: Any) -> Any:
    """Instantiate a mapping; lists and mappings inside become plain Python.

    Also of configurations that no command line was checked for, as those of a run read back.

    Raises:
        UnknownTargetError: A `_target_` anywhere in it is nothing that may be built from yaml.
    """
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    for target in _targets(plain):
        signature(str(target))
    return instantiate(node, _convert_="all", **runtime)


def _targets(node: Any) -> Iterator[Any]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    for entry in node if isinstance(node, list) else ():
        yield from _targets(entry)


def _plain(cfg: DictConfig) -> Mapping[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
