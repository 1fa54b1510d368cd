"""What the local loss costs in operations: counts, which no machine and no other program moves.

Full-size models on torch's meta device: shapes and counts without numbers.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.data.captions import Sample, collate
from gradeclip_ft.explain.base import explain_image, heat_from_trace
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.clip import Clip, LoadedClip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.objectives.base import Composed, Term
from gradeclip_ft.objectives.crops import Crops
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.keep import Keep
from gradeclip_ft.objectives.mosaic import Mosaic
from gradeclip_ft.ops.heatmap import pool_heatmap

PAIRS = {
    "A man riding a brown horse on a sandy beach.": ["man", "brown horse", "sandy beach"],
    "Two dogs play with a red frisbee in a park.": ["dogs", "red frisbee", "park"],
    "A plate of pasta with fresh basil.": ["plate", "pasta", "fresh basil"],
    "A black car waits for traffic lights in the city": ["black car", "traffic lights", "city"],
    "A small child eats a piece of birthday cake.": ["small child", "piece", "birthday cake"],
    "A white boat on a calm lake under a blue sky": ["white boat", "calm lake", "blue sky"],
    "An old clock tower next to a brick building": ["old clock tower", "brick building", "clock"],
    "A woman in a yellow dress holds an umbrella": ["woman", "yellow dress", "umbrella"],
}
PHRASES = 3


@pytest.fixture(scope="module", params=["ViT-B-16", "EVA02-B-16"])
def loaded(request: pytest.FixtureRequest) -> LoadedClip:
    loaded = load_clip(request.param, "random")
    loaded.clip.to("meta")
    return loaded


@pytest.fixture(scope="module")
def batch(loaded: LoadedClip) -> CaptionBatch:
    image = torch.zeros(3, 224, 224)
    samples = [Sample(caption, image, caption, found) for caption, found in PAIRS.items()]
    return collate(samples, loaded.tokenizer, "This is a photo of the {}", {}).to("meta")


@pytest.fixture(autouse=True)
def _without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switching autocast off is refused on the meta device, where it is off anyway."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def flops(run: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with counter:
        run()
    return counter.get_total_flops()


class _NoModules(nullcontext[None]):
    """Instead of the counts per module, whose hooks refuse the gradient of a leaf."""

    parents = frozenset({"Global"})


def native(loaded: LoadedClip, batch: CaptionBatch) -> tuple[int, int]:
    """Operations of open_clip's own encoders, texts at the full context."""
    model: Any = loaded.clip.model
    texts = loaded.tokenizer(list(PAIRS)).to("meta")
    return (
        flops(lambda: model.encode_image(batch.images)),
        flops(lambda: model.encode_text(texts)),
    )


def image_part(clip: Clip, batch: CaptionBatch) -> None:
    """Everything of the local loss but texts: embedding, maps, dense features, regions."""
    trace = replace(clip.image.trace(batch.images), most=batch.most)
    phrases = torch.empty(len(batch.phrase), trace.embedding.shape[1], device="meta")
    heat = heat_from_trace(GradEclip(create_graph=True), trace, phrases, batch.owner)
    pool_heatmap(trace.dense(), heat, batch.owner, most=batch.most)


def test_maps_and_regions_add_two_percent_to_the_image_tower(
    loaded: LoadedClip, batch: CaptionBatch
) -> None:
    """Would catch a last block in full, a second forward pass, or a gradient per phrase."""
    image, _ = native(loaded, batch)
    assert flops(lambda: image_part(loaded.clip, batch)) <= 1.02 * image


def test_three_phrases_cost_a_quarter_of_a_caption_at_full_length(
    loaded: LoadedClip, batch: CaptionBatch
) -> None:
    """Would catch a lost truncation, or a prompt that is computed for every phrase."""
    _, text = native(loaded, batch)
    ids = loaded.tokenizer(list(PAIRS), trim=True)
    captions = loaded.tokenizer.pack(ids)
    assert captions is not None
    assert batch.packed is not None
    tower: Any = loaded.clip.text
    alone = captions.to("meta")
    both, one = (flops(lambda p=p: tower.encode_packed(p)) for p in (batch.packed, alone))
    assert both - one <= 0.25 * text
    assert both <= 0.5 * text


def test_the_whole_step_costs_less_than_open_clip_s(
    loaded: LoadedClip, batch: CaptionBatch
) -> None:
    """Forward and backward. Would also catch a step that reads a number back from the device.

    Nothing can be read from the meta device, so the objective is free of synchronisation.
    """
    model: Any = loaded.clip.model
    texts = loaded.tokenizer(list(PAIRS)).to("meta")
    objective = GlobalLocal(GradEclip(create_graph=True))

    def theirs() -> None:
        image, text, scale = model(batch.images, texts)[:3]
        (scale * image @ text.T).logsumexp(1).sum().backward()

    def ours() -> None:
        objective(loaded.clip, batch).total.backward()

    assert flops(ours) <= 0.96 * flops(theirs)


@pytest.mark.parametrize(
    ("term", "share"), [(Mosaic(grids=(2,)), 1.35), (Keep(), 1.4), (Crops(per_image=1), 1.75)]
)
def test_terms_cost_a_part_of_an_ordinary_step(
    term: Term, share: float, loaded: LoadedClip, batch: CaptionBatch
) -> None:
    """A quarter of the images again; a teacher's pass; a teacher's pass and its crops."""
    clip = loaded.require_clip("trained")
    objective = Composed(terms={"term": term})
    objective.begin(clip)

    def run(objective: Composed) -> int:
        return flops(lambda: objective(clip, batch).total.backward())

    assert run(objective) <= share * run(Composed())


@pytest.mark.parametrize(("count", "share"), [(10, 1.02), (64, 1.08)])
def test_an_explanation_costs_hardly_more_than_the_image(
    loaded: LoadedClip, batch: CaptionBatch, count: int, share: float
) -> None:
    """Would catch maps whose cost grows with a pass per phrase."""
    pixels = batch.images[:1]
    target = torch.empty(count, loaded.clip.image.trace(pixels).embedding.shape[1], device="meta")
    owner = torch.zeros(count, dtype=torch.long, device="meta")
    model: Any = loaded.clip.model
    bare = flops(lambda: model.encode_image(pixels))
    maps = flops(lambda: explain_image(GradEclip(), loaded.clip, pixels, target, owner))
    assert maps <= share * bare
