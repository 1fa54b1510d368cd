"""Methods over several layers against slow versions in the library's own graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradeclip_ft.explain.base import explain_image, explain_text
from gradeclip_ft.explain.clip_surgery import ClipSurgery
from gradeclip_ft.explain.game import Game
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.explain.grad_eclip_deep import GradEclipDeep
from gradeclip_ft.explain.itsm import Itsm
from gradeclip_ft.explain.raw_attention import RawAttention
from gradeclip_ft.explain.rollout import Rollout
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.trace import UnsupportedTowerError
from tests.explain.oracle import Seen, written_out, zero_one
from tests.tiny import images, make_tiny_clip, make_tiny_text

FAMILIES = ("vit", "vit_layer_scale", "eva02", "eva_post_norm", "dinov2")
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
ONE = torch.tensor([0])


@pytest.fixture(params=FAMILIES)
def clip(request: pytest.FixtureRequest) -> Clip:
    return make_tiny_clip(request.param)


def library(clip: Clip, pixels: torch.Tensor, target: torch.Tensor, **how: int):
    """Score and attention calls of the library's own pass."""
    with written_out(**how) as seen:
        embedding = clip.model.visual(pixels)
    return nn.functional.cosine_similarity(embedding, target[None]).sum(), seen


def patches(row: torch.Tensor) -> torch.Tensor:
    return row[-16:].reshape(4, 4)


def test_raw_attention_is_the_librarys_own(clip: Clip) -> None:
    pixels, target = images(clip, 1), torch.randn(16)
    _, seen = library(clip, pixels, target)
    expected = patches(seen[-1].weights[0, :, 0].mean(0))
    heat = explain_image(RawAttention(), clip, pixels, target[None], ONE)[0]
    torch.testing.assert_close(heat, expected, **CLOSE)


@pytest.mark.parametrize("layers", ["all", "last"])
def test_rollout_is_the_product_through_the_layers(clip: Clip, layers: str) -> None:
    pixels, target = images(clip, 1), torch.randn(16)
    _, seen = library(clip, pixels, target)
    count = seen[0].weights.shape[-1]
    product = torch.eye(count)
    for call in seen if layers == "all" else seen[-1:]:
        mixed = call.weights[0].mean(0) + torch.eye(count)
        product = (mixed / mixed.sum(1, keepdim=True)) @ product
    heat = explain_image(Rollout(layers), clip, pixels, target[None], ONE)[0]
    torch.testing.assert_close(heat, patches(product[0]), **CLOSE)


@pytest.mark.parametrize("layers", ["all", "last"])
def test_game_weighs_attention_with_the_gradient_of_the_logit(clip: Clip, layers: str) -> None:
    """Catches the cosine, whose small gradient hides all products of two layers."""
    pixels, target = images(clip, 1), torch.randn(16)
    score, seen = library(clip, pixels, target)
    used = seen if layers == "all" else seen[-1:]
    logit = score * clip.model.logit_scale.detach().exp()
    gradients = torch.autograd.grad(logit, [call.weights for call in used])
    relevance = torch.eye(seen[0].weights.shape[-1])
    for call, gradient in zip(used, gradients, strict=True):
        relevance = relevance + (call.weights * gradient)[0].clamp(min=0).mean(0) @ relevance
    heat = explain_image(Game(layers), clip, pixels, target[None], ONE)[0]
    torch.testing.assert_close(heat, patches(relevance[0]).detach(), **CLOSE)


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


@pytest.mark.parametrize("depth", [1, 2])
def test_deep_grad_eclip_sums_layers_of_one_head(clip: Clip, depth: int) -> None:
    """The last layers run with one head, so the pass itself is another one."""
    pixels, target = images(clip, 1), torch.randn(16)
    score, seen = library(clip, pixels, target, single_head_from=2 - depth)
    used = seen[2 - depth :]
    gradients = torch.autograd.grad(score, [call.o for call in used])
    patch = slice(-16, None)
    expected = deep(used, gradients, 0, patch, patch, "layer").view(4, 4)
    heat = explain_image(GradEclipDeep(depth), clip, pixels, target[None], ONE)[0]
    torch.testing.assert_close(heat, expected, **CLOSE)


def test_one_layer_of_the_deep_version_is_the_fast_one(clip: Clip) -> None:
    pixels, target = images(clip, 3), torch.randn(4, 16)
    owner = torch.tensor([2, 0, 0, 1])
    fast = explain_image(GradEclip(), clip, pixels, target, owner)
    torch.testing.assert_close(
        explain_image(GradEclipDeep(1), clip, pixels, target, owner), fast, **CLOSE
    )


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


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_batched_calls_equal_single_ones(method: object) -> None:
    clip = make_tiny_clip("eva02")
    pixels, target = images(clip, 3), torch.randn(4, 16)
    owner = torch.tensor([2, 0, 0, 1])
    heat = explain_image(method, clip, pixels, target, owner)
    for row, image in enumerate(owner.tolist()):
        single = explain_image(method, clip, pixels[image : image + 1], target[row : row + 1], ONE)
        torch.testing.assert_close(heat[row : row + 1], single, **CLOSE)
    assert all(parameter.grad is None for parameter in clip.parameters())


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


@pytest.mark.parametrize("family", ["causal", "siglip", "coca", "bert", "roberta"])
@pytest.mark.parametrize(
    "method", [*METHODS[:3], RawAttention(), GradEclip()], ids=lambda m: type(m).__name__
)
def test_word_relevance_is_a_share_of_the_words(method: object, family: str) -> None:
    clip = make_tiny_text(family)
    pad = 1 if family in ("siglip", "roberta") else 0
    texts = torch.full((2, 24), pad)
    texts[0, :6] = torch.tensor([2, 7, 9, 11, 13, 49])
    texts[1, :4] = torch.tensor([2, 5, 8, 49])
    found = explain_text(method, clip, texts, torch.randn(3, 16), torch.tensor([1, 0, 0]))
    assert found.shape[0] == 3
    assert (found >= 0).all()
    total = found.sum(1)
    assert ((total - 1).abs() < 1e-5).logical_or(total == 0).all()
    assert not found[0, 4:].any()
