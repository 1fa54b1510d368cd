"""Bootstrap intervals over images, against a slow draw of whole images and the closed form."""

import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest

from gradeclip_ft.commands.compare import compare
from gradeclip_ft.results import intervals
from gradeclip_ft.results.collect import collect
from gradeclip_ft.results.intervals import bootstrap, with_intervals
from gradeclip_ft.results.record import Result
from gradeclip_ft.results.table import tabulate

IMAGES = 60


def text(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def result(*, right: float = 0.5, seed: int = 1, step: int = 10) -> Result:
    """Regions of 4 classes, the first of them frequent, 1 to 5 in an image."""
    draw = random.Random(seed)
    image = [i for i in range(IMAGES) for _ in range(1 + i % 5)]
    label = [0 if i % 2 else 1 + n % 3 for n, i in enumerate(image)]
    rank = [0 if draw.random() < right else draw.randrange(1, 9) for _ in image]
    samples = {
        "boxes": {"image": text(image), "label": text(label), "rank": text(rank)},
        "image_retrieval": {"image": text(image), "rank": text(rank)},
    }
    rows = list(zip(label, rank, strict=True))
    metrics = {
        "boxes/top1": class_mean([(a, float(b < 1)) for a, b in rows]),
        "boxes/top5": class_mean([(a, float(b < 5)) for a, b in rows]),
        "boxes/mrr": class_mean([(a, 1 / (b + 1)) for a, b in rows]),
        "boxes/rest_top1": class_mean([(a, float(b < 1)) for a, b in rows if a]),
        "boxes/micro_top1": fmean(b < 1 for b in rank),
        "image_retrieval_recall@5": fmean(b < 5 for b in rank),
    }
    return Result(
        evaluator="regions",
        metrics=metrics,
        protocol={},
        data={"hash": "h"},
        weights={"name": "m", "hash": str(seed)},
        versions={},
        run=f"run{seed}",
        step=step,
        details={"samples": samples},
    )


def class_mean(rows: list[tuple[int, float]]) -> float:
    by_class: dict[int, list[float]] = {}
    for label, value in rows:
        by_class.setdefault(label, []).append(value)
    return fmean(map(fmean, by_class.values()))


def test_every_image_once_gives_the_metric_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a metric whose draws are of another metric."""

    class Once:
        def multinomial(self, images: int, shares: object, size: int) -> np.ndarray:
            return np.ones((size, images), int)

    monkeypatch.setattr(intervals.np.random, "default_rng", lambda seed: Once())
    found = bootstrap(result())
    assert found.keys() == result().metrics.keys()
    for metric, values in found.items():
        assert values == pytest.approx(result().metrics[metric]), metric


def test_the_spread_is_that_of_drawing_whole_images() -> None:
    """A loop that draws images, with Python's own generator; regions of an image come together."""
    one, draw = result(), random.Random(5)
    columns = one.details["samples"]["boxes"]  # type: ignore[index,call-overload]
    image, label, rank = (list(map(int, columns[k].split())) for k in ("image", "label", "rank"))
    by_image: dict[int, list[tuple[int, float]]] = {}
    for i, a, b in zip(image, label, rank, strict=True):
        by_image.setdefault(i, []).append((a, float(b < 1)))
    slow = [
        class_mean([row for _ in range(IMAGES) for row in by_image[draw.randrange(IMAGES)]])
        for _ in range(1000)
    ]
    fast = bootstrap(one)["boxes/top1"]
    assert fast.mean() == pytest.approx(fmean(slow), abs=0.01)
    assert fast.std() == pytest.approx(stdev(slow), rel=0.15)


def test_compare_prints_intervals_and_the_paired_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs that differ in one region: the difference is sure, the runs are not."""
    one = result(right=0.4)
    better = result(right=0.4)
    changed = dict(better.details["samples"])  # type: ignore[arg-type]
    ranks = changed["boxes"]["rank"].split()
    wrong = [place for place, rank in enumerate(ranks) if rank != "0"]
    for place in wrong[::2]:
        ranks[place] = "0"
    changed["boxes"] = {**changed["boxes"], "rank": " ".join(ranks)}
    labels = list(map(int, changed["boxes"]["label"].split()))
    top1 = class_mean([(a, float(b == "0")) for a, b in zip(labels, ranks, strict=True)])
    better = replace(better, run="run2", details={"samples": changed}, metrics={"boxes/top1": top1})
    replace(one, metrics={"boxes/top1": one.metrics["boxes/top1"]}).write(tmp_path / "one")
    better.write(tmp_path / "two")
    places = [str(tmp_path / name) for name in ("one", "two")]
    compare(*places, steps="last", interval=True, format="csv")
    lines = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    head, rows = lines[0], [dict(zip(lines[0], line, strict=True)) for line in lines[1:4]]
    assert {"boxes/top1", "boxes/top1 low", "boxes/top1 high"} <= set(head)
    first, second, difference = (
        [float(row[f"boxes/top1{end}"]) for end in (" low", "", " high")] for row in rows
    )
    assert first[0] < first[1] < first[2]
    assert rows[2]["run"] == "run2 - run1"
    assert difference[1] == pytest.approx(second[1] - first[1])
    width = difference[2] - difference[0]
    assert difference[0] > 0
    assert width < 0.8 * (second[2] - second[0] + first[2] - first[0])
    compare(*places, steps="last", interval=True)
    assert f"{100 * first[1]:.1f} [{100 * first[0]:.1f}, " in capsys.readouterr().out


def differences(folder: Path, *runs: tuple[str, str, str, tuple[int, ...]]) -> list[object]:
    """(run, top1) of the rows of differences, for runs of (model, start weights, data, steps).

    Starts have 0, 0.1, 0.2 ... on their data, in the order of the runs; a tuned run has 0.5 more.
    """
    places, starts = [], list(dict.fromkeys(run[1:3] for run in runs))
    for number, (model, start, data, steps) in enumerate(runs):
        places.append(str(folder / str(number)))
        for step in steps:
            weights = {"name": model, "hash": f"{start}{step and number}"}
            top1 = {"boxes/top1": starts.index((start, data)) / 10 + (0.5 if step else 0)}
            one = replace(result(step=step), weights=weights, data={"hash": data}, metrics=top1)
            replace(one, run=f"tuned {number}").write(Path(places[-1]))
    entries = collect(places, steps="all")
    rows = with_intervals(tabulate(entries), entries).rows[len(entries) :]
    return [(row["run"], round(float(str(row["boxes/top1"])), 3)) for row in rows]


def test_differences_are_those_of_one_model_and_of_the_same_data(tmp_path: Path) -> None:
    """Of two models, tuning is the difference from each one's own start; each data have a start."""
    runs = [("small", "s", "h", (0, 10)), ("large", "l", "h", (0, 10))]
    assert differences(tmp_path, *runs, ("small", "s", "other", (0, 10))) == [
        *(("tuned 0 - small", 0.5), ("large - small", 0.1), ("tuned 1 - large", 0.5)),
        ("tuned 2 - small", 0.5),
    ]


def test_differences_are_those_of_one_start(tmp_path: Path) -> None:
    """Two pretrained starts have the name of one architecture, and a run need not follow its own.

    The third run's start is in the table once, before the second's; the last has none of its own.
    """
    runs = [("m", "a", "h", (0, 10)), ("m", "b", "h", (0, 10)), ("m", "a", "h", (0, 10))]
    assert differences(tmp_path, *runs, ("m", "?", "h", (10,))) == [
        *(("tuned 0 - m", 0.5), ("m - m", 0.1), ("tuned 1 - m", 0.5)),
        *(("tuned 2 - m", 0.5), ("tuned 3 - m", 0.7)),
    ]


def test_a_share_of_the_weights_is_compared_with_the_same_share(tmp_path: Path) -> None:
    """Half of one run stood beside the whole of the other."""
    values = {("plain", 1.0): 0.4, ("plain", 0.5): 0.3, ("mine", 1.0): 0.9, ("mine", 0.5): 0.6}
    for (name, alpha), top1 in values.items():
        weights = {"name": "m", "hash": f"{name} {alpha}", "alpha": alpha}
        one = replace(result(), weights=weights, metrics={"boxes/top1": top1}, run=name)
        one.write(tmp_path / name)
    entries = collect([str(tmp_path / name) for name in ("plain", "mine")], steps="last")
    rows = with_intervals(tabulate(entries), entries).rows[len(entries) :]
    found = [(row["run"], row["alpha"], round(float(str(row["boxes/top1"])), 3)) for row in rows]
    assert found == [("mine - plain", 1.0, 0.5), ("mine - plain", 0.5, 0.3)]


def test_intervals_are_for_single_runs() -> None:
    with pytest.raises(ValueError, match="single runs; leave by= and published= out"):
        compare("runs/a", by=("map",), interval=True)
