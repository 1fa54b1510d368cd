"""`report`: runs to one page with table, heat maps and curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from jaxtyping import Float, UInt8
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from gradeclip_ft.commands.config import conf_dir, options
from gradeclip_ft.commands.runs import WEIGHTS, read_config, read_environment
from gradeclip_ft.data import coco
from gradeclip_ft.explain.base import Explainer
from gradeclip_ft.explain.driver import Explained, explain_pictures
from gradeclip_ft.images import read_image
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.report.content import Box, Case, Chart, Point, Row, Table
from gradeclip_ft.report.figures import enlarge
from gradeclip_ft.results.collect import Entry, collect
from gradeclip_ft.results.record import Json, versions
from gradeclip_ft.results.table import differences
from gradeclip_ft.text.prompts import phrase_prompt

if TYPE_CHECKING:
    from gradeclip_ft.data.captions import CaptionShards
    from gradeclip_ft.explain.base import Explainer
    from gradeclip_ft.models.clip import LoadedClip
    from gradeclip_ft.report.content import Case, Table


UNTOUCHED = "Untouched"
# What `results.collect` calls a run's heat maps, and how people call them.
NAMES = {
    "ordinary": "Ordinary",
    "uniform": "Uniform map",
    "grad_eclip": "Grad-ECLIP",
    "grad_cam": "Grad-CAM",
    "maskclip": "MaskCLIP",
}
# What two runs may differ in and still answer the same question.
OWN = ("name", "objective", "evaluation", "evaluator", "logger", "resume", "runs_dir")


@dataclass(frozen=True)
class Finished:
    """A run as it lies on disk.

    Attributes:
        label: What the page calls it.
        folder: Of the run.
        config: As it was composed.
        environment: Command line, commit, versions, facts about the data.
        results: Evaluations by step, without the weights before training.
        lines: Of `metrics.jsonl`.
    """

    label: str
    folder: Path
    config: DictConfig
    environment: Mapping[str, Any]
    results: Mapping[int, Entry]
    lines: Sequence[Mapping[str, Any]]

    @property
    def end(self) -> Entry:
        """Its last evaluation."""
        return self.results[max(self.results)]


@dataclass(frozen=True)
class Comparison:
    """Runs from the same start, and the start itself where it was evaluated.

    Attributes:
        explainer: Name in conf/explainer of the maps to show; None for that of the last run.
    """

    runs: Sequence[Finished]
    start: Entry | None
    explainer: str | None = None

    @property
    def methods(self) -> list[str]:
        """Names of the columns."""
        return [UNTOUCHED, *(run.label for run in self.runs)]

    @property
    def finals(self) -> dict[str, Entry | None]:
        """Last evaluation by method."""
        return {
            UNTOUCHED: self.start,
            **{run.label: run.end for run in self.runs},
        }


def read_runs(folders: Sequence[Path]) -> Comparison:
    """Runs that started from the same weights.

    Raises:
        FileNotFoundError: A folder is no run, or was not evaluated behind its last step.
        ValueError: The runs started from different weights.
    """
    configs = [read_config(folder) for folder in folders]
    starts: dict[Json, Entry] = {}
    by_run: list[dict[int, Entry]] = []
    for folder in folders:
        entries = collect([str(folder)], steps="all")
        starts |= {weights_hash(entry): entry for entry in entries if entry.step == 0}
        by_run.append({entry.step: entry for entry in entries if entry.step})
        if not by_run[-1]:
            raise FileNotFoundError(
                f"{folder} has no evaluation behind step 0; finish it with resume=auto, or "
                f"evaluate run={folder.name}"
            )
    if len(starts) > 1:
        raise ValueError(
            f"{', '.join(map(str, folders))} started from {len(starts)} different weights; a "
            "report compares runs from one start"
        )
    runs = [
        Finished(label, folder, config, read_environment(folder), results, _lines(folder))
        for label, folder, config, results in zip(
            _labels(folders, by_run), folders, configs, by_run, strict=True
        )
    ]
    return Comparison(runs, next(iter(starts.values()), None))


def same_settings(comparison: Comparison) -> bool:
    """Whether the runs differ in their objective alone: same data, steps, seed and optimiser.

    A run that stopped early counts as different.
    """
    plain = [OmegaConf.to_container(run.config, resolve=True) for run in comparison.runs]
    kept = [
        {key: value for key, value in config.items() if key not in OWN}
        for config in plain
        if isinstance(config, dict)
    ]
    ends = {run.end.step for run in comparison.runs}
    return len(ends) == 1 and all(config == kept[0] for config in kept)


def weights_hash(entry: Entry) -> Json:
    """Hash of the weights behind an evaluation."""
    return next(iter(entry.results.values())).weights.get("hash")


def _labels(folders: Sequence[Path], by_run: Sequence[Mapping[int, Entry]]) -> list[str]:
    """Kinds of heat maps; with the run's name where two runs are of one kind."""
    kinds = [str(next(iter(entries.values())).facts.get("map")) for entries in by_run]
    names = [NAMES.get(kind, kind) for kind in kinds]
    return [
        name if names.count(name) == 1 else f"{name} ({folder.name})"
        for name, folder in zip(names, folders, strict=True)
    ]


def _lines(folder: Path) -> Sequence[Mapping[str, Any]]:
    from gradeclip_ft.training.loggers import JSONL, read_lines

    return read_lines(folder / JSONL) if (folder / JSONL).is_file() else []


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
SETTINGS = {
    "model": "model.name",
    "seed": "seed",
    "steps": "trainer.max_steps",
    "images per step and process": "data.batch_size",
    "learning rate": "optim.optimizer.lr",
    "weight decay": "optim.optimizer.weight_decay",
    "warm-up steps": "optim.schedule.warmup",
    "precision": "trainer.precision",
    "weight of the local loss": "objective.local_weight",
    "local loss": "objective.alignment.kind",
    "phrases per caption, at most": "data.max_phrases",
    "phrase prompt": "data.prompt",
}


def results_table(comparison: Comparison) -> Table:
    """Known metrics as rows, start and runs as columns."""
    finals = {label: entry for label, entry in comparison.finals.items() if entry is not None}
    evaluators = list(dict.fromkeys(name for entry in finals.values() for name in entry.results))
    rows = [
        Row(
            label,
            {method: _metric(entry, name, metric) for method, entry in finals.items()},
            _note(finals, name, metric),
        )
        for name in evaluators
        for metric, label in METRICS.items()
        if any(_metric(entry, name, metric) is not None for entry in finals.values())
    ]
    caption = "Per cent. Small numbers are points above or below the untouched model."
    marks = differences(list(finals.values()))
    for label, mark in zip(finals, marks, strict=True):
        if mark:
            caption += f" Not comparable: {label}, {'; '.join(mark)}."
    labels = [run.label for run in comparison.runs]
    return Table("Results", rows, caption, (labels[0], labels[-1]) if labels[1:] else None)


def charts(comparison: Comparison) -> list[Chart]:
    """Losses as they were logged; accuracy of boxes at the steps where it was measured."""
    logged = {"Global loss (nats)": "global", "Local loss": "local"}
    found = [
        Chart(title, {run.label: _logged(run, key) for run in comparison.runs})
        for title, key in logged.items()
    ]
    measured = {run.label: _measured(run, comparison.start, BOXES) for run in comparison.runs}
    found.append(Chart(METRICS[BOXES], measured, percent=True, markers=True))
    return [chart for chart in found if any(chart.series.values())]


def environment_facts(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Settings of every run, and versions."""
    found = {f"{run.label}: {run.folder.name}": _facts_of(run) for run in comparison.runs}
    last = comparison.runs[-1].environment.get("versions") or versions()
    return {**found, "Versions": {name: str(version) for name, version in last.items()}}


def as_text(table: Table, methods: Sequence[str]) -> str:
    """The results table for a terminal."""
    low, high = table.contrast or ("", "")
    header = ["per cent", *methods, *([f"{high} - {low}"] if table.contrast else [])]
    lines = [header]
    for row in table.rows:
        values = [row.values.get(method) for method in methods]
        cells = ["" if value is None else f"{100 * value:.1f}" for value in values]
        lines.append([row.label, *cells, *([_contrast(row, low, high)] if table.contrast else [])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
        for cells in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _contrast(row: Row, low: str, high: str) -> str:
    before, after = row.values.get(low), row.values.get(high)
    return "" if before is None or after is None else f"{100 * (after - before):+.1f}"


def _metric(entry: Entry, evaluator: str, metric: str) -> float | None:
    result = entry.results.get(evaluator)
    return None if result is None else result.metrics.get(metric)


def _note(finals: Mapping[str, Entry], evaluator: str, metric: str) -> str:
    """How many classes compete; of which evaluator, where several measure the same."""
    result = next(e.results[evaluator] for e in finals.values() if evaluator in e.results)
    measured_by = {
        name
        for entry in finals.values()
        for name, each in entry.results.items()
        if metric in each.metrics
    }
    classes = result.protocol.get("classes")
    notes = [f"{classes} classes"] if classes and metric.endswith("top1") else []
    return ", ".join([*notes, *([evaluator] if len(measured_by) > 1 else [])])


def _logged(run: Finished, key: str) -> list[Point]:
    return [
        (float(line["step"]), float(line[key])) for line in run.lines if line.get(key) is not None
    ]


def _measured(run: Finished, start: Entry | None, metric: str) -> list[Point]:
    """Of the first evaluator that has the metric."""
    entries = [*([start] if start else []), *(run.results[step] for step in sorted(run.results))]
    points: list[Point] = []
    for entry in entries:
        values = [_metric(entry, name, metric) for name in sorted(entry.results)]
        points += [(float(entry.step), float(v)) for v in values if v is not None][:1]
    return points


def _facts_of(run: Finished) -> dict[str, str]:
    chosen = {name: OmegaConf.select(run.config, key) for name, key in SETTINGS.items()}
    data = run.environment.get("data") or {}
    found = {
        **chosen,
        "tagger": data.get("tagger"),
        "step of the weights": run.end.step,
        "weights": weights_hash(run.end),
        "commit": run.environment.get("commit"),
        "command": run.environment.get("command"),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


SHAPES = Path("data/shapes")
STILL = 3  # pictures in the still figure
GRAD_ECLIP = "gradeclip_ft.explain.grad_eclip.GradEclip"
UNIFORM = ".Uniform"  # the same weight everywhere shows nothing
WHAT = {
    "untouched": "Untouched is the model before training.",
    "ordinary": (
        "Ordinary is fine-tuned with the contrastive loss of whole images and captions alone."
    ),
    "mapped": (
        "{} is fine-tuned with the contrastive loss and a local one: each phrase of a caption is "
        "tied to the part of the image that its heat map points at."
    ),
    "same": "Data, steps, seed and optimiser are the same.",
    "boxes": "No box and no mask was used in training.",
    "differ": "The runs differ in more than the loss: see the settings below.",
}


def report(
    *runs: str,
    out: str | None = None,
    scenes: int = 6,
    picture: str | None = None,
    explainer: str | None = None,
    images: Path = SHAPES / "images_val",
    captions: Path = SHAPES / "annotations/captions_val.json",
    instances: Path = SHAPES / "annotations/instances_val.json",
) -> None:
    """Write one page that shows what fine-tuning did: table, heat maps before and after, curves.

    RUNS are folders such as runs/demo that started from the same weights. The last lines printed
    are the table and the path of the page, a single file that needs no network.

    out=runs/demo/report.html   default: report.html in the folder of the last run
    scenes=6                    pictures: the first whose caption names at least two true objects
    picture=docs/maps.png       also a still picture of the maps
    explainer=maskclip          whose maps to show, see `list explainers`; default: the last run's
    images= captions= instances=  COCO files to take pictures from; default: the shapes world
    """
    folders = [Path(run) for run in runs]
    if not folders:
        raise ValueError("no run given; write report runs/NAME, or several to compare")
    if scenes < 0:
        raise ValueError(f"scenes={scenes}; give a number of pictures, 0 for none")
    comparison = replace(read_runs(folders), explainer=explainer)
    table = results_table(comparison)
    cases: Sequence[Case] = ()
    if scenes or picture:
        cases = _cases(comparison, (images, captions, instances), max(scenes, STILL))
    path = _write_page(comparison, table, cases[:scenes], Path(out or folders[-1] / "report.html"))
    print(as_text(table, comparison.methods))
    if picture is not None:
        from gradeclip_ft.report.figures import draw_still

        print(draw_still(cases, comparison.methods, Path(picture)))
    print(path)


def _write_page(comparison: Comparison, table: Table, cases: Sequence[Case], path: Path) -> Path:
    from gradeclip_ft.report.content import Page
    from gradeclip_ft.report.page import render

    facts = environment_facts(comparison)
    if cases:
        named = map_settings(comparison)
        facts["Heat maps"] = {key.strip("_"): str(value) for key, value in named.items()}
    page = Page(
        title=f"{comparison.runs[0].config.model.name} before and after fine-tuning",
        intro=introduction(comparison),
        methods=comparison.methods,
        kind="Model",
        tables=[table],
        charts=charts(comparison),
        cases=cases,
        facts=facts,
    )
    return render(page, path)


def introduction(comparison: Comparison) -> str:
    """What the columns are, and whether the runs differ in the objective alone."""
    parts = [WHAT["untouched"]]
    for run in comparison.runs:
        ordinary = OmegaConf.select(run.config, "objective.explainer") is None
        parts.append(WHAT["ordinary"] if ordinary else WHAT["mapped"].format(run.label))
    if len(comparison.runs) > 1:
        parts.append(WHAT["same" if same_settings(comparison) else "differ"])
    return " ".join(dict.fromkeys([*parts, WHAT["boxes"]]))


def _cases(comparison: Comparison, files: tuple[Path, Path, Path], count: int) -> list[Case]:
    """Pictures with the maps of the start and of every run, all by the same explainer."""
    from gradeclip_ft.commands.build import build_data, make
    from gradeclip_ft.text.phrases import Phrases, load_tagger, prepare_tagger

    models = dict(_models(comparison))
    last = comparison.runs[-1]
    source = cast("CaptionShards", build_data(last.config, models[UNTOUCHED]))
    tagger = (last.environment.get("data") or {}).get("tagger") or prepare_tagger(source.tagger)
    parse = Phrases(load_tagger(tagger), source.max_phrases)
    scenes = find_scenes(*files, parse, count)
    explainer: Explainer = make(map_settings(comparison))
    maps = {
        method: explain_scenes(loaded, explainer, scenes, source.prompt)
        for method, loaded in models.items()
    }
    return [
        to_case(scene, {method: maps[method][k] for method in comparison.methods})
        for k, scene in enumerate(scenes)
    ]


def _models(comparison: Comparison) -> Iterator[tuple[str, LoadedClip]]:
    """Start and fine-tuned weights by method."""
    from gradeclip_ft.commands.build import build_clip

    first: DictConfig = comparison.runs[0].config
    yield UNTOUCHED, build_clip(first)
    for run in comparison.runs:
        weights = OmegaConf.merge(run.config, {"init_from": str(run.folder / WEIGHTS)})
        assert isinstance(weights, DictConfig)
        loaded = build_clip(weights)
        if loaded.weights_hash != weights_hash(run.end):
            raise ValueError(
                f"{run.folder / WEIGHTS} is not what was evaluated at step {run.end.step}, so maps "
                f"and numbers would not belong together; finish the run with resume=auto, or "
                f"evaluate run={run.folder.name} again=true"
            )
        yield run.label, loaded


def map_settings(comparison: Comparison) -> dict[str, Any]:
    """The explainer asked for, else that of the last run with maps, else Grad-ECLIP's defaults."""
    if comparison.explainer is not None:
        if comparison.explainer not in options("explainer"):
            known = ", ".join(options("explainer"))
            raise ValueError(f"explainer={comparison.explainer}: there is {known}")
        chosen = OmegaConf.load(conf_dir() / "explainer" / f"{comparison.explainer}.yaml")
        return cast("dict[str, Any]", OmegaConf.to_container(chosen, resolve=True))
    for run in reversed(comparison.runs):
        node = OmegaConf.select(run.config, "objective.explainer")
        if node is not None and not node["_target_"].endswith(UNIFORM):
            settings = OmegaConf.to_container(node, resolve=True)
            assert isinstance(settings, dict)
            return {str(key): value for key, value in settings.items()}
    return {"_target_": GRAD_ECLIP}


LONGEST = 512  # pixels of a shown picture
LEAST = 2  # phrases with a true box
MAP = "map"  # a report shows one explainer


@dataclass(frozen=True)
class Scene:
    """A picture with phrases of its first caption that name annotated things, and their boxes.

    Attributes:
        image: Pixels to show.
        caption: First caption.
        phrases: In the order of the caption.
        boxes: All true places of each phrase, xyxy in [0, 1] of the picture.
    """

    image: UInt8[np.ndarray, "H W 3"]
    caption: str
    phrases: tuple[str, ...]
    boxes: tuple[tuple[Box, ...], ...]


def find_scenes(
    images: Path, captions: Path, instances: Path, parse: Callable[[str], list[str]], count: int
) -> list[Scene]:
    """The first pictures whose caption names at least two annotated things.

    Args:
        images: Folder of the pictures.
        captions: COCO captions file.
        instances: COCO instances file of the same pictures.
        parse: Caption to phrases.
        count: Pictures at most.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No picture qualifies.
    """
    categories, annotated = coco.read_regions(instances)
    names = [category.name for category in categories]
    pictures = {picture.id: picture for picture in annotated}
    found: list[Scene] = []
    for entry in coco.read_captions(captions):
        if len(found) == count:
            break
        if entry.captions and entry.id in pictures:
            caption = entry.captions[0]
            named = _named(parse(caption), pictures[entry.id], names)
            if len(named) >= LEAST:
                image = _to_show(read_image(images / entry.file_name, exif=False))
                found.append(Scene(image, caption, tuple(named), tuple(named.values())))
    if not found:
        raise ValueError(
            f"no caption of {captions} names {LEAST} things of {instances}; give files that belong "
            "together"
        )
    return found


def boxes_of(phrase: str, picture: coco.CocoImage, names: Sequence[str]) -> tuple[Box, ...]:
    """Boxes of all regions whose class name stands in the phrase as whole words."""
    size = (picture.width, picture.height)
    return tuple(
        _relative(region.box, size)
        for region in picture.regions
        if re.search(rf"\b{re.escape(names[region.label].lower())}s?\b", phrase.lower())
    )


def explain_scenes(
    loaded: LoadedClip, explainer: Explainer, scenes: Sequence[Scene], prompt: str
) -> list[Explained]:
    """Heat maps and scores of one model; the pictures are squashed to its size."""
    height, width = loaded.image_size
    transform = loaded.transform()
    pixels = [transform(Image.fromarray(one.image).resize((width, height))) for one in scenes]
    texts = [[phrase_prompt(prompt, phrase) for phrase in scene.phrases] for scene in scenes]
    targets = [loaded.encode_texts(some) for some in texts]
    return explain_pictures(loaded, pixels, targets, {MAP: explainer})


def to_case(scene: Scene, found: Mapping[str, Explained]) -> Case:
    """The scene for the page, with each method's heat inside the true boxes in numbers."""
    heat = {method: one.heat[MAP].numpy() for method, one in found.items()}
    inside = {
        method: [
            f"{100 * inside_share(each, boxes):.0f} %"
            for each, boxes in zip(maps, scene.boxes, strict=True)
        ]
        for method, maps in heat.items()
    }
    scores = {
        method: [f"{score:.2f}".replace("-", "−") for score in one.score.tolist()]
        for method, one in found.items()
    }
    return Case(
        image=scene.image,
        phrases=scene.phrases,
        heat=heat,
        caption=scene.caption,
        boxes=scene.boxes,
        values={"in the box": inside, "cosine": scores},
    )


def inside_share(heat: Float[np.ndarray, "h w"], boxes: Sequence[Box], side: int = 128) -> float:
    """Share of the positive heat that lies in any of the boxes; 0 where there is no heat.

    Args:
        heat: On the patch grid; it is enlarged as for the page.
        boxes: xyxy in [0, 1].
        side: Pixels of the raster on which it is counted.
    """
    fine = enlarge(np.maximum(heat, 0.0), (side, side))
    centres = (np.arange(side) + 0.5) / side
    mask = np.zeros((side, side), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        rows, columns = (centres >= y0) & (centres < y1), (centres >= x0) & (centres < x1)
        mask |= rows[:, None] & columns[None, :]
    total = float(fine.sum())
    return float(fine[mask].sum()) / total if total > 0 else 0.0


def _named(
    phrases: Sequence[str], picture: coco.CocoImage, names: Sequence[str]
) -> dict[str, tuple[Box, ...]]:
    boxes = {phrase: boxes_of(phrase, picture, names) for phrase in phrases}
    return {phrase: places for phrase, places in boxes.items() if places}


def _relative(box: tuple[float, float, float, float], size: tuple[int, int]) -> Box:
    """From xywh in pixels to xyxy in [0, 1]."""
    x, y, width, height = box
    return x / size[0], y / size[1], (x + width) / size[0], (y + height) / size[1]


def _to_show(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels at a size that keeps the page small."""
    if max(picture.size) > LONGEST:
        picture = picture.copy()
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    return np.asarray(picture)
