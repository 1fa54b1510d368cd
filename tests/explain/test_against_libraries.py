"""Methods against slow versions in the library's own graph: CLIPs, classifiers and BLIP."""

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
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.other.classifier import Classifier, ImageModel
from gradeclip_ft.models.trace import UnsupportedTowerError
from tests.explain.oracle import Seen, written_out, zero_one
from tests.tiny import FAMILIES, images, make_tiny_clip, make_tiny_text
from tests.tiny_foreign import (
    CLASSES,
    CLASSIFIERS,
    library_embedding,
    make_tiny_blip,
    make_tiny_classifier,
    observed,
)

CLIPS = ("vit", "vit_layer_scale", "eva02", "eva_post_norm", "dinov2")
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
ONE = torch.tensor([0])
CLASS = 3


def make(kind: str) -> ImageModel:
    if kind == "blip":
        return make_tiny_blip()
    return make_tiny_classifier(kind) if kind in CLASSIFIERS else make_tiny_clip(kind)


@pytest.fixture(params=[*CLIPS, *CLASSIFIERS, "blip"])
def model(request: pytest.FixtureRequest) -> ImageModel:
    return make(request.param)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def target_of(model: ImageModel) -> torch.Tensor:
    """A text; of a classifier the unit vector of a class."""
    if isinstance(model, Classifier):
        return nn.functional.one_hot(torch.tensor([CLASS]), CLASSES).float()
    return torch.randn(1, 16, generator=torch.Generator().manual_seed(3))


def library(
    model: ImageModel, pixels: torch.Tensor, **how: object
) -> tuple[torch.Tensor, list[Seen]]:
    """What is explained, by the library alone, and its attention: a cosine, or a class's logit."""
    inner = model.model.visual if isinstance(model, Clip) else model.model
    with observed(inner, **how) as seen:
        embedding = library_embedding(inner, pixels)
    if isinstance(model, Classifier):
        return embedding[0, CLASS], seen
    return nn.functional.cosine_similarity(embedding, target_of(model)).sum(), seen


def patches(row: torch.Tensor) -> torch.Tensor:
    return row[-16:].reshape(4, 4).detach()


def test_raw_attention_is_the_librarys_own(model: ImageModel, pixels: torch.Tensor) -> None:
    _, seen = library(model, pixels)
    heat = explain_image(RawAttention(), model, pixels, target_of(model), ONE)[0]
    torch.testing.assert_close(heat, patches(seen[-1].weights[0, :, 0].mean(0)), **CLOSE)


@pytest.mark.parametrize("layers", ["all", "last"])
def test_rollout_is_the_product_through_the_layers(
    model: ImageModel, pixels: torch.Tensor, layers: str
) -> None:
    _, seen = library(model, pixels)
    product = identity = torch.eye(seen[0].weights.shape[-1])
    for call in seen if layers == "all" else seen[-1:]:
        mixed = call.weights[0].mean(0) + identity
        product = (mixed / mixed.sum(1, keepdim=True)) @ product
    heat = explain_image(Rollout(layers), model, pixels, target_of(model), ONE)[0]
    torch.testing.assert_close(heat, patches(product[0]), **CLOSE)


@pytest.mark.parametrize("layers", ["all", "last"])
def test_game_weighs_attention_with_the_gradient_of_the_logit(
    model: ImageModel, pixels: torch.Tensor, layers: str
) -> None:
    """Catches the cosine, whose small gradient hides all products of two layers."""
    score, seen = library(model, pixels)
    used = seen if layers == "all" else seen[-1:]
    logit = score * model.log_scale.detach().exp() if isinstance(model, Clip) else score
    gradients = torch.autograd.grad(logit, [call.weights for call in used])
    relevance = torch.eye(seen[0].weights.shape[-1])
    for call, gradient in zip(used, gradients, strict=True):
        relevance = relevance + (call.weights * gradient)[0].clamp(min=0).mean(0) @ relevance
    heat = explain_image(Game(layers), model, pixels, target_of(model), ONE)[0]
    torch.testing.assert_close(heat, patches(relevance[0]), **CLOSE)


def last_block(model: ImageModel) -> nn.Module:
    inner = model.model.visual if isinstance(model, Clip) else model.model
    inner = getattr(inner, "trunk", getattr(inner, "vision_model", inner))
    if hasattr(inner, "encoder"):
        return inner.encoder.layers[-1]
    return inner.blocks[-1] if hasattr(inner, "blocks") else inner.transformer.resblocks[-1]


@pytest.mark.parametrize("heads", ["one", "all"])
def test_grad_cam_equals_the_gradient_through_the_librarys_block(
    model: ImageModel, pixels: torch.Tensor, heads: str
) -> None:
    """Catches a replay whose gradient misses a path, and another score than the authors'."""
    kept: list[torch.Tensor] = []
    keep = last_block(model).register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    score, _ = library(model, pixels, single_head_from=1 if heads == "one" else None)
    keep.remove()
    (gradient,) = torch.autograd.grad(score, kept[0])
    expected = patches((kept[0] @ gradient.mean(1)[0])[0]).clamp(min=0)
    heat = explain_image(GradCam(heads), model, pixels, target_of(model), ONE)[0]
    torch.testing.assert_close(heat, expected, **CLOSE)


def deep(seen: list[Seen], gradients, query: int, words: slice, among: slice, relu: str):
    """Σ over layers of λ Σ_c w_c v, position by position."""
    total = torch.zeros(seen[0].rows("k").shape[1])
    for call, gradient in zip(seen, gradients, strict=True):
        weight = gradient.transpose(1, 2).flatten(2)[0, query]
        q, k, v = (call.rows(name)[0] for name in "qkv")
        similar = nn.functional.cosine_similarity(q[query][None], k, dim=1)
        low, high = similar[among].min(), similar[among].max()
        one = (similar - low) / (high - low) * (v @ weight)
        total = total + (one.clamp(min=0) if relu == "layer" else one)
    return total.clamp(min=0)[words].detach()


PATCHES = slice(-16, None)


@pytest.mark.parametrize("depth", [1, 2])
def test_grad_eclip_sums_layers_of_one_head(
    model: ImageModel, pixels: torch.Tensor, depth: int
) -> None:
    """The last layers run with one head, so the pass itself is another one."""
    score, seen = library(model, pixels, single_head_from=2 - depth)
    used = seen[2 - depth :]
    gradients = torch.autograd.grad(score, [call.o for call in used])
    expected = deep(used, gradients, 0, PATCHES, PATCHES, "layer").view(4, 4)
    assert expected.max() > 0
    for method in [GradEclipDeep(depth)] + [GradEclip()] * (depth == 1):
        heat = explain_image(method, model, pixels, target_of(model), ONE)[0]
        torch.testing.assert_close(heat, expected, **CLOSE)


def test_the_published_scale_of_blip(pixels: torch.Tensor) -> None:
    """The authors' notebook: one head, with the factor of the layer's own."""
    blip = make_tiny_blip()
    score, seen = library(blip, pixels, single_head_from=1, head_scale=True)
    gradients = torch.autograd.grad(score, [seen[-1].o])
    expected = deep(seen[-1:], gradients, 0, PATCHES, PATCHES, "layer").view(4, 4)
    heat = explain_image(GradEclip(scale="head"), blip, pixels, target_of(blip), ONE)[0]
    torch.testing.assert_close(heat, expected, **CLOSE)
    other = explain_image(GradEclip(), blip, pixels, target_of(blip), ONE)[0]
    assert not torch.allclose(heat, other, rtol=1e-3)


@pytest.mark.parametrize("kind", [*FAMILIES, *CLASSIFIERS, "blip"])
def test_integrated_gradients_are_complete(kind: str) -> None:
    """The signed map sums to S(x) - S(x0), to 1 %, for a logit as for a cosine."""
    model = make(kind)
    pixels = images(model, 1)
    method = IntegratedGradients(steps=200, signed=True)
    heat = explain_image(method, model, pixels, target_of(model), ONE)
    area = pixels[0, 0].numel() / heat[0].numel()
    with torch.no_grad():
        difference = float(library(model, pixels)[0] - library(model, 0 * pixels)[0])
    assert float(heat.sum() * area) == pytest.approx(difference, rel=1e-2, abs=1e-3)


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


@pytest.mark.parametrize("reverse", [False, True])
def test_itsm_matches_the_tokens_behind_the_last_block(reverse: bool) -> None:
    clip = make_tiny_clip("vit")
    pixels, target, kept = images(clip, 1), torch.randn(16), []
    visual = clip.model.visual
    handle = visual.transformer.register_forward_hook(lambda *call: kept.append(call[2]))
    visual(pixels)
    handle.remove()
    rows = (visual.ln_post(kept[0]) @ visual.proj)[0, 1:]
    expected = zero_one(nn.functional.cosine_similarity(rows, target[None]))
    expected = (1 - expected if reverse else expected).view(4, 4).detach()
    heat = explain_image(Itsm(reverse), clip, pixels, target[None], ONE)[0]
    torch.testing.assert_close(heat, expected, **CLOSE)


@pytest.mark.parametrize("others", [0, 3])
def test_clip_surgery_has_a_second_path_of_values(others: int) -> None:
    """ViT, both layers: z gains W_o softmax(v vᵀ) v, head by head, without MLP."""
    clip = make_tiny_clip("vit")
    pixels, target = images(clip, 1), nn.functional.normalize(torch.randn(1, 16))
    texts = nn.functional.normalize(torch.randn(max(others, 1), 16), dim=1)
    visual = clip.model.visual
    with written_out() as seen:  # with a graph: without, torch takes another way
        embedding = nn.functional.normalize(visual(pixels)).detach()
    with torch.no_grad():
        z = visual._embeds(pixels)
        for call, block in zip(seen, visual.transformer.resblocks, strict=True):
            v = call.v  # (1, A, N, c)
            o = (v @ v.transpose(2, 3) / v.shape[-1] ** 0.5).softmax(-1) @ v
            z = z + block.attn.out_proj(o.transpose(1, 2).flatten(2))
        rows = nn.functional.normalize(visual.ln_post(z) @ visual.proj, dim=-1)[0, 1:]
        if others:
            every = torch.cat([target, texts])
            prob = (2 * embedding @ every.T).softmax(-1)[0]
            weight = prob / prob.mean()
            product = rows[:, None] * every[None] * weight[None, :, None]  # (n, M, D)
            expected = (product[:, 0] - product.mean(1)).sum(1)
        else:
            expected = rows @ (target - texts)[0]
    method = ClipSurgery(depth=2, others=["x"] * others, embedded=texts)
    heat = explain_image(method, clip, pixels, target, ONE)[0]
    torch.testing.assert_close(heat, expected.view(4, 4), **CLOSE)


def test_clip_surgery_without_texts_says_so() -> None:
    clip = make_tiny_clip("vit")
    with pytest.raises(ValueError, match=r"call prepare\(loaded\) first"):
        explain_image(ClipSurgery(depth=2), clip, images(clip, 1), torch.randn(1, 16), ONE)


METHODS = [Rollout(), Game(), GradEclipDeep(2), Itsm(), RawAttention()]
OTHERS = [GradEclip(), GradCam(), Rise(masks=6), M2ib(steps=2), IntegratedGradients(steps=3)]


@pytest.mark.parametrize("method", [*METHODS, *OTHERS], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("kind", ["eva02", "torchvision"])
def test_batched_calls_equal_single_ones(kind: str, method: object) -> None:
    """Several pictures and targets; nothing is left in the model."""
    if kind == "torchvision" and isinstance(method, Itsm):
        return  # compares with texts
    model = make(kind)
    pixels, target = torch.randn(3, 3, 32, 32), torch.randn(4, 16 if kind == "eva02" else CLASSES)
    owner = torch.tensor([2, 0, 0, 1])
    heat = explain_image(method, model, pixels, target, owner)
    assert heat.shape == (4, 4, 4)
    for row, image in enumerate(owner.tolist()):
        single = explain_image(method, model, pixels[image, None], target[row, None], ONE)
        torch.testing.assert_close(heat[row, None], single, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("method", METHODS[:4], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("family", ["siglip", "coca", "resnet"])
def test_pooled_towers_say_what_works(method: object, family: str) -> None:
    clip = make_tiny_clip(family)
    with pytest.raises(UnsupportedTowerError, match=r"pooled by attention.* choose grad_eclip"):
        explain_image(method, clip, images(clip, 1), torch.randn(1, 16), ONE)


def test_a_depth_beyond_the_tower_means_all_its_layers() -> None:
    clip = make_tiny_clip("vit")
    pixels, target = images(clip, 1), torch.randn(1, 16)
    eight, all_two = (
        explain_image(GradEclipDeep(depth), clip, pixels, target, ONE) for depth in (8, 2)
    )
    torch.testing.assert_close(eight, all_two, rtol=0, atol=0)
    with pytest.raises(ValueError, match="depth is 0; choose 1 to 2 layers"):
        explain_image(GradEclipDeep(0), clip, pixels, target, ONE)


TEXT = torch.tensor([[2, 7, 9, 11, 49, 0, 0, 0], [2, 5, 49, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("depth", [1, 2])
def test_deep_grad_eclip_of_a_text(depth: int) -> None:
    """Layers are summed before the positive part; λ over what the end of the text sees."""
    clip, target = make_tiny_text("causal"), torch.randn(2, 16)
    method = GradEclipDeep(depth, relu_at="sum", minmax_over="visible")
    got = explain_text(method, clip, TEXT, target, torch.tensor([0, 1]))
    for row, end in enumerate((4, 2)):
        full = nn.functional.pad(TEXT[row : row + 1], (0, 16))
        with written_out(single_head_from=2 - depth) as seen:
            embedding = clip.model.encode_text(full)
        score = nn.functional.cosine_similarity(embedding, target[row : row + 1]).sum()
        used = seen[2 - depth :]
        gradients = torch.autograd.grad(score, [call.o for call in used])
        words = deep(used, gradients, end, slice(1, end), slice(0, end + 1), "sum")
        expected = words / words.sum() if words.sum() > 0 else words
        torch.testing.assert_close(got[row, 1:end], expected, **CLOSE)
        assert not got[row, end:].any()
        assert got[row, 0] == 0


@pytest.mark.parametrize("family", ["causal", "siglip", "coca", "bert", "roberta", "blip"])
@pytest.mark.parametrize(
    "method", [*METHODS[:3], RawAttention(), GradEclip()], ids=lambda m: type(m).__name__
)
def test_word_relevance_is_a_share_of_the_words(method: object, family: str) -> None:
    clip = make_tiny_blip() if family == "blip" else make_tiny_text(family)
    pad, end = (1 if family in ("siglip", "roberta") else 0), (3 if family == "blip" else 49)
    texts = torch.full((2, 24), pad)
    texts[0, :6] = torch.tensor([2, 7, 9, 11, 10, end])
    texts[1, :4] = torch.tensor([2, 5, 8, end])
    found = explain_text(method, clip, texts, torch.randn(3, 16), torch.tensor([1, 0, 0]))
    assert found.shape[0] == 3
    assert (found >= 0).all()
    total = found.sum(1)
    assert ((total - 1).abs() < 1e-5).logical_or(total == 0).all()
    assert not found[0, 4:].any()
