"""Copies of the model: what they see, when they move, and maps that are theirs."""

import copy
import dataclasses
import gc

import pytest
import torch

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.base import Explainer, explain_image
from gradeclip_ft.explain.game import Game
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.explain.grad_eclip_deep import GradEclipDeep
from gradeclip_ft.losses import AlignmentOptions
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.objectives import base
from gradeclip_ft.objectives import step as steps
from gradeclip_ft.objectives.base import Composed
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.keep import Keep
from gradeclip_ft.objectives.step import Step, Teacher
from gradeclip_ft.training.optim import freeze, parameter_groups
from tests.tiny import make_tiny_clip


def moved(clip: Clip) -> Clip:
    """The same clip with other weights; its copies keep theirs."""
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


@pytest.mark.parametrize("explainer", [GradEclip(), Game(), GradEclipDeep(depth=2)], ids=str)
def test_frozen_maps_are_those_of_the_model_before_it_moved(
    explainer: Explainer, tiny_clip: Clip, tiny_batch: CaptionBatch
) -> None:
    """Images and phrases of the start; would catch a copy whose adapters read the moved model."""
    before = tiny_clip.text.encode(tiny_batch.distinct)[tiny_batch.phrase].detach()
    expected = explain_image(explainer, tiny_clip, tiny_batch.images, before, tiny_batch.owner)
    objective = GlobalLocal(explainer, maps_from="start")
    objective.check(tiny_clip)
    objective.begin(tiny_clip)
    step = Step(moved(tiny_clip), tiny_batch, objective.teachers)
    torch.testing.assert_close(objective.maps(step), expected, rtol=1e-4, atol=1e-7)
    assert not objective.maps(step).requires_grad


def test_maps_in_parts_are_the_same(
    tiny_vit: Clip, tiny_batch: CaptionBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = GlobalLocal(Game(), maps_from="start")
    objective.begin(tiny_vit)
    whole = objective.maps(Step(tiny_vit, tiny_batch, objective.teachers))
    monkeypatch.setattr(steps, "ROWS", 2)
    parts = objective.maps(Step(tiny_vit, tiny_batch, objective.teachers))
    torch.testing.assert_close(parts, whole)


def test_a_step_before_the_model_moves_has_the_loss_of_its_own_stopped_maps(
    tiny_clip: Clip, tiny_batch: CaptionBatch
) -> None:
    """The whole objective, gradient included: only the origin of the map differs."""
    own, frozen = GlobalLocal(GradEclip()), GlobalLocal(GradEclip(), maps_from="start")
    frozen.begin(tiny_clip)
    found = []
    for objective in (own, frozen):
        tiny_clip.zero_grad()
        objective(tiny_clip, tiny_batch).total.backward()
        found.append({n: p.grad.clone() for n, p in tiny_clip.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_a_step_frees_what_it_computed(tiny_vit: Clip, tiny_batch: CaptionBatch) -> None:
    """Without waiting for Python to look for cycles, which took gigabytes of memory in between."""
    objective = GlobalLocal(Game(), maps_from="start", terms={"keep": Keep(text=1.0)})
    objective.begin(tiny_vit)
    objective(tiny_vit, tiny_batch).total.backward()  # the gradients stay
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        objective(tiny_vit, tiny_batch).total.backward()
        assert tensors() == before
    finally:
        gc.enable()


def tensors() -> int:
    """How many there are that Python's collector knows."""
    return sum(type(each) is torch.Tensor for each in gc.get_objects())


def test_no_phrase_needs_no_map(
    tiny_vit: Clip, tiny_batch: CaptionBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a pass of the copy, which sees the one image of `drift` alone."""
    monkeypatch.setattr(base, "FEW", 1)
    empty = dataclasses.replace(
        tiny_batch,
        distinct=tiny_batch.distinct[:0],
        identity=tiny_batch.identity[:0],
        phrase=tiny_batch.phrase[:0],
        owner=tiny_batch.owner[:0],
    )
    objective = GlobalLocal(Game(), maps_from="start")
    objective.begin(tiny_vit)
    seen: list[int] = []
    first = objective.teachers["start"].clip.model.visual.transformer.resblocks[0]
    first.register_forward_hook(lambda *call: seen.append(len(call[2])))
    assert objective(tiny_vit, empty).parts["local"] == 0
    assert seen == [1]


def test_the_average_follows_and_the_start_does_not(tiny_vit: Clip) -> None:
    objective = Composed(terms={"a": Keep(), "b": Keep(teacher="ema")}, ema_momentum=0.75)
    objective.begin(tiny_vit)
    name = "model.visual.conv1.weight"
    start = tiny_vit.state_dict()[name].clone()
    average = start.clone()
    for _ in range(2):
        moved(tiny_vit)
        objective.after_step(tiny_vit, 0)
        average = 0.75 * average + 0.25 * tiny_vit.state_dict()[name]
    state = objective.state_dict()
    assert torch.equal(state[f"teachers.start.clip.{name}"], start)
    torch.testing.assert_close(state[f"teachers.ema.clip.{name}"], average)


def test_a_teacher_does_not_learn_and_shares_what_is_frozen(tiny_vit: Clip) -> None:
    freeze(tiny_vit.model, train_text=False, image_blocks=1)
    teacher = Teacher(tiny_vit)
    teacher.train()
    assert not any(part.training for part in teacher.modules())
    assert parameter_groups(teacher.named_parameters(), weight_decay=0.1) == []
    pairs = list(zip(tiny_vit.parameters(), teacher.clip.parameters(), strict=True))
    assert all((own is theirs) != own.requires_grad for own, theirs in pairs)


def test_only_the_copies_that_are_asked_exist() -> None:
    clip = make_tiny_clip("vit")
    for objective, names in (
        (Composed(), []),
        (GlobalLocal(GradEclip()), []),
        (GlobalLocal(GradEclip(), maps_from="ema"), ["ema"]),
        (GlobalLocal(GradEclip(), maps_from="ema", terms={"keep": Keep()}), ["ema", "start"]),
    ):
        objective.begin(clip)
        assert list(objective.teachers) == names


def test_drift_is_logged_beside_a_start_model(tiny_vit: Clip, tiny_batch: CaptionBatch) -> None:
    objective = Composed(terms={"keep": Keep()})
    objective.begin(tiny_vit)
    still = objective(tiny_vit, tiny_batch).parts
    assert still["patch_cosine"].item() == pytest.approx(1, abs=1e-5)
    assert still["patch_gram"].item() == pytest.approx(0, abs=1e-9)
    start = copy.deepcopy(tiny_vit.image.trace(tiny_batch.images).dense().detach())
    there = objective(moved(tiny_vit), tiny_batch).parts
    now = tiny_vit.image.trace(tiny_batch.images).dense().detach()
    cosines = torch.nn.functional.cosine_similarity(now, start, dim=-1)
    torch.testing.assert_close(there["patch_cosine"], cosines.mean())
    changes = []
    for image in range(len(now)):
        for i in now[image].flatten(0, 1), start[image].flatten(0, 1):
            rows = [row / row.norm() for row in i]
            changes.append(torch.stack([torch.stack([a @ b for b in rows]) for a in rows]))
    expected = torch.stack(
        [(a - b).square().mean() for a, b in zip(changes[::2], changes[1::2], strict=True)]
    ).mean()
    torch.testing.assert_close(there["patch_gram"], expected, rtol=1e-4, atol=1e-7)


def test_a_learned_temperature_of_the_local_loss_is_a_weight(
    tiny_vit: Clip, tiny_batch: CaptionBatch
) -> None:
    learned = AlignmentOptions(kind="contrastive", temperature="learned")
    fixed = AlignmentOptions(kind="contrastive", temperature=0.07)
    objective = GlobalLocal(GradEclip(), learned)
    terms = objective(tiny_vit, tiny_batch)
    torch.testing.assert_close(
        terms.parts["local"], GlobalLocal(GradEclip(), fixed)(tiny_vit, tiny_batch).parts["local"]
    )
    terms.total.backward()
    (parameter,) = objective.parameters()
    assert parameter.grad.abs() > 0
