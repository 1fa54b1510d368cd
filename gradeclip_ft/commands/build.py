"""Configuration to objects, in one visible order. Below this file nobody has heard of Hydra.

A name comes from yaml or from here, never from both: what exists only while running (the model, its
tokenizer and transform, the run's folder) is added here by keyword.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands.cli import progress_bar
from gradeclip_ft.commands.config import (
    NODE_KEYS,
    ConfigurationError,
    as_written,
    check,
    check_node,
    compose,
    recorded,
    search_path,
    suggest,
)
from gradeclip_ft.commands.runs import read_config, resolve_weights

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from gradeclip_ft.data.captions import CaptionData
    from gradeclip_ft.data.detection import DetectionTrainData
    from gradeclip_ft.evaluators.base import Evaluator
    from gradeclip_ft.explain.base import Explainer
    from gradeclip_ft.models.clip import LoadedClip
    from gradeclip_ft.training.callbacks import Evaluate
    from gradeclip_ft.training.data_module import CaptionDataModule
    from gradeclip_ft.training.detector import DetectorModule
    from gradeclip_ft.training.module import FineTuneModule


EVALUATIONS = "evaluations"
UNSET = -1  # steps of a run that is counted in epochs
EPOCHS = 5  # of a run that says neither


@dataclass(frozen=True)
class Training:
    """Everything a training run consists of."""

    data: CaptionDataModule
    module: FineTuneModule | DetectorModule
    evaluate: Evaluate
    trainer: pl.Trainer
    room: str  # what it keeps on disk, in words


def build(
    cfg: DictConfig,
    folder: Path,
    *,
    command: str | None = None,
    on_prepared: Callable[[dict[str, Any]], None] = lambda facts: None,
) -> Training:
    """All objects of a training run; `on_prepared` is called with the facts that the data found."""
    import torch

    from gradeclip_ft.training.callbacks import Evaluate
    from gradeclip_ft.training.checkpoints import require_room
    from gradeclip_ft.training.data_module import CaptionDataModule

    torch.manual_seed(cfg.seed)  # for weights that are not loaded but drawn
    loaded = build_clip(cfg)
    objective = make(cfg.objective, "objective")
    source = build_data(cfg, loaded)
    data = CaptionDataModule(source, seed=cfg.seed, on_prepared=on_prepared)
    module = build_module(cfg, loaded, objective, source)
    room = require_room(folder, module, cfg.trainer)
    evaluate = Evaluate(
        build_evaluators(cfg),
        loaded,
        folder=folder / EVALUATIONS,
        run=folder.name,
        command=command,
        record=as_written(cfg),
        track=progress_bar,
        **cfg.evaluation,
    )
    loggers = make(cfg.logger, "logger")(folder, recorded(cfg))
    trainer = make(cfg.trainer, "trainer")(folder, loggers, [evaluate])
    return Training(data, module, evaluate, trainer, room)


def settle(cfg: DictConfig) -> None:
    """Write the steps of epochs, and those between evaluations, into the configuration.

    Raises:
        ConfigurationError: The steps of an epoch cannot be told.
    """
    trainer, every = cfg.trainer, cfg.evaluation.every
    if cfg.epochs is not None or trainer.max_steps == UNSET:
        if "boxes" in cfg.data or not str(trainer.devices).isdigit():
            raise ConfigurationError(
                "epochs are for captions, on trainer.devices=NUMBER; set trainer.max_steps instead"
            )
        source = make(cfg.data, "data")(tokenizer=None, transform=None)
        batches = source.batches(int(trainer.devices) * trainer.num_nodes)
        epochs = EPOCHS if cfg.epochs is None else cfg.epochs
        trainer.max_steps = max(1, int(epochs * batches / trainer.accumulate))
    if every is not None and 0 < every < 1:
        cfg.evaluation.every = max(1, round(every * trainer.max_steps))


def require(cfg: DictConfig, folder: Path) -> None:
    """Refuse, before the model is built, what would end the run later; `doctor` asks the same.

    Raises:
        ConfigurationError: Naming what to change.
        ValueError: The same, from the part that it is about.
        FileNotFoundError: No weights where `init_from` says.
    """
    require_evaluators(cfg)
    make(cfg.trainer, "trainer")(folder, [], [])
    require_schedule(cfg)
    require_model(cfg)
    require_photos(cfg)


def require_photos(cfg: DictConfig) -> None:
    """Refuse a folder in which the photos of a table are not, by about a thousand of them.

    Raises:
        FileNotFoundError: With the folder that is likely.
    """
    if not str(cfg.data.get("_target_")).endswith("photos.PhotoTrainData"):
        return
    make(cfg.data, "data")(tokenizer=None, transform=None).require_photos(1000)


def require_schedule(cfg: DictConfig) -> None:
    """Refuse a learning-rate schedule that does not fit the number of steps, on an idle parameter.

    Raises:
        ValueError: The warm-up is as long as the training.
    """
    import torch

    make(cfg.optim.schedule, "schedule")(torch.optim.SGD([torch.zeros(1)], lr=1.0))


def require_model(cfg: DictConfig) -> None:
    """Refuse a model that cannot be trained, and weights that are not there.

    Raises:
        ValueError: The model has no text tower.
        FileNotFoundError: `init_from` names no weights.
    """
    if str(cfg.model.get("_target_")).endswith(".load_classifier"):
        raise ValueError(
            f"{cfg.model.name} is a classifier, expected a model of images and texts; `explain` "
            "alone takes classifiers"
        )
    if (start := cfg.get("init_from")) is not None:
        resolve_weights(start, cfg.runs_dir)


def build_clip(cfg: DictConfig) -> LoadedClip:
    """The model, from its own weights or from those of `init_from`.

    Raises:
        ValueError: It has no text tower.
    """
    require_model(cfg)
    start = cfg.get("init_from")
    weights = {} if start is None else {"weights": str(resolve_weights(start, cfg.runs_dir))}
    loaded: LoadedClip = make(cfg.model, "model", **weights)
    return loaded


def build_run(run: str | Path, runs_dir: str | Path = "runs") -> LoadedClip:
    """The model that a run has saved: of its folder or name, or beside a file of weights in it.

    Raises:
        FileNotFoundError: There is no such run, or it has saved no weights yet.
        ValueError: Its files are damaged.
    """
    weights = resolve_weights(run, runs_dir)
    model = read_config(weights.parent).model
    return build_clip(
        OmegaConf.create({"model": model, "init_from": str(weights), "runs_dir": runs_dir})
    )


def build_data(cfg: DictConfig, loaded: LoadedClip) -> CaptionData | DetectionTrainData:
    """Captioned images, tokenised and sized for the model; for a detector, images with boxes."""
    from gradeclip_ft.detection.detector import Detector

    require_kind(cfg, isinstance(loaded.clip, Detector))
    made = make(cfg.data, "data")
    source: CaptionData | DetectionTrainData
    if isinstance(loaded.clip, Detector):
        source = made(side=loaded.clip.settings.side, mean=loaded.mean, std=loaded.std)
    else:
        # The training step normalises on its device: a worker saves an eighth of its time.
        transform = replace(loaded.transform(train=True), normalised=False)
        source = made(tokenizer=loaded.tokenizer, transform=transform)
    return source


def build_module(
    cfg: DictConfig, loaded: LoadedClip, objective: Any, source: Any
) -> FineTuneModule | DetectorModule:
    """The training step of a CLIP, or of a detector, which learns the classes of its source."""
    from gradeclip_ft.detection.detector import Detector

    made = make(cfg.optim, "optim")
    module: FineTuneModule | DetectorModule
    if isinstance(loaded.clip, Detector):
        module = made(loaded.clip, objective, lambda: source.classes(), seed=cfg.seed)
    else:
        module = made(
            *(loaded.require_clip("trained"), objective),
            seed=cfg.seed,
            preprocessing=loaded.preprocessing,
        )
    return module


def require_kind(cfg: DictConfig, detects: bool) -> None:
    """Refuse a detector with captions, and the like: all four choices are of one kind.

    Raises:
        ConfigurationError: Naming the first that is not.
    """
    for key in ("data", "objective", "optim"):
        target = str(cfg[key]["_target_"])
        if any(word in target for word in ("detection", "training.detector")) != detects:
            raise ConfigurationError(
                f"{key}: {target} is not for {'a detector' if detects else 'a CLIP'}; begin with "
                "+exp=detector_shapes or +exp=detector_ovcoco_vitb16 to train a detector"
            )


def build_evaluators(cfg: DictConfig) -> dict[str, Evaluator]:
    """Evaluators by their key below `evaluator`."""
    return {str(key): make(node, "evaluator") for key, node in (cfg.get("evaluator") or {}).items()}


def build_evaluator(name: str, settings: Sequence[str] = ()) -> Evaluator:
    """An evaluator by the name of its file in conf/evaluator.

    Args:
        name: Of the file.
        settings: As on the command line, below the evaluator's own name.

    Raises:
        ConfigurationError: There is none of that name, or no such setting.
    """
    given = [f"++evaluator.{name}.{setting}" for setting in settings]
    cfg = compose("evaluate", [f"evaluator=[{name}]", *given, *search_path()])
    check(cfg, "evaluate")
    return build_evaluators(cfg)[name]


def build_explainers(names: Sequence[str]) -> dict[str, Explainer]:
    """Methods by the names of their files in conf/explainer.

    Raises:
        ConfigurationError: There is none of a name; names the closest one.
    """
    chosen = [f"+explainer@explainer.{name}={name}" for name in names]
    cfg = compose("explain", ["images=", *chosen, *search_path()])
    return {str(name): make(node, "explainer") for name, node in cfg.explainer.items()}


def require_evaluators(cfg: DictConfig) -> None:
    """Refuse two evaluators of one name, and what `evaluation` says of one that does not run.

    Raises:
        ConfigurationError: Naming the closest one.
        ValueError: Two have one name, or a number of `evaluation` makes no sense.
    """
    from gradeclip_ft.evaluators.base import require_names
    from gradeclip_ft.training.callbacks import require_evaluation

    names = require_names(build_evaluators(cfg))
    require_evaluation(cfg.evaluation.every, cfg.evaluation.alphas)
    best = cfg.evaluation.best
    if best is None:
        return
    name, _, metric = str(best).partition("/")
    if name not in names:
        raise ConfigurationError(
            f"evaluation.best={best}: evaluator {name} does not run; {suggest(name, names)}"
        )
    if not metric:
        raise ConfigurationError(f"evaluation.best={best}: write {name}/METRIC")


def make(node: Any, key: str, **runtime: Any) -> Any:
    """Build what a node of the configuration describes.

    It is checked first, since it may come from the record of a run that somebody sent: only what
    conf/ builds under `key`, such as `model`, is built, from arguments of the right types.

    Raises:
        ConfigurationError: The check fails.
    """
    return _built(check_node(node, key, given=runtime), runtime)


def _built(node: Any, runtime: Mapping[str, Any]) -> Any:
    """Plain checked data to objects. Hydra's `instantiate` would resolve strings once more."""
    if isinstance(node, list):
        return [_built(entry, {}) for entry in node]
    if not isinstance(node, dict):
        return node
    values = {name: _built(value, {}) for name, value in node.items() if name not in NODE_KEYS}
    if "_target_" not in node:
        return values
    module, _, name = node["_target_"].rpartition(".")
    function = getattr(import_module(module), name)
    if node.get("_partial_"):
        return partial(function, **values, **runtime)
    return function(**{**values, **runtime})
