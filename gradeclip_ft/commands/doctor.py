"""`doctor`: could this run start here?"""

from __future__ import annotations

import logging
import os
import shutil
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
GIGABYTE = 1e9


def doctor(cfg: DictConfig) -> int:
    """Say whether a run could start here, without starting it.

    Takes the overrides of `train`: versions, name, device, trainer, model, optimiser, disk space,
    tagger, training data (one small batch is read) and evaluation data. Nothing is written, no data
    are made and no weights are fetched; a missing tagger is fetched, as `train` would. The exit
    code is 1 if there is a problem.

    python -m gradeclip_ft doctor                           the shapes world
    python -m gradeclip_ft doctor +exp=cc3m_vitb16            an experiment
    """
    problems = 0
    checks = (packages, length, run_folder, device, evaluation_data, trainer)
    for check in (*checks, model, tagger, training_data):
        for kind, text in _findings(check, cfg):
            problems += kind == PROBLEM
            print(f"{kind:<9}{check.__name__.replace('_', ' '):<17}{text}")
    print(f"{problems} problems" if problems else "this run could start")
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
    if wanted in ("gpu", "cuda") and found < count:
        yield PROBLEM, f"{count} GPUs wanted, {found} found; choose trainer=cpu or gpu"
    elif wanted in ("gpu", "cuda"):
        names = {torch.cuda.get_device_name(place) for place in range(count)}
        yield OK, f"{count} of {found} GPUs: {', '.join(sorted(names))}"
        if str(cfg.trainer.precision).startswith("bf16") and not torch.cuda.is_bf16_supported():
            yield PROBLEM, "the GPU has no bf16; set trainer.precision=16-mixed"
    else:
        yield OK, f"{wanted}, {count} process{'es' if count > 1 else ''}"
    cores, workers = os.cpu_count() or 1, count * int(cfg.data.get("workers", 0))
    yield NOTE if workers > cores else OK, f"{workers} loader workers, {cores} cores"


def evaluation_data(cfg: DictConfig) -> Iterator[Finding]:
    """Files of the evaluators, and the one whose best weights are kept."""
    from gradeclip_ft.commands.build import build_evaluators, require_evaluator

    require_evaluator(cfg)
    for key, evaluator in build_evaluators(cfg).items():
        if OmegaConf.select(cfg, f"evaluator.{key}.data.make") is not None:
            yield OK, f"{key}: its data are made when training starts"
            continue
        try:
            evaluator.prepare()
        except Exception as error:
            yield PROBLEM, f"{key}: {_words(error)}"
        else:
            yield OK, f"{key}: its data are there"


def trainer(cfg: DictConfig) -> Iterator[Finding]:
    """Whether Lightning takes the settings on this machine."""
    from gradeclip_ft.commands.build import make

    make(cfg.trainer, "trainer")(runs.run_dir(cfg.name, cfg.runs_dir), [], [])
    yield OK, f"{cfg.trainer.max_steps} steps, precision {cfg.trainer.precision}"


def model(cfg: DictConfig) -> Iterator[Finding]:
    """Structure of the model, what trains it, and disk space; its weights are not read."""
    from gradeclip_ft.commands.build import build_module, make
    from gradeclip_ft.models.clip import image_sentence, text_sentence
    from gradeclip_ft.models.load import check_activation

    loaded = structure(cfg.model)
    yield OK, f"image tower: {image_sentence(loaded)}"
    yield OK, f"text tower: {text_sentence(loaded)}"
    objective = make(cfg.objective, "objective")
    build_module(cfg, loaded, objective, source=None).configure_optimizers()
    size = sum(parameter.numel() for parameter in loaded.clip.parameters())
    height, width = loaded.image_size
    yield OK, f"{loaded.name}, {size / 1e6:.1f} M parameters, {height} x {width} pixels"
    if cfg.init_from is not None:
        yield OK, f"weights from {runs.resolve_weights(cfg.init_from, cfg.runs_dir)}"
    elif cfg.model.weights is not None:
        weights = Path(str(cfg.model.weights))
        if weights.suffix and not weights.is_file():
            yield PROBLEM, f"no weights file {weights}; give another model.weights"
        elif not weights.suffix and str(weights) != "random":
            check_activation(str(cfg.model.name), str(weights))
            yield NOTE, f"weights {weights}; published ones are fetched at the first use"
    # Weights and two moments in fp32, twice while one file replaces the other, and the export.
    needed = size * 4 * (2 * 3 + 1)
    folder = _existing(Path(cfg.runs_dir))
    free = shutil.disk_usage(folder).free
    text = f"{needed / GIGABYTE:.1f} GB for checkpoints, {free / GIGABYTE:.1f} GB free in {folder}"
    yield OK if free > needed else PROBLEM, text


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
