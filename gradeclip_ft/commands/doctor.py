"""`doctor`: could this run start here?"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands import runs
from gradeclip_ft.commands.config import is_meant

if TYPE_CHECKING:
    from gradeclip_ft.data.captions import CaptionData
    from gradeclip_ft.models.clip import LoadedClip

OK, NOTE, PROBLEM = "ok", "note", "problem"
Finding = tuple[str, str]  # one of these, and a text


def doctor(cfg: DictConfig) -> int:
    """Say whether a run could start here, without starting it.

    Takes the overrides of `train`, and asks what `train` asks: versions, name, device, trainer,
    schedule, model, disk space, tagger, training data (one small batch is read) and evaluation
    data. Nothing is written, no data are made and no weights are fetched, but files of weights are
    read; a missing tagger is fetched, as `train` would. The exit code is 1 if there is a problem.

    python -m gradeclip_ft doctor                           the shapes world
    python -m gradeclip_ft doctor +exp=cc3m_vitb16            an experiment
    """
    from gradeclip_ft.commands.build import UNSET
    from gradeclip_ft.training.trainer import silence_libraries

    silence_libraries()
    problems: list[str] = []
    checks = (packages, run_folder, device, length, evaluation_data, trainer, model, tagger)
    for check in (*checks, training_data):
        if cfg.trainer.max_steps == UNSET and check in NEED_LENGTH:
            continue  # the data cannot be read, which `length` has said
        for kind, text in _findings(check, cfg):
            if kind == PROBLEM and any(told.endswith(text) for told in problems):
                continue  # the evaluator, whose data are those of training, has said it
            problems += [text] if kind == PROBLEM else []
            print(f"{kind:<9}{check.__name__.replace('_', ' '):<17}{text}")
    counted = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    print(counted if problems else "this run could start")
    return 1 if problems else 0


def packages(cfg: DictConfig) -> Iterator[Finding]:
    """Installed versions against the ones that this package asks for."""
    from packaging.requirements import Requirement

    shown = []
    for line in requires("gradeclip_ft") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            yield PROBLEM, f"{wanted.name} is not installed; pip install '{wanted}'"
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            yield PROBLEM, f"{wanted.name} is {found}; pip install '{wanted}'"
        shown.append(f"{wanted.name} {found}")
    yield OK, ", ".join(shown)
    import torchvision

    yield OK, f"torchvision {torchvision.__version__} loads with this torch"


def length(cfg: DictConfig) -> Iterator[Finding]:
    """Steps of the run."""
    from gradeclip_ft.commands.build import settle

    settle(cfg)
    yield OK, f"{cfg.trainer.max_steps} steps"


def run_folder(cfg: DictConfig) -> Iterator[Finding]:
    """Whether the name is free, or the run can be continued, and whether one can write there."""
    folder = runs.run_dir(cfg.name, cfg.runs_dir)
    yield OK, f"{folder}: the run {runs.would_begin_or_continue(folder, cfg, resume=cfg.resume)}"
    above = _existing(folder)
    if not os.access(above, os.W_OK):
        yield PROBLEM, f"{above} is not writable; choose another runs_dir="


def device(cfg: DictConfig) -> Iterator[Finding]:
    """Accelerator, number of devices, and cores for the loader's workers."""
    import torch

    wanted, count = str(cfg.trainer.accelerator), _devices(cfg)
    found = torch.cuda.device_count()
    if wanted != "gpu":
        yield OK, f"{wanted}, {count} process{'es' if count > 1 else ''}"
    elif found >= count:  # else the trainer refuses
        names = {torch.cuda.get_device_name(place) for place in range(count)}
        yield OK, f"{count} of {found} GPUs: {', '.join(sorted(names))}"
    cores, workers = os.cpu_count() or 1, count * int(cfg.data.get("workers", 0))
    yield NOTE if workers > cores else OK, f"{workers} loader workers, {cores} cores"


def evaluation_data(cfg: DictConfig) -> Iterator[Finding]:
    """Files of the evaluators, and the one whose best weights are kept."""
    from gradeclip_ft.commands.build import build_evaluators, require_evaluators
    from gradeclip_ft.evaluators.base import prepare

    require_evaluators(cfg)
    for key, evaluator in build_evaluators(cfg).items():
        if OmegaConf.select(cfg, f"evaluator.{key}.data.make") is not None:
            yield OK, f"{key}: its data are made when training starts"
            continue
        try:
            prepare(evaluator)
        except Exception as error:
            yield PROBLEM, f"{key}: {_words(error)}"
        else:
            yield OK, f"{key}: its data are there"


def trainer(cfg: DictConfig) -> Iterator[Finding]:
    """Whether Lightning takes the settings on this machine, and the schedule fits the steps."""
    from gradeclip_ft.commands.build import make, require_schedule

    make(cfg.trainer, "trainer")(runs.run_dir(cfg.name, cfg.runs_dir), [], [])
    require_schedule(cfg)
    yield OK, f"{cfg.trainer.max_steps} steps, precision {cfg.trainer.precision}"


def model(cfg: DictConfig) -> Iterator[Finding]:
    """Structure of the model, its weights where they are here, what trains it, and disk space."""
    from gradeclip_ft.commands.build import UNSET, build_clip, build_module, make, require_model
    from gradeclip_ft.models.clip import image_sentence, text_sentence
    from gradeclip_ft.models.load import check_activation
    from gradeclip_ft.training.checkpoints import require_room

    require_model(cfg)
    weights = str(cfg.model.weights)
    here = cfg.init_from is not None or Path(weights).suffix or Path(weights).exists()
    published = cfg.model.weights is not None and not here
    if published and weights != "random":
        check_activation(str(cfg.model.name), weights)
        yield NOTE, f"weights {weights}; published ones are fetched at the first use"
    loaded = structure(cfg.model) if published else build_clip(cfg)
    yield OK, f"image tower: {image_sentence(loaded)}"
    yield OK, f"text tower: {text_sentence(loaded)}"
    objective = make(cfg.objective, "objective")
    module = build_module(cfg, loaded, objective, source=None)
    if cfg.trainer.max_steps != UNSET:
        module.configure_optimizers()
    size = sum(parameter.numel() for parameter in loaded.clip.parameters())
    height, width = loaded.image_size
    yield OK, f"{loaded.name}, {size / 1e6:.1f} M parameters, {height} x {width} pixels"
    if cfg.init_from is not None:
        yield OK, f"weights from {runs.resolve_weights(cfg.init_from, cfg.runs_dir)}"
    yield OK, require_room(runs.run_dir(cfg.name, cfg.runs_dir), module, cfg.trainer)


def tagger(cfg: DictConfig) -> Iterator[Finding]:
    """Which tagger finds the phrases."""
    if not cfg.data.get("max_phrases", 1) or "boxes" in cfg.data:
        yield OK, "none needed: there are no phrases"
        return
    from gradeclip_ft.text.phrases import prepare_tagger

    asked = cfg.data.get("tagger", "auto")
    used = prepare_tagger(asked)
    if asked == "auto" and used != "nltk":
        yield NOTE, f"{used}; NLTK's data cannot be had, see the warning above"
    else:
        yield OK, used


def training_data(cfg: DictConfig) -> Iterator[Finding]:
    """Photos or shards, and one small batch of them; or boxes and their images."""
    from gradeclip_ft.commands.build import build_data
    from gradeclip_ft.data.captions import CaptionTrainData
    from gradeclip_ft.data.detection import DetectionTrainData
    from gradeclip_ft.data.photos import PhotoTrainData

    source = build_data(cfg, structure(cfg.model))
    if isinstance(source, DetectionTrainData):
        if source.boxes.make is not None:
            yield OK, f"{source.boxes.annotations} is made when training starts"
        else:
            yield OK, f"{source.boxes.annotations}: {source.prepare()['counts']}"
        return
    world = _devices(cfg) * int(cfg.trainer.num_nodes)
    if isinstance(source, PhotoTrainData):
        facts = source.prepare()
        few: CaptionData = replace(source, workers=0, batch_size=2)
        yield (
            OK,
            (
                f"{facts['photos']} photos, {facts['held_out']} more held out, "
                f"{source.batches(world)} steps of {source.batch_size * world} an epoch"
            ),
        )
        yield _one_batch(few)
        return
    assert isinstance(source, CaptionTrainData)
    try:
        urls = source.urls()
    except FileNotFoundError:
        if source.make is None:
            raise
        made = Path(str(cfg.data.make.folder))
        if not Path(str(cfg.data.shards)).is_relative_to(made):
            yield PROBLEM, f"{cfg.data.shards} is not in {made}, where data.make makes shards"
            return
        yield OK, f"{cfg.data.shards} is made when training starts"
        return
    steps = len(source.loader(seed=0, epoch=0, rank=0, world_size=world))
    yield OK, f"{len(urls)} shards, {steps} steps of {source.batch_size * world} an epoch"
    few = replace(source, workers=0, batch_size=2, shuffle=0, samples_per_epoch=2, resampled=True)
    yield _one_batch(few)


def _one_batch(few: CaptionData) -> Finding:
    """What the first samples are, with their phrases."""
    batch = next(iter(few.loader(seed=0, epoch=0, rank=0, world_size=1)))
    phrases = f"{len(batch.phrase)} phrases" if few.max_phrases else "no phrases wanted"
    skipped = f", skipped {dict(batch.skipped)}" if batch.skipped else ""
    return OK, f"read {' and '.join(batch.keys)}: {phrases}{skipped}"


@cache
def structure(settings: DictConfig) -> LoadedClip:
    """The model with random weights; its tokenizer and transform are the real ones."""
    from gradeclip_ft.commands.build import build_clip

    logging.disable(logging.WARNING)  # that weights are random is not news here
    try:
        return build_clip(OmegaConf.create({"model": {**settings, "weights": "random"}}))
    finally:
        logging.disable(logging.NOTSET)


NEED_LENGTH = (evaluation_data, trainer, training_data)


def _findings(
    check: Callable[[DictConfig], Iterator[Finding]], cfg: DictConfig
) -> Iterator[Finding]:
    """Findings of a check; the error that ends it is the last one, whatever it is."""
    try:
        yield from check(cfg)
    except Exception as error:
        yield PROBLEM, _words(error)


def _words(error: Exception) -> str:
    return f"{'' if is_meant(error) else f'{type(error).__name__}: '}{error}"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _devices(cfg: DictConfig) -> int:
    """Processes on this machine."""
    devices = cfg.trainer.devices
    return int(devices) if str(devices).isdigit() else 1
