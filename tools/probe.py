"""What features of regions know of shapes in the shapes world, block by block.

    python -m tools.probe                                       shapes_tiny
    python -m tools.probe model=shapes2_tiny
    python -m tools.probe weights=runs/NAME/weights.safetensors

Prints, in percent, how often a logistic regression tells the shape from a feature that is pooled in
a drawn box: trained on 1,000 scenes of the choosing split, tested on 1,000 of the reported one. So
much lies in the feature, whether or not a text can ask for it. Beside it what texts find: the shape
among the eight of its colour, and the class among 64. The last row is the embedding of pictures
that show one object alone.
"""

from __future__ import annotations

import sys
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradeclip_ft.commands.cli import call
from gradeclip_ft.data.shapes import PROMPT
from gradeclip_ft.data.shapes_scenes import SHAPES, thing_names
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.ops.attention import DensePath
from gradeclip_ft.ops.heatmap import pool_boxes
from gradeclip_ft.ops.similarity import unit
from gradeclip_ft.results.table import Row, Table, render
from tools.build_shapes_clip import Scenes, draw_world, hits

SCENES = 1000  # of each split
KINDS = len(SHAPES)


@torch.no_grad()
def probe(
    *, model: Literal["shapes_tiny", "shapes2_tiny"] = "shapes_tiny", weights: str | None = None
) -> None:
    """Print the table."""
    loaded = load_clip(model, weights)
    clip, tokenizer = loaded.clip, loaded.tokenizer
    assert isinstance(clip, Clip)
    kind = (SCENES, 0, tokenizer, loaded.image_size[0], 1 if model == "shapes_tiny" else 2)
    learned, tested = draw_world("choose", *kind), draw_world("val", *kind)
    known, asked = regions(clip, learned), regions(clip, tested)
    names = [PROMPT.format(name) for name in thing_names()]
    texts = unit(clip.text.encode(tokenizer(names)))
    rows: list[Row] = []
    for name, features in asked.items():
        alone = name == ALONE
        labels = tested.labels[tested.single] if alone else tested.labels
        before = learned.labels[learned.single] if alone else learned.labels
        right = probed(known[name], before % KINDS, features, labels % KINDS)
        row: Row = {"features": name, "regions": len(labels), "probe": right}
        if features.shape[1] == texts.shape[1] and not name.startswith("input"):
            scores = features @ texts.T
            own = (labels // KINDS)[:, None] * KINDS + torch.arange(KINDS)
            row["texts, shape"] = hits(scores.gather(1, own), (labels % KINDS)[:, None], 1)
            row["texts, class"] = hits(scores, labels[:, None], 1)
        rows.append(row)
    columns = ("probe", "texts, shape", "texts, class")
    print(render(Table(("features", "regions"), columns, tuple(rows)), "markdown"))


ALONE = "embedding of one object"


def regions(clip: Clip, scenes: Scenes) -> dict[str, Float[Tensor, "R W"]]:
    """Unit features of all boxes from the input of every block and from every dense path."""
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(scenes.images), 100):
        opened = clip.image.open(scenes.pixels(slice(start, start + 100)))
        tokens = opened.tokens
        for number in range(len(opened.layers)):
            if number:
                tokens = opened.run(tokens, number - 1, number)
            height, width = opened.grid or (0, 0)
            patches = tokens[:, -height * width :]
            parts.setdefault(f"input of block {number + 1}", []).append(
                patches.view(len(patches), height, width, -1)
            )
        trace = opened.trace()
        for path in get_args(DensePath):
            parts.setdefault(f"F_d, {path}", []).append(trace.dense(path))
        parts.setdefault(ALONE, []).append(trace.embedding)
    whole = {name: torch.cat(values) for name, values in parts.items()}
    embedding = unit(whole.pop(ALONE))[scenes.owner[scenes.single]]
    pooled = {name: pool_boxes(x, scenes.boxes, scenes.owner) for name, x in whole.items()}
    return pooled | {ALONE: embedding}


def probed(
    known: Float[Tensor, "K W"],
    shapes: Int[Tensor, " K"],
    asked: Float[Tensor, "R W"],
    right: Int[Tensor, " R"],
) -> float:
    """Share of right answers of a logistic regression, with a little weight decay."""
    mean, deviation = known.mean(0), known.std(0)
    known, asked = (known - mean) / deviation, (asked - mean) / deviation
    layer = nn.Linear(known.shape[1], KINDS)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200)

    @torch.enable_grad()
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(layer(known), shapes) + 1e-3 * layer.weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return hits(layer(asked), right[:, None], 1)


if __name__ == "__main__":
    sys.exit(call(probe, sys.argv[1:]))
