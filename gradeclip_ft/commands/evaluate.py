"""`evaluate`: weights and evaluators to one JSON each."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands import runs
from gradeclip_ft.commands.build import EVALUATIONS, build_clip, build_evaluators
from gradeclip_ft.commands.cli import progress_bar
from gradeclip_ft.commands.config import as_written

if TYPE_CHECKING:
    from gradeclip_ft.results.record import Result


TABLES = (  # too long to print
    *("by_class", "most_confused", "samples"),
    *("areas", "curves", "images", "ratings", "regressions"),
)


def evaluate(cfg: DictConfig) -> None:
    """Measure a model with one or more evaluators; one JSON each, `<evaluator>@<step>.json`.

    With run= weights, model and evaluators are those of the run, and the results go to its folder
    evaluations/; evaluators named on the command line are measured instead, with the paths that the
    run has for them. Without run=, the model of model= is measured as it is, and the results go to
    evaluations/<model>. An existing result is kept, unless again=true. page=true also writes a page
    for every evaluation of methods, with curves and bars, and with pictures where it has some.

    python -m gradeclip_ft evaluate run=shapes
    python -m gradeclip_ft evaluate run=shapes evaluator=[coco_regions_224,coco_retrieval]
    python -m gradeclip_ft evaluate model=eva02_b16 evaluator=coco_regions_224 out=results/eva
    python -m gradeclip_ft evaluate -m run=a,b,c evaluator=[coco_regions_224,flickr30k_val]
    """
    import torch

    from gradeclip_ft.evaluators.base import Precision, prepare, run_all
    from gradeclip_ft.results.record import result_path
    from gradeclip_ft.training.run_files import step_of

    run, step, model = None, 0, cfg.model
    asked = OmegaConf.create(cfg.get("evaluator") or {})
    folder = Path(EVALUATIONS) / Path(str(cfg.model.name)).name
    if cfg.run is not None:
        weights = runs.resolve_weights(cfg.run, cfg.runs_dir)
        found = step_of(weights)
        if found is None:
            raise ValueError(
                f"{weights} does not say its step, so it does not belong to a run; give it as "
                "model.weights= and a folder for the results as out="
            )
        run, step, folder = weights.parent.name, found, weights.parent / EVALUATIONS
        config = runs.read_config(weights.parent)
        model = OmegaConf.merge(config.model, {"weights": str(weights)})
        asked = _of_run(cfg, OmegaConf.create(config.get("evaluator") or {}))
    folder = Path(cfg.out or folder)
    evaluators = build_evaluators(OmegaConf.create({"evaluator": asked}))
    if not evaluators:
        raise ValueError("no evaluator chosen; `list evaluators` names them, evaluator=[a,b]")
    if cfg.precision not in get_args(Precision):
        raise ValueError(f"precision={cfg.precision}: choose {', '.join(get_args(Precision))}")
    for evaluator in evaluators.values():
        prepare(evaluator)

    def tell(result: Result, fresh: bool) -> None:
        path = result_path(folder, result.evaluator, result.step)
        said = f"{result.seconds:.1f} s" if fresh else "kept; again=true measures again"
        print(f"{path}  {said}")

    loaded = build_clip(OmegaConf.create({"model": model, "runs_dir": cfg.runs_dir}))
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded.clip.to(device)
    results = run_all(
        evaluators,
        loaded,
        folder=folder,
        run=run,
        step=step,
        command=f"python -m gradeclip_ft {shlex.join(sys.argv[1:])}",
        again=cfg.again,
        precision=cfg.precision,
        track=progress_bar,
        record=as_written(OmegaConf.create({"model": model, "evaluator": asked})),
        done=tell,
    )
    _print(results)
    for result, evaluator in zip(results, evaluators.values(), strict=True) if cfg.page else ():
        from gradeclip_ft.report.evaluation import evaluation_page
        from gradeclip_ft.report.page import write_page

        cases = evaluator.cases(loaded, result.details) if hasattr(evaluator, "cases") else ()
        path = result_path(folder, result.evaluator, result.step, result.alpha)
        print(write_page(evaluation_page(result, cases), path.with_suffix(".html")))


def _of_run(cfg: DictConfig, had: DictConfig) -> DictConfig:
    """The run's evaluators, or those asked for with the paths that the run has for them."""
    asked = OmegaConf.create(cfg.get("evaluator") or {})
    if not asked:
        return had
    for key in set(asked) & set(had):
        asked[key] = had[key]
    for override in sys.argv[2:]:  # what the command line says about them counts
        key = override.partition("=")[0].lstrip("+")
        if key.startswith("evaluator."):
            inner = key.removeprefix("evaluator.")
            OmegaConf.update(asked, inner, OmegaConf.select(cfg, key), force_add=True)
    return asked


def _print(results: list[Result]) -> None:
    """All metrics, one line each, and what a reader must know beside them."""
    from gradeclip_ft.results.table import metrics_table, render

    for result in results:
        print(f"\n{result.evaluator}, step {result.step}, {result.data.get('counts')}")
        print(render(metrics_table({"value": result.metrics})), end="")
        for name, detail in result.details.items():
            if name not in TABLES:
                print(f"  {name}: {detail}")
        if told := [name for name in TABLES if name in result.details]:
            print(f"  in the file: {', '.join(told)}")
