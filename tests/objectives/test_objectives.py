"""From a batch to loss terms: which parameters learn what, and the edge cases of a batch."""

import dataclasses

import pytest
import torch

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.base import TraceExplainer
from gradeclip_ft.explain.game import Game
from gradeclip_ft.explain.grad_cam import GradCam
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.explain.maskclip import MaskClip
from gradeclip_ft.explain.rollout import Rollout
from gradeclip_ft.explain.uniform import Uniform
from gradeclip_ft.losses import AlignmentOptions
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.packing import pack_texts
from gradeclip_ft.models.towers.select import image_tower
from gradeclip_ft.models.trace import UnsupportedTowerError
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.global_only import GlobalOnly
from tests.tiny import TEXTS, make_tiny_clip, make_tiny_text, timm_vit

EXPLAINERS = [GradEclip(), GradEclip(create_graph=True), GradCam(), MaskClip(), Uniform()]


def without_phrases(batch: CaptionBatch) -> CaptionBatch:
    """The same images and captions; no phrase was found."""
    return dataclasses.replace(
        batch,
        distinct=batch.distinct[:0],
        identity=batch.identity[:0],
        phrase=batch.phrase[:0],
        owner=batch.owner[:0],
    )


def gradients(clip: Clip, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of every parameter that has one."""
    clip.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in clip.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=str)
def test_every_parameter_receives_a_finite_gradient(
    explainer: TraceExplainer, tiny_clip: Clip, tiny_batch: CaptionBatch
) -> None:
    """Unused parameters would stop DDP; a NaN would stop training."""
    terms = GlobalLocal(explainer)(tiny_clip, tiny_batch)
    found = gradients(tiny_clip, terms.total)
    assert found.keys() == dict(tiny_clip.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_the_total_is_global_plus_weighted_local(tiny_clip: Clip, tiny_batch: CaptionBatch) -> None:
    terms = GlobalLocal(GradEclip(), local_weight=0.25)(tiny_clip, tiny_batch)
    alone = GlobalOnly()(tiny_clip, tiny_batch)
    expected = alone.total + 0.25 * terms.parts["local"]
    torch.testing.assert_close(terms.total, expected, rtol=1e-5, atol=1e-6)


def test_gradient_through_the_map_is_an_option(tiny_vit: Clip, tiny_batch: CaptionBatch) -> None:
    """Same value, another gradient: the map's own contribution."""
    stopped = GlobalLocal(GradEclip(create_graph=False))(tiny_vit, tiny_batch)
    moving = GlobalLocal(GradEclip(create_graph=True))(tiny_vit, tiny_batch)
    torch.testing.assert_close(stopped.total, moving.total)
    first, second = gradients(tiny_vit, stopped.total), gradients(tiny_vit, moving.total)
    name = "model.visual.transformer.resblocks.1.attn.in_proj_weight"
    assert not torch.allclose(first[name], second[name], rtol=1e-3)


def test_a_batch_without_phrases_trains_on_the_global_loss_alone(
    tiny_clip: Clip, tiny_batch: CaptionBatch
) -> None:
    batch = without_phrases(tiny_batch)
    terms = GlobalLocal(GradEclip(create_graph=True))(tiny_clip, batch)
    assert terms.parts["local"].item() == 0.0
    expected = gradients(tiny_clip, GlobalOnly()(tiny_clip, batch).total)
    got = gradients(tiny_clip, GlobalLocal(GradEclip())(tiny_clip, batch).total)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", TEXTS)
def test_every_text_tower_takes_a_batch_without_phrases(
    family: str, tiny_batch: CaptionBatch
) -> None:
    """Would catch a tower that refuses a call without texts, as the loader then makes one."""
    clip = make_tiny_text(family)
    length, generator = clip.text.context_length, torch.Generator().manual_seed(0)
    captions = torch.randint(3, 40, (len(tiny_batch.images), min(length, 16)), generator=generator)
    captions = torch.nn.functional.pad(captions, (0, length - captions.shape[1]), value=49)
    empty = without_phrases(dataclasses.replace(tiny_batch, captions=captions, packed=None))
    terms = GlobalLocal(GradEclip())(clip, dataclasses.replace(empty, distinct=captions[:0, :8]))
    assert terms.parts["local"] == 0
    assert terms.total.isfinite()
    assert all(g.isfinite().all() for g in gradients(clip, terms.total).values())


def test_distinct_phrases_encoded_once_give_the_plain_loss(
    tiny_clip: Clip, tiny_batch: CaptionBatch
) -> None:
    """The de-duplicated path against one row per phrase."""
    plain = dataclasses.replace(
        tiny_batch,
        distinct=tiny_batch.distinct[tiny_batch.phrase],
        identity=tiny_batch.identity[tiny_batch.phrase],
        phrase=torch.arange(5),
    )
    objective = GlobalLocal(GradEclip())
    torch.testing.assert_close(
        objective(tiny_clip, tiny_batch).total, objective(tiny_clip, plain).total
    )


def test_packed_texts_give_the_plain_loss(tiny_clip: Clip, tiny_batch: CaptionBatch) -> None:
    """Captions and phrases in shared rows against two calls; value and gradient."""
    rows = [*tiny_batch.captions.tolist(), *tiny_batch.distinct.tolist()]
    packed = dataclasses.replace(tiny_batch, packed=pack_texts(rows))
    objective = GlobalLocal(GradEclip(create_graph=True))
    apart, together = (objective(tiny_clip, batch).total for batch in (tiny_batch, packed))
    torch.testing.assert_close(together, apart)
    expected, got = gradients(tiny_clip, apart), gradients(tiny_clip, together)
    for name, gradient in expected.items():
        # other sums in fp32, and the logarithm of a small cosine is steep
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "family", ["vit", *(pytest.param(one, marks=pytest.mark.slow) for one in ("eva02", "dinov2"))]
)
def test_compiled_blocks_give_the_plain_loss(family: str, tiny_batch: CaptionBatch) -> None:
    """The gradient inside the step, differentiated again, beside traced and cut-up graphs."""
    clip = make_tiny_clip(family)
    objective = GlobalLocal(GradEclip(create_graph=True))
    plain = objective(clip, tiny_batch).total
    expected = gradients(clip, plain)
    torch.compiler.reset()
    clip.compile_blocks("aot_eager")
    for checkpointed in (False, True):
        clip.set_grad_checkpointing(checkpointed)
        compiled = objective(clip, tiny_batch).total
        torch.testing.assert_close(compiled, plain)
        got = gradients(clip, compiled)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)


def test_nothing_to_compile_is_said() -> None:
    clip = make_tiny_clip("resnet")
    clip.model.text = torch.nn.Identity()
    with pytest.raises(UnsupportedTowerError, match=r"leave optim\.compile null"):
        clip.compile_blocks("aot_eager")


def test_phrase_order_does_not_change_the_loss(tiny_clip: Clip, tiny_batch: CaptionBatch) -> None:
    order = torch.tensor([4, 0, 3, 2, 1])
    shuffled = dataclasses.replace(
        tiny_batch, phrase=tiny_batch.phrase[order], owner=tiny_batch.owner[order]
    )
    objective = GlobalLocal(GradEclip(), AlignmentOptions(kind="contrastive"))
    torch.testing.assert_close(
        objective(tiny_clip, tiny_batch).total, objective(tiny_clip, shuffled).total
    )


def test_losses_stay_in_single_precision_under_autocast(
    tiny_vit: Clip, tiny_batch: CaptionBatch
) -> None:
    """bf16 towers, fp32 maps and losses (traps: D5, D9)."""
    with torch.autocast("cpu", torch.bfloat16):
        terms = GlobalLocal(GradEclip(create_graph=True))(tiny_vit, tiny_batch)
    exact = GlobalLocal(GradEclip())(tiny_vit, tiny_batch)
    assert terms.total.dtype == torch.float32
    # bf16 keeps about three digits
    torch.testing.assert_close(terms.total, exact.total, rtol=0.03, atol=0.03)
    found = gradients(tiny_vit, terms.total)
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_methods_of_several_layers_do_not_train(tiny_vit: Clip) -> None:
    with pytest.raises(ValueError, match="Rollout needs more than the last layer"):
        GlobalLocal(Rollout()).check(tiny_vit)
    GlobalLocal(GradEclip()).check(tiny_vit)


@pytest.mark.parametrize("family", ["siglip", "resnet"])
def test_methods_of_several_layers_need_a_class_token(family: str) -> None:
    """`doctor` approved such a run, which failed in its first step."""
    clip = make_tiny_clip(family)
    with pytest.raises(UnsupportedTowerError, match=r"Game follows .*explainer=grad_eclip"):
        GlobalLocal(Game(), maps_from="start").check(clip)
    GlobalLocal(GradEclip(), maps_from="start").check(clip)


def test_a_tower_without_maps_is_refused_before_training() -> None:
    clip = make_tiny_clip("vit")
    clip.image = image_tower(timm_vit(class_token=False, global_pool="avg"))
    with pytest.raises(UnsupportedTowerError, match="no heat maps, so no local loss"):
        GlobalLocal(GradEclip()).check(clip)
    GlobalOnly().check(clip)
