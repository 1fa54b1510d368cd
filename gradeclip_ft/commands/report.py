"""`report`: runs to one page with table, heat maps and curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands import numbers
from gradeclip_ft.commands.comparison import (
    UNTOUCHED,
    Comparison,
    read_runs,
    same_settings,
    weights_hash,
)
from gradeclip_ft.commands.compose import conf_dir, options
from gradeclip_ft.commands.runs import WEIGHTS

if TYPE_CHECKING:
    from gradeclip_ft.data.captions import CaptionShards
    from gradeclip_ft.explain.base import Explainer
    from gradeclip_ft.models.clip import LoadedClip
    from gradeclip_ft.report.content import Case, Table

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
    table = numbers.results_table(comparison)
    cases: Sequence[Case] = ()
    if scenes or picture:
        cases = _cases(comparison, (images, captions, instances), max(scenes, STILL))
    path = _write_page(comparison, table, cases[:scenes], Path(out or folders[-1] / "report.html"))
    print(numbers.as_text(table, comparison.methods))
    if picture is not None:
        from gradeclip_ft.report.still import draw_still

        print(draw_still(cases, comparison.methods, Path(picture)))
    print(path)


def _write_page(comparison: Comparison, table: Table, cases: Sequence[Case], path: Path) -> Path:
    from gradeclip_ft.report.content import Page
    from gradeclip_ft.report.page import render

    facts = numbers.facts(comparison)
    if cases:
        named = map_settings(comparison)
        facts["Heat maps"] = {key.strip("_"): str(value) for key, value in named.items()}
    page = Page(
        title=f"{comparison.runs[0].config.model.name} before and after fine-tuning",
        intro=introduction(comparison),
        methods=comparison.methods,
        kind="Model",
        tables=[table],
        charts=numbers.charts(comparison),
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
    from gradeclip_ft.commands.scenes import explain_scenes, find_scenes, to_case
    from gradeclip_ft.text.phrases import Phrases
    from gradeclip_ft.text.taggers import load_tagger, prepare_tagger

    models = dict(_models(comparison))
    last = comparison.runs[-1]
    source = cast("CaptionShards", build_data(last.config, models[UNTOUCHED]))
    tagger = (last.environment.get("data") or {}).get("tagger") or prepare_tagger(source.tagger)
    parse = Phrases(load_tagger(tagger), source.max_phrases)
    scenes = find_scenes(*files, parse, count)
    explainer: Explainer = make(map_settings(comparison))
    maps = {
        method: list(explain_scenes(loaded, explainer, scenes, source.prompt))
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
