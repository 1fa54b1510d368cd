"""Classifiers and BLIP: methods against slow versions in the library's own graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradeclip_ft.explain.base import explain_image, explain_text
from gradeclip_ft.explain.clip_surgery import ClipSurgery
from gradeclip_ft.explain.game import Game
from gradeclip_ft.explain.grad_cam import GradCam
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.explain.grad_eclip_deep import GradEclipDeep
from gradeclip_ft.explain.integrated_gradients import IntegratedGradients
from gradeclip_ft.explain.itsm import Itsm
from gradeclip_ft.explain.m2ib import M2ib
from gradeclip_ft.explain.maskclip import MaskClip
from gradeclip_ft.explain.raw_attention import RawAttention
from gradeclip_ft.explain.rise import Rise
from gradeclip_ft.explain.rollout import Rollout
from gradeclip_ft.models.other.blip import Blip
from gradeclip_ft.models.other.classifier import ImageModel
from gradeclip_ft.models.trace import UnsupportedTowerError
from tests.explain.oracle import Seen, zero_one
from tests.tiny_foreign import (
    CLASSES,
    CLASSIFIERS,
    library_embedding,
    make_tiny_blip,
    make_tiny_classifier,
    observed,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-6}
ONE = torch.tensor([0])
CLASS = 3


@pytest.fixture(params=[*CLASSIFIERS, "blip"])
def model(request: pytest.FixtureRequest) -> ImageModel:
    if request.param == "blip":
        return make_tiny_blip()
    return make_tiny_classifier(request.param)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def target_of(model: ImageModel) -> torch.Tensor:
    """A text of BLIP's; the unit vector of a class."""
    if isinstance(model, Blip):
        return torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    return nn.functional.one_hot(torch.tensor([CLASS]), CLASSES).float()


def library(
    model: ImageModel, pixels: torch.Tensor, **how: object
) -> tuple[torch.Tensor, list[Seen]]:
    """What is explained, by the library alone: the logit of the class; BLIP's cosine."""
    with observed(model.model, **how) as seen:
        embedding = library_embedding(model.model, pixels)
    if isinstance(model, Blip):
        return nn.functional.cosine_similarity(embedding, target_of(model)).sum(), seen
    return embedding[0, CLASS], seen


def patches(row: torch.Tensor) -> torch.Tensor:
    return row[-16:].reshape(4, 4).detach()


def slow_grad_eclip(seen: list[Seen], score: torch.Tensor) -> torch.Tensor:
    """Eqs. 15, 19 and 20 on the last call, which ran with one head."""
    last = seen[-1]
    (gradient,) = torch.autograd.grad(score, last.o)
    weight = gradient.transpose(1, 2).flatten(2)[0, 0]
    q, k, v = (last.rows(name)[0].detach() for name in "qkv")
    spatial = zero_one(nn.functional.cosine_similarity(q[:1], k[-16:], dim=1))
    return (spatial * (v[-16:] @ weight)).clamp(min=0).view(4, 4)


def test_grad_eclip_of_another_head_is_its_formula(model: ImageModel, pixels: torch.Tensor) -> None:
    """The last layer runs with one head in the library's own code."""
    score, seen = library(model, pixels, single_head_from=1)
    expected = slow_grad_eclip(seen, score)
    assert expected.max() > 0
    heat = explain_image(GradEclip(), model, pixels, target_of(model), ONE)[0]
    torch.testing.assert_close(heat, expected, **CLOSE)
    deep = explain_image(GradEclipDeep(1), model, pixels, target_of(model), ONE)[0]
    torch.testing.assert_close(deep, expected, **CLOSE)


def test_the_published_scale_of_blip(pixels: torch.Tensor) -> None:
    """The authors' notebook: one head, with the factor of the layer's own."""
    blip = make_tiny_blip()
    score, seen = library(blip, pixels, single_head_from=1, head_scale=True)
    heat = explain_image(GradEclip(scale="head"), blip, pixels, target_of(blip), ONE)[0]
    torch.testing.assert_close(heat, slow_grad_eclip(seen, score), **CLOSE)
    other = explain_image(GradEclip(), blip, pixels, target_of(blip), ONE)[0]
    assert not torch.allclose(heat, other, rtol=1e-3)


def test_attention_of_another_head_is_the_librarys(model: ImageModel, pixels: torch.Tensor) -> None:
    _, seen = library(model, pixels)
    raw = explain_image(RawAttention(), model, pixels, target_of(model), ONE)[0]
    torch.testing.assert_close(raw, patches(seen[-1].weights[0, :, 0].mean(0)), **CLOSE)
    product = torch.eye(17)
    for call in seen:
        mixed = call.weights[0].mean(0) + torch.eye(17)
        product = (mixed / mixed.sum(1, keepdim=True)) @ product
    rolled = explain_image(Rollout(), model, pixels, target_of(model), ONE)[0]
    torch.testing.assert_close(rolled, patches(product[0]), **CLOSE)


def test_game_of_another_head_weighs_attention(model: ImageModel, pixels: torch.Tensor) -> None:
    score, seen = library(model, pixels)
    gradients = torch.autograd.grad(score, [call.weights for call in seen])
    relevance = torch.eye(17)
    for call, gradient in zip(seen, gradients, strict=True):
        relevance = relevance + (call.weights * gradient)[0].clamp(min=0).mean(0) @ relevance
    heat = explain_image(Game(), model, pixels, target_of(model), ONE)[0]
    torch.testing.assert_close(heat, patches(relevance[0]), **CLOSE)


def test_grad_cam_of_another_head_is_the_librarys_gradient(
    model: ImageModel, pixels: torch.Tensor
) -> None:
    """Of the score with one head in the last layer, as the authors differentiate it."""
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        kept.append(arguments[0])

    handle = last_block(model.model).register_forward_pre_hook(keep)
    score, _ = library(model, pixels, single_head_from=1)
    handle.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    expected = patches((kept[0] @ gradient.mean(1)[0])[0]).clamp(min=0)
    heat = explain_image(GradCam(), model, pixels, target_of(model), ONE)[0]
    torch.testing.assert_close(heat, expected, **CLOSE)


def last_block(library_model: nn.Module) -> nn.Module:
    if hasattr(library_model, "blocks"):
        return library_model.blocks[-1]
    if hasattr(library_model, "vision_model"):
        return library_model.vision_model.encoder.layers[-1]
    return library_model.encoder.layers[-1]


def test_integrated_gradients_add_up_to_the_score(model: ImageModel, pixels: torch.Tensor) -> None:
    """Complete to 1 %, for a logit as for a cosine."""
    method = IntegratedGradients(steps=200, signed=True)
    heat = explain_image(method, model, pixels, target_of(model), ONE)
    with torch.no_grad():
        difference = library(model, pixels)[0] - library(model, 0 * pixels)[0]
    assert abs(difference) > 1e-3
    assert float(heat.sum() * 64) == pytest.approx(float(difference), rel=1e-2)


METHODS = [GradEclip(), RawAttention(), GradCam(), Rollout(), Game(), GradEclipDeep(2)]
METHODS += [Rise(masks=6), M2ib(steps=2), IntegratedGradients(steps=3)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_classes_in_one_call_equal_single_ones(method: object) -> None:
    """Two pictures, three classes; nothing is left in the model."""
    model = make_tiny_classifier("torchvision")
    pixels, target = torch.randn(2, 3, 32, 32), torch.eye(CLASSES)[[5, 0, 3]]
    owner = torch.tensor([1, 0, 1])
    heat = explain_image(method, model, pixels, target, owner)
    assert heat.shape == (3, 4, 4)
    for row, image in enumerate(owner.tolist()):
        single = explain_image(method, model, pixels[image, None], target[row, None], ONE)
        torch.testing.assert_close(heat[row, None], single, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_pictures_of_other_sides_are_explained(model: ImageModel) -> None:
    heat = explain_image(GradEclip(), model, torch.randn(1, 3, 40, 24), target_of(model), ONE)
    assert heat.shape == (1, 5, 3)


@pytest.mark.parametrize(
    "method", [ClipSurgery(), Itsm(), MaskClip()], ids=lambda m: type(m).__name__
)
def test_methods_that_compare_with_texts_say_so(method: object, pixels: torch.Tensor) -> None:
    model = make_tiny_classifier("timm")
    with pytest.raises(
        UnsupportedTowerError, match=r"the embedding of a text, .* choose grad_eclip"
    ):
        explain_image(method, model, pixels, target_of(model), ONE)


TEXTS = torch.tensor([[2, 5, 6, 7, 3, 0, 0, 0], [2, 10, 11, 3, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    "method",
    [GradEclip(), GradEclipDeep(2), RawAttention(), Rollout(), Game()],
    ids=lambda method: type(method).__name__,
)
def test_words_of_blip_share_the_relevance(method: object) -> None:
    found = explain_text(method, make_tiny_blip(), TEXTS, torch.randn(2, 16), torch.tensor([0, 1]))
    assert found.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert not found[0, 4:].any()
    assert not found[1, 3:].any()
    assert not found[:, 0].any()
