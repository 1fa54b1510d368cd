"""`report`: runs to one page with table, heat maps and curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from gradeclip_ft.commands.build import build_clip, build_data, make
from gradeclip_ft.commands.config import option_path, options, suggest
from gradeclip_ft.commands.runs import WEIGHTS, read_config, read_environment
from gradeclip_ft.data import coco
from gradeclip_ft.data.captions import CaptionData
from gradeclip_ft.data.detection import DetectionTrainData
from gradeclip_ft.data.order import LoaderWorker
from gradeclip_ft.data.photos import PhotoTrainData
from gradeclip_ft.data.samples import image_of, read_caption, read_record, sample_name
from gradeclip_ft.data.shards import BadSampleError, Skips
from gradeclip_ft.explain.base import Explainer
from gradeclip_ft.explain.driver import explain_pictures
from gradeclip_ft.images import read_image
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.report.content import Box, Case, Chart, Page, Point
from gradeclip_ft.report.figures import draw_still, enlarge
from gradeclip_ft.report.page import write_page
from gradeclip_ft.results.collect import ORDINARY, Entry, collect
from gradeclip_ft.results.record import Json, Result, unit_of, versions
from gradeclip_ft.results.table import Row, Table, differences, measured_on, render
from gradeclip_ft.text.phrases import PhraseFinder, load_tagger, prepare_tagger
from gradeclip_ft.text.prompts import phrase_prompt
from gradeclip_ft.training.run_files import METRICS_JSONL, read_lines

UNTOUCHED = "Untouched"
# Heat maps as `results.collect` calls them, and as people do.
NAMES = {
    ORDINARY: "Ordinary",
    "uniform": "Uniform map",
    "grad_eclip": "Grad-ECLIP",
    "grad_cam": "Grad-CAM",
    "maskclip": "MaskCLIP",
    "game": "GAME",
}
# What two runs may differ in and still answer the same question.
OWN = ("name", "objective", "evaluation", "evaluator", "logger", "resume", "runs_dir")
BOXES = "boxes/top1"
METRICS = {
    BOXES: "Boxes, top-1",
    "boxes/top5": "Boxes, top-5",
    "thing_masks/top1": "Masks of things, top-1",
    "thing_masks/top5": "Masks of things, top-5",
    "stuff_masks/top1": "Masks of stuff, top-1",
    "stuff_masks/top5": "Masks of stuff, top-5",
    "image_retrieval_recall@1": "Text to image, R@1",
    "text_retrieval_recall@1": "Image to text, R@1",
}
LABEL = "per cent"
CURVES = (BOXES, "image_retrieval_recall@1", "text_retrieval_recall@1")
# Keys of a run's configuration that the page lists.
SETTINGS = (
    *("model.name", "model.weights", "seed", "trainer.max_steps", "trainer.precision"),
    *("data.batch_size", "data.max_phrases", "data.prompt", "optim.optimizer.lr"),
    *("optim.optimizer.weight_decay", "optim.schedule.warmup"),
    *("objective.local_weight", "objective.alignment.kind"),
)
WORLD = Path("data/shapes")
SHAPES = (
    WORLD / "images_val",
    WORLD / "annotations/captions_val.json",
    WORLD / "annotations/instances_val.json",
)
STILL = 3  # pictures in the still figure
GRAD_ECLIP = "gradeclip_ft.explain.grad_eclip.GradEclip"
UNIFORM = ".Uniform"  # the same weight everywhere shows nothing
LONGEST = 512  # pixels of a shown picture
LEAST = 2  # phrases, with a true box where boxes are known
LOOKED_AT = 1000  # samples


@dataclass(frozen=True)
class Finished:
    """A run as it is on disk."""

    label: str  # on the page
    folder: Path
    config: DictConfig
    environment: Mapping[str, Any]
    results: Mapping[int, Entry]  # by step, without the weights before training
    lines: Sequence[Mapping[str, Any]]  # of metrics.jsonl

    @property
    def end(self) -> Entry:
        """Its last evaluation."""
        return self.results[max(self.results)]


@dataclass(frozen=True)
class Comparison:
    """Runs from the same start, and the start itself where it was evaluated."""

    runs: Sequence[Finished]
    start: Entry | None

    @property
    def methods(self) -> list[str]:
        """Names of the columns."""
        return [UNTOUCHED, *(run.label for run in self.runs)]

    @property
    def finals(self) -> dict[str, Entry]:
        """Last evaluation by method."""
        start = {UNTOUCHED: self.start} if self.start else {}
        return start | {run.label: run.end for run in self.runs}

    @property
    def contrast(self) -> tuple[str, str] | None:
        """First and last run, where there are several: the table shows their difference."""
        return (self.runs[0].label, self.runs[-1].label) if len(self.runs) > 1 else None


def report(
    *runs: str,
    out: str | None = None,
    scenes: int = 6,
    picture: str | None = None,
    explainer: str | None = None,
    images: Path | None = None,
    captions: Path | None = None,
    instances: Path | None = None,
) -> None:
    """Write one page that shows what fine-tuning did: table, heat maps before and after, curves.

    RUNS are folders such as runs/demo that started from the same weights. The last lines printed
    are the table and the path of the page, a single file that needs no network.

    out=runs/demo/report.html   default: report.html in the folder of the last run
    scenes=6                    pictures: the first whose caption names at least two things
    picture=docs/maps.png       also a still picture of the maps
    explainer=maskclip          whose maps to show, see `list explainers`; default: the last run's
    images= captions= instances=  COCO files to take pictures with boxes from; default: for runs on
                                the shapes world its own, for others photos of the last run's data
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise ValueError("no run given; write report runs/NAME, or several to compare")
    if scenes < 0:
        raise ValueError(f"scenes={scenes}; give a number of pictures, 0 for none")
    comparison = read_runs(folders)
    table = results_table(comparison)
    facts = environment_facts(comparison)
    cases: Sequence[Case] = ()
    if scenes or picture:
        settings = map_settings(comparison, explainer)
        files = (images, captions, instances) if images and captions and instances else None
        cases = _cases(comparison, make(settings, "explainer"), files, max(scenes, STILL))
        facts["Heat maps"] = {key.strip("_"): str(value) for key, value in settings.items()}
    page = Page(
        title=f"{Path(comparison.runs[0].config.model.name).name} before and after fine-tuning",
        intro=introduction(comparison),
        methods=comparison.methods,
        kind="Model",
        table=table,
        contrast=comparison.contrast,
        charts=charts(comparison),
        cases=cases[:scenes],
        facts=facts,
    )
    path = write_page(page, Path(out or folders[-1] / "report.html"))
    print(render(table), end="")
    if picture is not None:
        print(draw_still(cases, comparison.methods, Path(picture)))
    print(path)


def read_runs(folders: Sequence[Path]) -> Comparison:
    """Runs that started from the same weights.

    Raises:
        FileNotFoundError: A folder is not a run, or was not evaluated after its last step.
        ValueError: The runs started from different weights.
    """
    starts: dict[Json, Entry] = {}
    runs: list[Finished] = []
    for folder in folders:
        config = read_config(folder)
        entries = collect([str(folder)], steps="all")
        starts |= {weights_hash(entry): entry for entry in entries if entry.step == 0}
        tuned = [entry for entry in entries if entry.facts.get("alpha", 1.0) == 1.0]
        results = {entry.step: entry for entry in tuned if entry.step}
        if not results:
            raise FileNotFoundError(
                f"{folder} has no evaluation after step 0; finish it with resume=auto, or "
                f"evaluate run={folder.name}"
            )
        kind = str(next(iter(results.values())).facts.get("map"))
        log = folder / METRICS_JSONL
        lines = read_lines(log) if log.is_file() else []
        environment = read_environment(folder)
        label = " + ".join(
            [NAMES.get(kind, kind), *(OmegaConf.select(config, "objective.terms") or {})]
        )
        runs.append(Finished(label, folder, config, environment, results, lines))
    if len(starts) > 1:
        raise ValueError(
            f"{', '.join(map(str, folders))} started from {len(starts)} different weights; a "
            "report compares runs from one start"
        )
    labels = [run.label for run in runs]
    runs = [
        replace(run, label=f"{run.label} ({run.folder.name})")
        if labels.count(run.label) > 1
        else run
        for run in runs
    ]
    return Comparison(runs, next(iter(starts.values()), None))


def same_settings(comparison: Comparison) -> bool:
    """Whether the runs differ in their objective alone; one that stopped early is different."""
    kept = [
        {key: OmegaConf.select(run.config, str(key)) for key in run.config if key not in OWN}
        for run in comparison.runs
    ]
    ends = {run.end.step for run in comparison.runs}
    return len(ends) == 1 and all(config == kept[0] for config in kept)


def weights_hash(entry: Entry) -> Json:
    """Hash of the weights that were evaluated."""
    return next(iter(entry.results.values())).weights.get("hash")


def introduction(comparison: Comparison) -> str:
    """What the columns are, and whether the runs differ in the objective alone."""
    parts = ["Untouched is the model before training."]
    first = comparison.runs[0].config
    if first.model.get("weights") == "random" and first.get("init_from") is None:
        parts.append("Its weights are random: it has learned nothing.")
    for run in comparison.runs:
        text = f"{run.label} is fine-tuned with the contrastive loss of whole images and captions"
        if OmegaConf.select(run.config, "objective.explainer") is not None:
            text += (
                " and a local one: each phrase of a caption is aligned with the part of the image "
                "that its heat map marks"
            )
        if terms := list(OmegaConf.select(run.config, "objective.terms") or {}):
            text += f", and further terms: {', '.join(terms)}"
        parts.append(f"{text}.")
    if len(comparison.runs) > 1:
        parts.append(
            "Data, steps, seed and optimiser are the same."
            if same_settings(comparison)
            else "The runs differ in more than the loss: see the settings below."
        )
    return " ".join([*parts, "No box and no mask was used in training."])


def results_table(comparison: Comparison) -> Table:
    """Main metrics of every evaluator as rows, or all fractions of one that has none of these.

    Start, runs, and the contrast are columns.
    """
    finals, contrast = comparison.finals, comparison.contrast
    by_evaluator: dict[str, list[Result]] = {}
    for entry in finals.values():
        for name, result in entry.results.items():
            by_evaluator.setdefault(name, []).append(result)
    measured = {name: {m for r in all_ for m in r.metrics} for name, all_ in by_evaluator.items()}
    difference = [" - ".join(reversed(contrast))] if contrast else []
    rows: list[Row] = []
    for name, results in by_evaluator.items():
        classes = results[0].protocol.get("classes")
        values = {m: [result.metrics.get(m) for result in results] for m in sorted(measured[name])}
        own = [metric for metric, found in values.items() if unit_of(metric, *found) == "%"]
        for metric in [metric for metric in METRICS if metric in measured[name]] or own:
            notes = [f"{classes} classes"] if classes and metric.endswith("top1") else []
            notes += (
                [name]
                if metric not in METRICS or sum(metric in each for each in measured.values()) > 1
                else []
            )
            row: Row = {
                LABEL: METRICS.get(metric, metric),
                "metric": metric,
                "note": ", ".join(notes),
            }
            row |= {at: _metric(one, name, metric) for at, one in finals.items()}
            low, high = (row.get(method) for method in contrast or ("", ""))
            if isinstance(low, float) and isinstance(high, float):
                row[difference[0]] = f"{100 * (high - low):+.1f}"  # points
            rows.append(row)
    marks = zip(finals, differences(list(finals.values())), strict=True)
    return Table(
        facts=(LABEL,),
        metrics=(*comparison.methods, *difference),
        rows=tuple(rows),
        notes=tuple(f"Not comparable: {label}, {mark}." for label, mark in marks if mark),
        sources=(
            "Per cent. Small numbers are points above or below the untouched model.",
            *measured_on(list(finals.values())),
        ),
    )


def charts(comparison: Comparison) -> list[Chart]:
    """Losses as they were logged; boxes and retrieval at the steps where they were measured."""
    found = [
        Chart(
            title,
            {
                run.label: [
                    (float(a["step"]), float(a[key])) for a in run.lines if a.get(key) is not None
                ]
                for run in comparison.runs
            },
        )
        for title, key in (("Global loss (nats)", "global"), ("Local loss", "local"))
    ]
    start = [comparison.start] if comparison.start else []
    for metric in CURVES:
        measured: dict[str, list[Point]] = {}
        for run in comparison.runs:
            measured[run.label] = []
            for entry in [*start, *(run.results[step] for step in sorted(run.results))]:
                values = [_metric(entry, name, metric) for name in sorted(entry.results)]
                points = [(float(entry.step), value) for value in values if value is not None]
                measured[run.label] += points[:1]  # of the first evaluator that has it
        found.append(Chart(METRICS[metric], measured, percent=True, markers=True))
    return [chart for chart in found if any(chart.series.values())]


def environment_facts(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Settings of every run, and versions."""
    facts = {}
    for run in comparison.runs:
        found = {key: OmegaConf.select(run.config, key) for key in SETTINGS} | {
            "tagger": (run.environment.get("data") or {}).get("tagger"),
            "step of the weights": run.end.step,
            "weights": weights_hash(run.end),
            "commit": run.environment.get("commit"),
            "command": run.environment.get("command"),
        }
        known = {name: str(value) for name, value in found.items() if value is not None}
        facts[f"{run.label}: {run.folder.name}"] = known
    last = comparison.runs[-1].environment.get("versions") or versions()
    return {**facts, "Versions": {name: str(version) for name, version in last.items()}}


def _metric(entry: Entry, evaluator: str, metric: str) -> float | None:
    result = entry.results.get(evaluator)
    value = None if result is None else result.metrics.get(metric)
    return None if value is None else float(value)


def _cases(
    comparison: Comparison,
    explainer: Explainer,
    files: tuple[Path, Path, Path] | None,
    count: int,
) -> list[Case]:
    """Pictures with the maps of the start and of every run, all by the same explainer."""
    start = build_clip(comparison.runs[0].config)
    last = comparison.runs[-1]
    source = build_data(last.config, start)
    if isinstance(source, DetectionTrainData):
        raise ValueError(
            f"{last.folder} trained a detector, and the page shows fine-tuning; give the run that "
            "init_from= named, and see the detector's boxes with `detect`"
        )
    tagger = (last.environment.get("data") or {}).get("tagger") or prepare_tagger(source.tagger)
    parse = PhraseFinder(load_tagger(tagger), source.max_phrases)
    if files is None and OmegaConf.select(last.config, "data.make") is not None:
        files = SHAPES
    cases = find_cases(*files, parse, count) if files else own_cases(source, parse, count)
    cases = add_maps(cases, UNTOUCHED, start, explainer, source.prompt)
    for run in comparison.runs:
        weights = run.folder / WEIGHTS
        config = OmegaConf.merge(run.config, {"init_from": str(weights)})
        assert isinstance(config, DictConfig)
        loaded = build_clip(config)
        if loaded.weights_hash != weights_hash(run.end):
            raise ValueError(
                f"{weights} is not what was evaluated at step {run.end.step}, so maps and numbers "
                f"would not belong together; finish the run with resume=auto, or "
                f"evaluate run={run.folder.name} again=true"
            )
        cases = add_maps(cases, run.label, loaded, explainer, source.prompt)
    return cases


def map_settings(comparison: Comparison, explainer: str | None) -> dict[str, Any]:
    """The explainer asked for, else that of the last run with maps, else Grad-ECLIP's defaults."""
    node: Any = {"_target_": GRAD_ECLIP}
    if explainer is not None:
        if explainer not in options("explainer"):
            raise ValueError(f"explainer={explainer}: {suggest(explainer, options('explainer'))}")
        node = OmegaConf.load(option_path("explainer", explainer))
    else:
        for run in comparison.runs:
            own = OmegaConf.select(run.config, "objective.explainer")
            if own is not None and not own["_target_"].endswith(UNIFORM):
                node = own
    settings: Any = OmegaConf.to_container(OmegaConf.create(node), resolve=True)
    return dict(settings)


def find_cases(
    images: Path, captions: Path, instances: Path, parse: Callable[[str], list[str]], count: int
) -> list[Case]:
    """The first pictures whose first caption names at least two annotated things, without maps.

    Raises:
        ValueError: No picture qualifies.
    """
    categories, annotated = coco.read_regions(instances)
    names = [category.name for category in categories]
    pictures = {picture.id: picture for picture in annotated}
    found: list[Case] = []
    for entry in coco.read_captions(captions):
        if len(found) == count:
            break
        if entry.captions and entry.id in pictures:
            caption = entry.captions[0]
            boxes = {text: named_boxes(text, pictures[entry.id], names) for text in parse(caption)}
            boxes = {phrase: places for phrase, places in boxes.items() if places}
            if len(boxes) >= LEAST:
                image = read_image(images / entry.file_name, exif=False)
                image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)  # a small page
                pixels = np.asarray(image)
                found.append(Case(pixels, [*boxes], {}, caption, boxes=[*boxes.values()]))
    if not found:
        raise ValueError(
            f"no caption of {captions} names {LEAST} things of {instances}; give files that belong "
            "together"
        )
    return found


def own_cases(source: CaptionData, parse: Callable[[str], list[str]], count: int) -> list[Case]:
    """The first of a run's own pictures whose first caption has two phrases, without boxes.

    Photos are those held out of training, where there are some.

    Raises:
        ValueError: None of 1,000 has.
    """
    samples, skips = source.samples(world_size=1), Skips()
    if isinstance(source, PhotoTrainData):
        samples = source.held_out_samples()
    raws = samples(LoaderWorker(0, 0, 0, 1, 0, 1), range(LOOKED_AT), skips)
    found: list[Case] = []
    for raw in islice(raws, LOOKED_AT):
        if len(found) == count:
            break
        try:
            caption = read_caption(raw, read_record(raw), "text", key=0)
            phrases = parse(caption)
            if len(phrases) >= LEAST:
                image = image_of(raw)
                image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)  # a small page
                found.append(Case(np.asarray(image), phrases, {}, caption, source=sample_name(raw)))
        except BadSampleError:
            continue  # training passes over it, too
    if not found:
        raise ValueError(
            f"no caption of {LOOKED_AT} has {LEAST} phrases; scenes=0 writes the page without "
            "pictures"
        )
    return found


def named_boxes(phrase: str, picture: coco.CocoImage, names: Sequence[str]) -> list[Box]:
    """Boxes, xyxy in [0, 1], of all regions whose class name the phrase holds as whole words."""
    boxes = []
    for region in picture.regions:
        if re.search(rf"\b{re.escape(names[region.label].lower())}s?\b", phrase.lower()):
            x, y, width, height = region.box
            x1, y1 = (x + width) / picture.width, (y + height) / picture.height
            boxes.append((x / picture.width, y / picture.height, x1, y1))
    return boxes


def add_maps(
    cases: Sequence[Case], method: str, loaded: LoadedClip, explainer: Explainer, prompt: str
) -> list[Case]:
    """The cases with the maps of one more model, and in numbers how much of them is in the boxes.

    The pictures are squashed to the model's size.
    """
    height, width = loaded.image_size
    transform = loaded.transform()
    pixels = [transform(Image.fromarray(one.image).resize((width, height))) for one in cases]
    targets = [
        loaded.encode_texts([phrase_prompt(prompt, p) for p in one.phrases]) for one in cases
    ]
    made = []
    found = explain_pictures(loaded, pixels, targets, {method: explainer})
    for case, explained in zip(cases, found, strict=True):
        heat = explained.heat[method].numpy()
        numbers = {
            "cosine": [f"{score:.2f}".replace("-", "−") for score in explained.score.tolist()]
        }
        if case.boxes:
            shares = [inside_share(*each) for each in zip(heat, case.boxes, strict=True)]
            numbers = {"in the box": [f"{100 * share:.0f} %" for share in shares], **numbers}
        values = {name: {**case.values.get(name, {}), method: n} for name, n in numbers.items()}
        made.append(replace(case, heat={**case.heat, method: heat}, values=values))
    return made


def inside_share(heat: Float[np.ndarray, "h w"], boxes: Sequence[Box], side: int = 128) -> float:
    """Share of the positive heat in any of the boxes (xyxy in [0, 1]); 0 where there is no heat."""
    fine = enlarge(np.maximum(heat, 0.0), (side, side))
    centres = (np.arange(side) + 0.5) / side
    mask = np.zeros((side, side), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        rows, columns = (centres >= y0) & (centres < y1), (centres >= x0) & (centres < x1)
        mask |= rows[:, None] & columns[None, :]
    total = float(fine.sum())
    return float(fine[mask].sum()) / total if total > 0 else 0.0
