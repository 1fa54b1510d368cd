"""The papers' user study on a model and pictures of one's own.

    python -m tools.study make model=openai_b16 captions=data/coco/annotations/captions_val2017.json images=data/coco/val2017
    python -m tools.study score answers/*.csv

`make` draws pictures with at least two captions and writes study/a.html and study/b.html, which work
offline and by keyboard. Half of the participants get each; every one sends back a CSV. `score` prints
the share of right answers without and with maps, and the paired t-test over participants. The p that
the journal prints, .032 for t(33) = 1.904, is one-sided.
"""  # noqa: E501

from __future__ import annotations

import csv
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from scipy import stats

from gradeclip_ft.commands.build import build_clip, make
from gradeclip_ft.commands.cli import call, usage
from gradeclip_ft.commands.config import compose, perform, wants_traceback
from gradeclip_ft.data.pairs import CaptionFile
from gradeclip_ft.explain.driver import explain_pictures, see, to_display_image
from gradeclip_ft.report.study import Question, question, write_study


def study(
    *,
    captions: Path,
    images: Path,
    model: str = "shapes_tiny",
    explainer: str = "grad_eclip",
    count: int = 10,
    examples: int = 2,
    seed: int = 0,
    out: Path = Path("study"),
) -> None:
    """Write the two pages of a study."""
    loaded = build_clip(compose("evaluate", [f"model={model}"]))
    method = make(
        compose("explain", ["images=x", f"+explainer@explainer.{explainer}={explainer}"]).explainer[
            explainer
        ],
        "explainer",
    )
    pairs = CaptionFile(str(captions), str(images), split="study")()
    able = [n for n, said in enumerate(pairs.captions) if len(set(said)) > 1]
    if len(able) < count + examples:
        raise ValueError(
            f"{len(able)} pictures have two captions, {count + examples} are asked for; lower "
            "count= or examples="
        )
    found: list[Question] = []
    for number in random.Random(seed).sample(able, count + examples):
        first, second = list(dict.fromkeys(pairs.captions[number]))[:2]
        seen = see(loaded, pairs[number][0])
        target = loaded.encode_texts([first, second])
        (one,) = explain_pictures(loaded, [seen], [target], {explainer: method})
        scores = one.score.tolist()
        photo, heat = to_display_image(seen.pixels, loaded).numpy(), one.heat[explainer].numpy()
        found.append(
            question(pairs.names[number], photo, (first, second), heat, (scores[0], scores[1]))
        )
    for path in write_study(found[examples:], found[:examples], out):
        print(path)


def score(*answers: str) -> None:
    """Print what the answers of all participants say."""
    shares: dict[str, list[list[int]]] = defaultdict(lambda: [[], []])
    for path in answers:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                shares[row["participant"]][int(row["maps"])].append(int(row["right"]))
    whole = [tuple(map(fmean, sets)) for sets in shares.values() if all(sets)]
    if len(whole) < 2:
        raise ValueError(f"{len(whole)} participants answered both sets; a t-test needs 2")
    without, shown = zip(*whole, strict=True)
    t = stats.ttest_rel(shown, without)
    print(f"participants {len(whole)}; incomplete and left out {len(shares) - len(whole)}")
    print(f"right without maps {fmean(without):.1%}, with maps {fmean(shown):.1%}")
    two, one_sided = t.pvalue, t.pvalue / 2 if t.statistic > 0 else 1 - t.pvalue / 2
    print(f"paired t({len(whole) - 1}) = {t.statistic:.3f}, p {two:.3f}, one-sided {one_sided:.3f}")


ACTIONS: dict[str, Callable[..., None]] = {"make": study, "score": score}


def main(arguments: list[str]) -> int:
    """Run one action, or show them all."""
    if arguments and arguments[0] in ACTIONS:
        action = ACTIONS[arguments[0]]
        return perform(lambda: call(action, arguments[1:]), full=wants_traceback())
    for name, action in ACTIONS.items():
        print(f"python -m tools.study {name} {usage(action)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
