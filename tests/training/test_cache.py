"""What frozen parts compute, kept on disk, against the plain run."""

from functools import partial
from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import nn

from gradeclip_ft.explain.game import Game
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.losses import AlignmentOptions
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.objectives import base
from gradeclip_ft.objectives.base import Composed
from gradeclip_ft.objectives.crops import Crops
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.global_only import GlobalOnly
from gradeclip_ft.objectives.keep import Keep
from gradeclip_ft.objectives.mosaic import Mosaic
from gradeclip_ft.training.cache import FrozenCache
from gradeclip_ft.training.module import FineTuneModule
from gradeclip_ft.training.optim import adamw, freeze, warmup_cosine
from tests.training.conftest import make_batch, small_clip

FROZEN = {"image_blocks": 1, "train_text": False}


def objective(explainer: Any) -> GlobalLocal:
    frozen_maps: dict[str, Any] = {"maps_from": "start", "phrase_weight": "none"}
    return GlobalLocal(
        explainer,
        AlignmentOptions(kind="contrastive"),
        terms={"keep": Keep(2.0), "crops": Crops(3.0, grids=(2,))},
        **frozen_maps,
    )


def other_clip() -> Clip:
    """Another model, with other embeddings."""
    clip = small_clip()
    with torch.no_grad():
        clip.model.visual.conv1.weight.neg_()
    return clip


def module_of(clip: Clip, loss: Composed, cache: str | None, **frozen: Any) -> FineTuneModule:
    return FineTuneModule(
        clip,
        loss,
        optimizer=partial(adamw, lr=1e-2),
        schedule=partial(warmup_cosine, warmup=1, steps=6),
        cache=cache,
        **frozen,
    )


def losses(
    loss: Composed,
    cache: str | None,
    frozen: dict[str, Any] = FROZEN,
    *,
    clip: Clip | None = None,
    checkpoint: dict[str, torch.Tensor] | None = None,
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, list[int]]]:
    """Six steps over three batches; and how many images each pass of a first block has.

    By the model that makes the pass: `own`, or the name of a teacher.
    """
    clip = clip or small_clip()
    module = module_of(clip, loss, cache, **frozen)
    if checkpoint is not None:
        module.load_state_dict(checkpoint)
    models = {"own": clip, **{name: each.clip for name, each in loss.teachers.items()}}
    passes: dict[str, list[int]] = {name: [] for name in models}
    for name, each in models.items():
        each.model.visual.transformer.resblocks[0].register_forward_hook(
            lambda *call, name=name: passes[name].append(len(call[2]))
        )
    module.train()
    optimizer = module.configure_optimizers()["optimizer"]
    found = []
    for step in range(6):
        torch.manual_seed(step)
        total = module.training_step(make_batch(step % 3), step)["loss"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(float(total.detach()))
    return found, clip.model.state_dict(), passes


@pytest.mark.parametrize("explainer", [GradEclip(create_graph=False), Game(), Game(layers="last")])
def test_a_cached_run_is_the_plain_run(explainer: Any, tmp_path: Any) -> None:
    """Losses and weights, with a teacher, maps of one layer or of all, and crops.

    The second run computes no frozen block of the student again.
    """
    plain, weights, passes = losses(objective(explainer), None)
    assert plain[0] != plain[3]  # something was learned between two visits
    for visit in ("first", "again"):
        cached, same, seen = losses(objective(explainer), str(tmp_path))
        assert cached == pytest.approx(plain, rel=1e-5), visit
        for name, value in weights.items():
            torch.testing.assert_close(same[name], value, rtol=1e-4, atol=1e-5)
        assert len(seen["own"]) <= (3 if visit == "first" else 0)  # the teacher may have come first
    assert len(passes["own"]) == 6


def test_other_images_in_the_memory_of_a_step_are_not_taken_for_its_own(tmp_path: Any) -> None:
    """An evaluation would get the memory of the last batch, and the tokens of its images."""
    clip = small_clip()
    freeze(clip.model, **FROZEN)
    cache = FrozenCache(clip, tmp_path)
    cache.serve(clip)
    images = make_batch(0).images.clone()
    cache.watch(images)
    place, shape = images.data_ptr(), images.shape
    del images
    others = [torch.randn(shape) for _ in range(20)]
    assert place not in [each.data_ptr() for each in others]


def test_maps_of_the_start_model_are_stored_where_everything_learns(tmp_path: Any) -> None:
    """The second run draws no map and is the plain run; another method has maps of its own."""
    drawn: list[int] = []

    class Counted(Game):
        def from_record(self, *call: Any) -> torch.Tensor:
            drawn.append(len(call[1]))
            return super().from_record(*call)

    plain = losses(objective(Counted()), None, {})[0]
    for visit in ("first", "again"):
        drawn.clear()
        stored = losses(objective(Counted()), str(tmp_path), {})[0]
        assert stored == pytest.approx(plain, rel=1e-5), visit
        assert bool(drawn) == (visit == "first")
    losses(objective(Counted(layers="last")), str(tmp_path), {})
    assert drawn


@pytest.mark.parametrize("maps", [True, False])
def test_the_start_model_sees_no_picture_twice(
    maps: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run shows it the few of `drift` alone, and is the plain run to the bit.

    Canvases are not images of the step, and a moving average is another model at every step.
    """
    monkeypatch.setattr(base, "FEW", 2)

    def chosen() -> Composed:
        kept = {"keep": Keep(2.0), "keep_ema": Keep(2.0, teacher="ema")}
        terms = {**kept, "mosaic": Mosaic(3.0, grids=(2,), target="start")}
        return (
            GlobalLocal(Game(), maps_from="start", terms=terms) if maps else Composed(terms=terms)
        )

    plain = losses(chosen(), None, {})[0]
    for visit in ("first", "again"):
        stored, _, passes = losses(chosen(), str(tmp_path), {})
        assert stored == plain, visit
    assert (passes["start"], passes["ema"]) == ([2] * 6, [6] * 6)


def test_other_frozen_weights_have_files_of_their_own(tmp_path: Any) -> None:
    """A cache of another model would be a wrong number without a word."""
    losses(objective(GradEclip(create_graph=False)), str(tmp_path))
    other = small_clip()
    with torch.no_grad():
        other.model.visual.conv1.weight.mul_(1.5)
    loss = objective(GradEclip(create_graph=False))
    module = module_of(other, loss, str(tmp_path), **FROZEN)
    module.training_step(make_batch(0), 0)
    assert len(list(tmp_path.iterdir())) == 4  # frozen parts, and maps


def test_other_start_weights_have_embeddings_of_their_own(tmp_path: Any) -> None:
    """Would catch names that are made of the frozen parts alone: here there are none."""
    found = []
    for make in (small_clip, other_clip):
        plain, cached = (
            losses(Composed(terms={"keep": Keep(2.0)}), cache, {}, clip=make())[0]
            for cache in (None, str(tmp_path))
        )
        assert cached == plain
        found.append(plain)
    assert found[0] != found[1]


@pytest.mark.parametrize("frozen", [FROZEN, {}], ids=["one block", "everything"])
def test_a_resumed_run_has_the_files_of_its_checkpoint(frozen: Any, tmp_path: Any) -> None:
    """The start file is another one since: its files are neither read nor written."""

    def run(cache: str | None, **checkpoint: Any) -> list[float]:
        return losses(objective(Game()), cache, frozen, clip=other_clip(), **checkpoint)[0]

    begun = module_of(small_clip(), objective(Game()), None, **frozen).state_dict()
    fresh, resumed = run(None), run(None, checkpoint=begun)
    assert fresh != pytest.approx(resumed, rel=1e-3)
    filled, empty = str(tmp_path / "filled"), str(tmp_path / "empty")
    run(filled)
    assert run(filled, checkpoint=begun) == pytest.approx(resumed, rel=1e-5)
    run(empty, checkpoint=begun)
    assert run(empty) == pytest.approx(fresh, rel=1e-5)


def test_another_activation_or_precision_has_files_of_its_own(tmp_path: Any) -> None:
    """ViT-B-16 and ViT-B-16-quickgelu may have the same weights; bf16 is coarser."""
    images, found = make_batch(0).images, []
    for activation, bf16 in ((nn.GELU(), False), (nn.GELU(), True), (QuickGELU(), False)):
        clips = small_clip(), small_clip()
        for clip in clips:
            for block in clip.model.visual.transformer.resblocks:
                block.mlp.gelu = activation
            freeze(clip.model, **FROZEN)
        cache = FrozenCache(clips[1], tmp_path)
        cache.serve(clips[1])
        cache.watch(images)
        with torch.autocast("cpu", enabled=bf16):
            plain, cached = (clip.image.trace(images).embedding for clip in clips)
        torch.testing.assert_close(cached, plain, rtol=0, atol=0)
        with torch.autocast("cpu", enabled=False):  # as a teacher sees the images of the step
            plain, cached = (clip.image.trace(images).embedding for clip in clips)
        torch.testing.assert_close(cached, plain, rtol=0, atol=0)
        found.append(cached)
    assert not found[0].equal(found[2])


def test_a_cache_needs_something_that_is_frozen(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"set optim.image_blocks, objective.maps_from=start"):
        module_of(small_clip(), GlobalOnly(), str(tmp_path))
