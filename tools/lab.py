"""The laboratory: every recipe of conf/exp/lab and seed, in each world, to one table.

    python -m tools.lab                                     all rows of all worlds, three seeds
    python -m tools.lab worlds=[shapes] seeds=[0]           one world, one seed
    python -m tools.lab rows=[ordinary,game] worlds=[shapes2]
    python -m tools.lab jobs=14 trainer=gpu                 14 runs at a time share the GPU

A row is a training run, runs/lab_WORLD_RECIPE_SEED, and writes its text to a .log beside its
folder; what is finished is kept, what was interrupted goes on, so the command can be stopped and
typed again. `results/recipes.md` holds means over seeds with their deviation, and 95 % intervals
over images; rows whose runs lie on another machine stay in it. The photos need PHOTOS=FOLDER (see
conf/exp/photos/ordinary.yaml). The row `true_mask` pools every phrase by the mask that the shapes
world drew: what a map can bring at most. Rows of other lengths end in their steps: `best_600` is
compared with `ordinary_600`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

import gradeclip_ft.training.module  # noqa: F401  # children find Lightning imported
from gradeclip_ft.__main__ import main
from gradeclip_ft.commands.build import build_clip, make
from gradeclip_ft.commands.cli import call
from gradeclip_ft.commands.config import compose, options, search_path
from gradeclip_ft.commands.runs import read_config
from gradeclip_ft.data.shapes import make_sample, vocabulary
from gradeclip_ft.data.shapes_scenes import COLOURS, SHAPES
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.step import Step
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.results.collect import Entry, collect
from gradeclip_ft.results.intervals import ENDS, bootstrap
from gradeclip_ft.results.record import write_atomically
from gradeclip_ft.results.table import DEVIATION, HIGH, LOW, Row, Table, render
from gradeclip_ft.training.run_files import METRICS_JSONL, WEIGHTS, read_lines

RUNS, OUT = Path("runs"), Path("results/recipes")
ORDINARY, UNTOUCHED, DIFFERENCE = "ordinary", "untouched", "- ordinary"
TRUE_MASKS = {
    "true_mask": "game",
    "true_mask_600": "game_600",
}  # rows, and whose settings they take
PICTURES = 16  # of the evaluation, whose patches are compared with those of the start model
COLUMNS = (
    *("boxes/top1", "boxes/top5", "boxes/rest_top1", "boxes/mrr", "boxes/micro_top1"),
    *("boxes/colour_given_shape", "boxes/shape_given_colour", "thing_masks/top1"),
    *("thing_masks/top5", "stuff_masks/top1", "stuff_masks/among_stuff_top1"),
    *("image_retrieval_recall@1", "text_retrieval_recall@1"),
)


@dataclass(frozen=True)
class Run:
    """A training run of the table, in `folder`."""

    world: str
    recipe: str
    seed: str
    folder: Path

    @property
    def group(self) -> tuple[str, str]:
        """The table is written when the last run of a seed of a world is finished."""
        return self.seed, self.world


def lab(
    *overrides: str,
    rows: tuple[str, ...] = (),
    worlds: tuple[str, ...] = ("shapes", "shapes2", "photos"),
    seeds: tuple[str, ...] = ("0", "1", "2"),
    jobs: int = 1,
    trainer: Literal["cpu", "gpu"] = "cpu",
    runs_dir: Path = RUNS,
    out: Path = OUT,
) -> None:
    """Train what is missing, seed by seed, and write the table after every seed of a world.

    OVERRIDES               of `train`, for all rows: trainer.max_steps=3; with a runs_dir= and
                            an out= of their own, as a run that is finished is not made again
    rows=[ordinary,game]    recipes; all of conf/exp/lab without it
    worlds=[shapes,photos]  shapes, shapes2, photos
    jobs=N                  runs at a time; step times are measured with 1 alone
    """
    known = {world: recipes(world) for world in worlds}
    if unknown := set(rows).difference(*known.values()):
        raise ValueError(f"no recipe {', '.join(sorted(unknown))}; there are {known}")
    if overrides and (runs_dir == RUNS or out == OUT):
        raise ValueError(
            f"{' '.join(overrides)} would make rows of another kind in {out}.md; give a runs_dir= "
            "and an out= of their own"
        )
    missing = [
        Run(world, recipe, seed, folder)
        for seed in seeds
        for world in worlds
        for recipe in rows or known[world]
        if recipe in known[world]
        and not ((folder := runs_dir / f"lab_{world}_{recipe}_{seed}") / "done").exists()
    ]
    # In single precision on a GPU too: a table may have rows of both.
    common = [*overrides, f"trainer={trainer}", "trainer.precision=32-true", "trainer.threads=1"]
    for world in dict.fromkeys(run.world for run in missing):
        prepare(world, common, jobs)
    runs_dir.mkdir(parents=True, exist_ok=True)
    left = [run.group for run in missing]
    for run in in_parallel(missing, common, jobs):
        left.remove(run.group)
        if run.group not in left:
            write(runs_dir, out)
    write(runs_dir, out)
    if ended := [run.folder.name for run in missing if not (run.folder / "done").exists()]:
        sys.exit(
            f"{', '.join(ended)} ended early: see the .log files in {runs_dir}, and type the "
            "command again to go on"
        )


def recipes(world: str) -> list[str]:
    """Of a world, ordinary fine-tuning first; the second shapes world has those of the first."""
    prefix = f"{world.removesuffix('2')}_"
    found = [name.removeprefix(prefix) for name in options("exp/lab") if name.startswith(prefix)]
    own = TRUE_MASKS if world.startswith("shapes") else ()
    return [ORDINARY, *(name for name in found if name != ORDINARY), *own]


def experiment(world: str, recipe: str) -> list[str]:
    """Overrides of `train` that choose world and recipe."""
    chosen = TRUE_MASKS.get(recipe, recipe)
    second = ["data=shapes2", "model=shapes2_tiny"] if world == "shapes2" else []
    return [f"+exp/lab={world.removesuffix('2')}_{chosen}", *second]


def prepare(world: str, common: Sequence[str], jobs: int) -> None:
    """Draw or check the data of a world once, before runs that would all draw them."""
    drawn = [f"+data.make.workers={max(2, jobs)}"] if world.startswith("shapes") else []
    cfg = compose("train", [*experiment(world, ORDINARY), *common, *drawn, *search_path()])
    make(cfg.data, "data")(tokenizer=None, transform=None).prepare()


def in_parallel(missing: Sequence[Run], common: Sequence[str], jobs: int) -> Iterator[Run]:
    """Runs as they end, well or not, so many at a time.

    Each is a child forked by this process, which has imported everything and computed nothing.
    """
    fork = multiprocessing.get_context("fork")
    waiting, running = list(missing), dict[Any, tuple[Any, Run, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            run = waiting.pop(0)
            child = fork.Process(target=train, args=(run, common, jobs == 1))
            child.start()
            running[child.sentinel] = child, run, time.perf_counter()
        for sentinel in wait(list(running)):
            child, run, began = running.pop(sentinel)
            child.join()
            seconds = f"{time.perf_counter() - began:.0f} s"
            what = f"done in {seconds}" if not child.exitcode else f"ended with {child.exitcode}"
            print(f"{run.folder.name}: {what}, see {log_of(run)}", flush=True)
            yield run


def log_of(run: Run) -> Path:
    """Everything a run prints."""
    return run.folder.with_name(f"{run.folder.name}.log")


def train(run: Run, common: Sequence[str], alone: bool) -> None:
    """One training run, then how far its patches went. In a process of its own."""
    with log_of(run).open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    if run.recipe in TRUE_MASKS:
        setattr(GlobalLocal, "maps", true_maps)  # noqa: B010
    sys.argv = ["gradeclip_ft", "train", *experiment(run.world, run.recipe), f"seed={run.seed}"]
    sys.argv += [f"name={run.folder.name}", f"runs_dir={run.folder.parent}", "resume=auto", *common]
    sys.argv += [f"evaluation.before={str(run.recipe.startswith(ORDINARY)).lower()}"]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    facts = {"patch_cosine": patch_cosine(run.folder)}
    if alone:
        facts["step_seconds"] = step_seconds(run.folder)
    write_atomically(run.folder / "done", json.dumps(facts) + "\n")


@torch.no_grad()
def patch_cosine(folder: Path) -> float:
    """Mean cosine between a patch of F_d and the same patch by the start model."""
    cfg = read_config(folder)
    start = build_clip(cfg)
    tuned = build_clip(replace_weights(cfg, folder / WEIGHTS))
    evaluator = next(node for key, node in cfg.evaluator.items() if "retrieval" in str(key))
    files = sorted(Path(str(evaluator.data.images)).iterdir())[:PICTURES]
    pixels = start.transform(train=False).stack(files)
    both = [unit(model.clip.image.trace(pixels).dense()) for model in (start, tuned)]
    return float((both[0] * both[1]).sum(-1).mean())


def replace_weights(cfg: Any, weights: Path) -> Any:
    """The same configuration, begun from other weights."""
    changed = cfg.copy()
    changed.init_from = str(weights)
    return changed


def step_seconds(folder: Path) -> float:
    """Time of a step without waiting for data, in the fastest of the recorded windows.

    Other programs on the machine can only add to it.
    """
    lines = [line for line in read_lines(folder / METRICS_JSONL) if "seconds" in line]
    starts = [0, *(line["step"] for line in lines)]
    fastest: float = min(
        (line["seconds"] - line["data_seconds"]) / (line["step"] - start)
        for start, line in zip(starts, lines, strict=False)
    )
    return fastest


def write(runs_dir: Path, out: Path) -> None:
    """The table of everything that is finished, one part per world, and a JSON with every row.

    Rows of the JSON stay where no run here replaces them, as long as there is such a recipe.
    """
    parts = ["# Recipes", "", "Made by", "", "    make lab", "", *HEAD.splitlines(), ""]
    data = out.parent / f"{out.name}.json"
    stored: list[Row] = json.loads(data.read_text()) if data.exists() else []
    kept: list[Row] = []
    for world in ("shapes", "shapes2", "photos"):
        folders = sorted(path.parent for path in runs_dir.glob(f"lab_{world}_*_*/done"))
        groups = grouped(world, folders)
        for title, chosen in TITLES[world].items():
            before = [row for row in stored if (row["world"], row["part"]) == (world, title)]
            rows = in_order(world, before, list(table_rows(groups, chosen)))
            if not rows:
                continue
            columns = [name for name in COLUMNS if any(name in row for row in rows)]
            told = ("recipe", "alpha", "seeds", "on", "time", "patch cosine")
            facts = tuple(name for name in told if any(name in row for row in rows))
            table = Table(facts, tuple(columns), tuple(rows))
            parts += [f"## {title}", "", render(table, "markdown")]
            kept += [{"world": world, "part": title, **row} for row in rows]
    write_atomically(out.parent / f"{out.name}.md", "\n".join(parts).rstrip() + "\n")
    content = json.dumps(kept, indent=1, ensure_ascii=False)
    write_atomically(data, content + "\n")


HEAD = """\
Metrics in percent: mean over the seeds, ± their sample deviation, and in brackets 95 % of 1,000
draws of images. `alpha` is the share of the tuned weights, the rest are the start weights. `time`,
where it is given, is that of a step relative to ordinary fine-tuning of the same seed; `on` where
the runs were trained; `patch cosine` the mean cosine between a patch and the same patch by the
start model. Rows `- ordinary` are paired differences from ordinary fine-tuning with the same alpha
and steps, over the same draws. A recipe, seed or world that is not here has not been run; the
command goes on where it was stopped. Rows whose runs do not lie in `runs_dir` stay as they are; a
run there replaces the row of its recipe and alpha, even if that row had more seeds, and differences
from an ordinary row that was replaced are left out."""
TITLES: Mapping[str, Mapping[str, str]] = {
    "shapes": {"Shapes world, reported split": "", "Shapes world, choosing split": "choose"},
    "shapes2": {"Shapes world 2, reported split": "", "Shapes world 2, choosing split": "choose"},
    "photos": {"Photos": ""},
}
Group = tuple[str, float | None]  # recipe and alpha; None before training


def grouped(world: str, folders: Sequence[Path]) -> dict[Group, list[tuple[Entry, dict[str, Any]]]]:
    """Entries of all seeds by recipe and share, with what `done` says."""
    found: dict[Group, list[tuple[Entry, dict[str, Any]]]] = {}
    for folder in folders:
        facts = json.loads((folder / "done").read_text())
        facts["on"] = str(read_config(folder).trainer.accelerator)
        for entry in collect([str(folder)]):
            if not entry.step:
                found.setdefault((UNTOUCHED, None), [(entry, {})])
                continue
            alpha = next(iter(entry.results.values())).alpha
            found.setdefault((recipe_of(world, folder), alpha), []).append((entry, facts))
    return found


def recipe_of(world: str, folder: Path) -> str:
    """lab_WORLD_RECIPE_SEED."""
    return folder.name.removeprefix(f"lab_{world}_").rpartition("_")[0]


def table_rows(
    groups: Mapping[Group, Sequence[tuple[Entry, dict[str, Any]]]], chosen: str
) -> Iterator[Row]:
    """A row for every recipe, and one for its difference from ordinary fine-tuning."""
    draws = {
        group: [drawn(entry, chosen) for entry, _ in members] for group, members in groups.items()
    }
    values = {
        group: [numbers(entry, chosen) for entry, _ in members] for group, members in groups.items()
    }
    seconds = times(groups.get((ORDINARY, 1.0), []))
    for group, members in groups.items():
        recipe, alpha = group
        row: Row = {"recipe": recipe, "alpha": alpha, "seeds": len(members) if alpha else None}
        if alpha is not None:
            row["on"] = ", ".join(sorted({facts["on"] for _, facts in members}))
        own = times(members)
        if own and seconds and alpha == 1.0:
            row["time"] = f"{statistics.fmean(own) / statistics.fmean(seconds):.2f}"
        if alpha == 1.0:
            cosines = [facts["patch_cosine"] for _, facts in members]
            row["patch cosine"] = f"{statistics.fmean(cosines):.3f}"
        ordinary: Group = (ordinary_beside(recipe), alpha)
        difference: Row = {"recipe": DIFFERENCE, "alpha": alpha}
        for metric in values[group][0]:
            each = [some[metric] for some in values[group]]
            row[metric] = statistics.fmean(each)
            if len(each) > 1:
                row[metric + DEVIATION] = statistics.stdev(each)
            spread = mean_draws(draws[group], metric)
            row |= ends(metric, spread)
            if ordinary in groups and group != ordinary:
                base = statistics.fmean(some[metric] for some in values[ordinary])
                difference[metric] = statistics.fmean(each) - base
                difference |= ends(metric, spread - mean_draws(draws[ordinary], metric))
        yield row
        if ordinary in groups and group != ordinary:
            yield difference


def in_order(world: str, stored: Sequence[Row], made: Sequence[Row]) -> list[Row]:
    """Rows of a part in the order of the recipes; of equal ones, those that were made here.

    Where ordinary fine-tuning was made here, stored differences are those from another row.
    """
    places = {name: place for place, name in enumerate([UNTOUCHED, *recipes(world)])}
    here = blocks(made)
    known = {
        (recipe, alpha): rows[:1] if (ordinary_beside(recipe), alpha) in here else rows
        for (recipe, alpha), rows in blocks(stored).items()
        if recipe in places
    }
    both = known | here
    groups = sorted(both, key=lambda group: places.get(group[0], len(places)))
    return [row for group in groups for row in both[group]]


def blocks(rows: Sequence[Row]) -> dict[Any, list[Row]]:
    """Rows by recipe and alpha, each with its difference from ordinary fine-tuning."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        if row["recipe"] != DIFFERENCE:
            group = row["recipe"], row["alpha"]
        found.setdefault(group, []).append(row)
    return found


def ordinary_beside(recipe: str) -> str:
    """Ordinary fine-tuning of the same length: rows of other lengths end in their steps."""
    steps = recipe.rpartition("_")[2]
    return f"{ORDINARY}_{steps}" if steps.isdigit() else ORDINARY


def times(members: Sequence[tuple[Entry, dict[str, Any]]]) -> list[float]:
    """Seconds of a step, of runs that had the machine to themselves."""
    return [facts["step_seconds"] for _, facts in members if "step_seconds" in facts]


def numbers(entry: Entry, chosen: str) -> dict[str, float]:
    """Metrics of the evaluators of one split."""
    return {
        metric: value
        for name, result in entry.results.items()
        if ("choose" in name) == bool(chosen)
        for metric, value in result.metrics.items()
        if metric in COLUMNS
    }


def drawn(entry: Entry, chosen: str) -> dict[str, Any]:
    """Draws of the same metrics."""
    return {
        metric: values
        for name, result in entry.results.items()
        if ("choose" in name) == bool(chosen)
        for metric, values in bootstrap(replace(result, metrics=numbers(entry, chosen))).items()
    }


def mean_draws(draws: Sequence[Mapping[str, Any]], metric: str) -> Any:
    """Mean over the seeds in every draw of images."""
    return np.mean([some[metric] for some in draws], axis=0)


def ends(metric: str, draws: Any) -> Row:
    """The interval of a metric."""
    low, high = np.percentile(draws, ENDS)
    return {metric + LOW: float(low), metric + HIGH: float(high)}


@cache
def words_by_id() -> dict[int, str]:
    """Words of the shapes world by their token."""
    tokenizer = load_clip("shapes_tiny").tokenizer
    return {int(tokenizer([word])[0, 1]): word for word in vocabulary()}


def true_maps(objective: GlobalLocal, step: Step) -> Tensor:
    """In place of heat maps: masks of the phrases on the grid of patches, (P, h, w).

    A scene is drawn again from its key. A phrase means every object with the colour and the shape
    that it names, or the background; other phrases ("the left side") get an empty map.
    """
    del objective
    batch, grid = step.batch, (step.dense.shape[1], step.dense.shape[2])
    side = batch.images.shape[-1]
    index = [int(key.rpartition(":")[2]) - 1 for key in batch.keys]  # SHARD.tar:NUMBER
    samples = [make_sample(0, "train", each, side, 2 if side == 128 else 1) for each in index]
    words = words_by_id()
    named = [{words.get(number) for number in ids} for ids in batch.distinct.tolist()]
    maps = []
    for row, image in zip(batch.phrase.tolist(), batch.owner.tolist(), strict=True):
        colours, shapes = named[row] & set(COLOURS), named[row] & set(SHAPES)
        meant = [
            place
            for place, thing in enumerate(samples[image].scene.things, 1)
            if (colours or shapes) and colours <= {thing.colour} and shapes <= {thing.shape}
        ]
        if "background" in named[row]:
            meant = [0]
        mask = np.isin(samples[image].drawing.owner, meant).astype(np.float32)
        maps.append(adaptive_avg_pool2d(torch.from_numpy(mask)[None], grid)[0])
    return torch.stack(maps) if maps else step.dense.new_zeros(0, *grid)


if __name__ == "__main__":
    call(lab, sys.argv[1:])
