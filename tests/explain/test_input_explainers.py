"""Methods with forward passes of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from torch import nn

from gradeclip_ft.explain.base import Explainer, explain_image, explain_text
from gradeclip_ft.explain.game import Game
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.explain.integrated_gradients import IntegratedGradients
from gradeclip_ft.explain.m2ib import M2ib, information
from gradeclip_ft.explain.rise import Rise
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.tower import Tower, opaque_tower
from gradeclip_ft.models.trace import UnsupportedTowerError
from tests.tiny import images, make_tiny_clip, make_tiny_text

ONE = torch.tensor([0])


def test_rise_does_not_depend_on_its_batch_size(any_clip: Clip) -> None:
    pixels, target = images(any_clip, 2), torch.randn(3, 16)
    owner = torch.tensor([1, 0, 1])
    first = explain_image(Rise(masks=20, batch_size=7), any_clip, pixels, target, owner)
    again = explain_image(Rise(masks=20, batch_size=20), any_clip, pixels, target, owner)
    torch.testing.assert_close(first, again, rtol=1e-4, atol=1e-5)
    other = explain_image(Rise(masks=20, seed=1), any_clip, pixels, target, owner)
    assert not torch.allclose(first, other)


def one_pixel(y: int, x: int) -> Tower:
    """A tower whose embedding turns by the value of one pixel."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        value = pixels[:, 0, y, x]
        return torch.stack([value, torch.ones_like(value)], dim=1)

    return replace(opaque_tower(encode, "a pixel has no layers"), patch=8)


@pytest.mark.parametrize("method", [Rise(masks=400), IntegratedGradients(steps=20)])
def test_a_score_of_one_pixel_is_found_there(method: Rise | IntegratedGradients) -> None:
    """Catches swapped axes and shifted grids: the pixel lies in patch (1, 3)."""
    pixels = torch.ones(1, 3, 32, 48)
    target = torch.tensor([[1.0, 0.0]])
    heat = method.from_input(one_pixel(12, 28), pixels, target, ONE)
    assert heat.shape == (1, 4, 6)
    assert divmod(int(heat[0].argmax()), 6) == (1, 3)


def test_rise_is_the_sum_over_its_masks() -> None:
    """Slow version: one mask, one picture, one phrase at a time."""
    clip, method = make_tiny_clip("vit"), Rise(masks=12)
    pixels, target = images(clip, 1), nn.functional.normalize(torch.randn(1, 16))
    masks = torch.stack([method.mask(number, 32, 32) for number in range(12)])
    assert 0.2 < masks.mean() < 0.8
    assert masks.min() >= 0
    assert masks.max() <= 1
    total = torch.zeros(32, 32)
    for mask in masks:
        with torch.no_grad():
            embedding = clip.model.encode_image(pixels * mask)
        total += nn.functional.cosine_similarity(embedding, target).item() * mask
    expected = (total / (12 * 0.5)).view(4, 8, 4, 8).mean((1, 3))
    heat = explain_image(method, clip, pixels, target, ONE)[0]
    torch.testing.assert_close(heat, expected, rtol=1e-4, atol=1e-5)


def published_m2ib(
    block: nn.Module, embed: Callable[[int], torch.Tensor], target: torch.Tensor, steps: int
) -> torch.Tensor:
    """The authors' loop around a library's own model: the output of a block is replaced.

    They keep the map of each step before its update, so the last update is never seen.
    """
    kept: list[torch.Tensor] = []
    handle = block.register_forward_hook(lambda *call: kept.append(call[2]))
    with torch.no_grad():
        embed(1)
    handle.remove()
    x, generator = kept[0], torch.Generator().manual_seed(0)
    alpha = torch.full_like(x, 5.0, requires_grad=True)
    optimizer = torch.optim.Adam([alpha], lr=1.0)
    for _ in range(steps):
        m = alpha.sigmoid()
        capacity = -0.5 * (1 + (1 - m).square().log() - (x * m).square() - (1 - m).square())
        noise = torch.randn((10, *x.shape[1:]), generator=generator)
        narrowed = x * m + (1 - m) * noise
        handle = block.register_forward_hook(lambda *_, found=narrowed: found)
        match = nn.functional.cosine_similarity(embed(10), target[None]).mean()
        handle.remove()
        optimizer.zero_grad()
        (0.1 * capacity.mean() - match).backward(inputs=[alpha])
        optimizer.step()
    return capacity.sum(-1)[0].detach()


@pytest.mark.parametrize("steps", [1, 10])
def test_m2ib_is_the_published_one(steps: int) -> None:
    """Layer 0 is narrowed after the first block; the map is that before the last update."""
    clip, target = make_tiny_clip("vit"), torch.randn(16)
    pixels, visual = images(clip, 1), clip.model.visual
    expected = published_m2ib(
        visual.transformer.resblocks[0],
        lambda count: visual(pixels.expand(count, -1, -1, -1)),
        target,
        steps,
    )
    heat = explain_image(M2ib(layer=0, steps=steps), clip, pixels, target[None], ONE)[0]
    torch.testing.assert_close(heat, expected[1:].view(4, 4), rtol=1e-4, atol=1e-4)


def test_m2ib_of_a_text_is_the_published_one() -> None:
    clip, target = make_tiny_text("causal"), torch.randn(16)
    texts = torch.tensor([[2, 7, 9, 11, 49] + [0] * 19])
    expected = published_m2ib(
        clip.model.text.transformer.resblocks[0],
        lambda count: clip.model.encode_text(texts.expand(count, -1)),
        target,
        10,
    )[1:4]
    found = explain_text(M2ib(layer=0), clip, texts, target[None], ONE)[0, 1:4]
    torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-3, atol=1e-5)


def test_information_is_the_divergence_of_two_normals() -> None:
    """torch.distributions is the oracle."""
    x, alpha = torch.randn(5), torch.randn(5)
    passed = alpha.sigmoid()
    normal = torch.distributions.Normal(x * passed, 1 - passed)
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(information(x, alpha), expected)


@pytest.mark.parametrize("family", ["causal", "siglip", "coca", "bert"])
def test_m2ib_explains_texts(family: str) -> None:
    clip = make_tiny_text(family)
    texts = torch.full((1, 24), 1 if family == "siglip" else 0)
    texts[0, :6] = torch.tensor([2, 7, 9, 11, 13, 49])
    found = explain_text(M2ib(), clip, texts, torch.randn(2, 16), torch.tensor([0, 0]))
    assert found.sum(1).tolist() == pytest.approx([1.0, 1.0])


def test_methods_on_pixels_refuse_texts() -> None:
    clip = make_tiny_text("causal")
    texts = torch.tensor([[2, 7, 49] + [0] * 21])
    with pytest.raises(ValueError, match="explains images alone"):
        explain_text(Rise(masks=2), clip, texts, torch.randn(1, 16), ONE)


def test_a_layer_that_is_not_there_is_refused() -> None:
    clip = make_tiny_clip("siglip")
    with pytest.raises(ValueError, match="layer is 9 of 2; use 0 to 1, or null for 1"):
        explain_image(M2ib(9), clip, images(clip, 1), torch.randn(1, 16), ONE)


def test_a_tower_without_layers_cannot_do_m2ib() -> None:
    """Would crash an evaluation that leaves out what a tower cannot do."""
    clip = make_tiny_clip("resnet")
    with pytest.raises(UnsupportedTowerError, match="has one alone; choose grad_eclip"):
        explain_image(M2ib(), clip, images(clip, 1), torch.randn(1, 16), ONE)


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        (Rise, {"masks": 0}),
        (Rise, {"keep": 0.0}),
        (Rise, {"cells": 0}),
        (IntegratedGradients, {"steps": 0}),
        (IntegratedGradients, {"batch_size": 0}),
        (M2ib, {"steps": 0}),
        (M2ib, {"samples": 0}),
    ],
)
def test_impossible_settings_are_refused(method: type, setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))}.* is 0|is .*0"):
        method(**setting)


def test_information_of_what_passes_whole_is_large_and_finite() -> None:
    """σ(α) rounds to 1; the logarithm of 0 would be infinite, and was drawn as no relevance."""
    kept = information(torch.ones(3), torch.full((3,), 100.0))
    assert kept.isfinite().all()
    assert (kept > information(torch.ones(3), torch.full((3,), 8.0))).all()


def test_methods_on_pixels_need_a_patch_size() -> None:
    clip = make_tiny_clip("vit")
    clip.image = opaque_tower(clip.model.visual, "image tower averages its tokens")
    for method in (Rise(masks=2), IntegratedGradients(steps=2)):
        with pytest.raises(UnsupportedTowerError, match="averages its tokens: it has no grid"):
            explain_image(method, clip, torch.randn(1, 3, 32, 32), torch.randn(1, 16), ONE)


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "method",
    [GradEclip(), Game(), Rise(masks=2), IntegratedGradients(steps=2), M2ib(steps=2, samples=1)],
    ids=lambda method: type(method).__name__,
)
def test_methods_work_where_gradients_are_off(
    method: Explainer, surroundings: Callable[[], AbstractContextManager[None]]
) -> None:
    """Evaluators run without gradients; methods need them, and leave the switch as it was."""
    clip = make_tiny_clip("vit")
    expected = explain_image(method, clip, images(clip, 1), torch.ones(1, 16), ONE)
    with surroundings():
        pixels, target = images(clip, 1), torch.ones(1, 16)
        found = explain_image(method, clip, pixels, target, ONE)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
