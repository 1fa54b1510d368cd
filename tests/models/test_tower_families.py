"""Every family of image towers against its library's own forward and backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from gradeclip_ft.explain.base import explain_image, heat_from_trace
from gradeclip_ft.explain.grad_cam import GradCam
from gradeclip_ft.explain.grad_eclip import GradEclip, channel_weight
from gradeclip_ft.explain.maskclip import MaskClip
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.towers.select import image_tower
from gradeclip_ft.models.trace import UnsupportedTowerError
from tests.tiny import images, make_tiny_clip, recorded_attention, timm_vit

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums in another order, in fp32
POOLED = ("siglip", "pe", "coca", "resnet")


@torch.no_grad()
def test_the_trace_gives_the_librarys_embedding(any_clip: Clip) -> None:
    """Catches a forgotten bias, norm, layer scale, rotation, residual or projection."""
    pixels = images(any_clip, 3)
    expected = any_clip.model.visual(pixels)
    torch.testing.assert_close(any_clip.image.encode(pixels), expected, **CLOSE)
    trace = any_clip.image.trace(pixels)
    owner = torch.tensor([2, 0])
    replayed = trace.replay(trace.tokens[owner], owner)
    torch.testing.assert_close(replayed, expected[owner], **CLOSE)


def test_the_channel_weight_is_the_librarys_own_gradient(any_clip: Clip) -> None:
    """One full backward pass through the library, down to what its attention gave the query."""
    pixels, target = images(any_clip, 2), nn.functional.normalize(torch.randn(2, 16), dim=1)
    with recorded_attention() as outputs:
        embedding = any_clip.model.visual(pixels)
    score = nn.functional.cosine_similarity(embedding, target).sum()
    (gradient,) = torch.autograd.grad(score, outputs[-1])
    expected = gradient[:, :, 0].flatten(1)  # the query is the first row, heads joined
    trace = any_clip.image.trace(pixels).detach()
    weight = channel_weight(trace, target, torch.tensor([0, 1]), heads="all")
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())


def test_parameters_get_the_librarys_own_gradient(any_clip: Clip) -> None:
    """The whole tower in training: by the trace, and by the library."""
    pixels = images(any_clip, 2)
    parameters = dict(any_clip.model.visual.named_parameters())

    def gradients(embedding: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = nn.functional.normalize(embedding, dim=1)[:, :5].sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        return {name: gradient for name, gradient in pairs if gradient is not None}

    got, expected = (
        gradients(any_clip.image.encode(pixels)),
        gradients(any_clip.model.visual(pixels)),
    )
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("family", POOLED)
def test_dense_features_of_a_pool_are_its_result_for_one_token_alone(family: str) -> None:
    """A softmax over one key is 1: the library's pool on a single token is the value path."""
    clip = make_tiny_clip(family)
    trace, visual = clip.image.trace(images(clip, 2)), clip.model.visual
    grid = trace.grid[0] * trace.grid[1]
    found = []
    for row in range(trace.tokens.shape[1] - grid, trace.tokens.shape[1]):
        token = trace.tokens[:, row : row + 1]
        if family == "resnet":
            pool = visual.attnpool
            found.append(pool.c_proj(pool.v_proj(token[:, 0])))
        elif family == "coca":
            found.append(visual.ln_post(visual.attn_pool(token))[:, 0] @ visual.proj)
        else:
            pooled = visual.trunk.attn_pool(visual.trunk.norm(token))
            found.append(visual.head(visual.trunk.head(pooled)))
    expected = torch.stack(found, dim=1).view(2, *trace.grid, 16)
    torch.testing.assert_close(trace.dense(), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    "family",
    ["vit", "vit_layer_scale", "dinov2", "timm_vit", "eva01", "eva_post_norm", "eva02"],
)
def test_dense_features_are_the_last_block_with_identity_attention(family: str) -> None:
    """An additive mask that leaves only the diagonal turns the library's block into F_d."""
    clip = make_tiny_clip(family)
    trace, visual = clip.image.trace(images(clip, 2)), clip.model.visual
    count = trace.tokens.shape[1]
    alone = torch.full((count, count), -torch.inf).fill_diagonal_(0.0)
    if hasattr(visual, "transformer"):
        block = visual.transformer.resblocks[-1]
        rows = visual.ln_post(block(trace.tokens, attn_mask=alone)) @ visual.proj
    else:
        trunk, rope = visual.trunk, getattr(visual.trunk, "rope", None)
        extra = {} if rope is None else {"rope": rope.get_embed()}
        rows = trunk.norm(trunk.blocks[-1](trace.tokens, attn_mask=alone, **extra))
        rows = trunk.head(trunk.fc_norm(rows))
    torch.testing.assert_close(trace.dense(), rows[:, -16:].view(2, 4, 4, 16), **CLOSE)


def test_the_weight_of_a_resnet_has_its_closed_form() -> None:
    """W = W_cᵀ (p - S g) / |z|, g = z / |z|: one linear map stands behind attention."""
    clip = make_tiny_clip("resnet")
    trace = clip.image.trace(images(clip, 2)).detach()
    target = nn.functional.normalize(torch.randn(2, 16), dim=1)
    weight = channel_weight(trace, target, torch.tensor([0, 1]), heads="one")
    pool = clip.model.visual.attnpool
    z = trace.output("one") @ pool.c_proj.weight.T + pool.c_proj.bias
    length = z.norm(dim=1, keepdim=True)
    score = (z / length * target).sum(1, keepdim=True)
    expected = (target - score * z / length) / length @ pool.c_proj.weight
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "coca", "eva02", "dinov2", "siglip", "eva01"])
def test_other_sizes_equal_the_library_with_a_resampled_table(family: str) -> None:
    """A rectangle: positions resampled by hand, RoPE rebuilt by the library."""
    clip, grid = make_tiny_clip(family), (6, 9)
    pixels = torch.randn(2, 3, 48, 72)
    got = clip.image.trace(pixels)
    assert got.grid == grid
    assert got.dense().shape == (2, *grid, 16)
    visual = clip.model.visual
    if family in ("vit", "coca"):
        visual.positional_embedding = nn.Parameter(by_hand(visual.positional_embedding, grid))
    else:
        table = by_hand(visual.trunk.pos_embed[0], grid)
        visual.trunk.set_input_size((48, 72))
        visual.trunk.pos_embed = nn.Parameter(table[None])
    torch.testing.assert_close(got.embedding, visual(pixels), **CLOSE)


def by_hand(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Channel by channel: a 4 x 4 table behind its leading rows at another grid."""
    first = len(table) - 16
    planes = [
        interpolate(table[first:, c].view(1, 1, 4, 4), size=grid, mode="bicubic").flatten()
        for c in range(table.shape[1])
    ]
    return torch.cat([table[:first], torch.stack(planes, dim=1)])


@torch.no_grad()
def test_sizes_that_the_patch_does_not_divide_are_refused(any_clip: Clip) -> None:
    patch = any_clip.image.patch
    with pytest.raises(ValueError, match=f"expected multiples of the patch size {patch}"):
        any_clip.image.trace(torch.zeros(1, 3, 2 * patch, 2 * patch + 1))


def test_checkpointed_gradients_equal_plain_ones(any_clip: Clip) -> None:
    """Catches a trace that bypasses gradient checkpointing wrongly."""
    pixels = images(any_clip, 2)
    parameters = list(any_clip.model.visual.parameters())

    def gradients() -> list[torch.Tensor]:
        trace = any_clip.image.trace(pixels)
        loss = trace.embedding.square().sum() + trace.dense().square().sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    plain = gradients()
    any_clip.set_grad_checkpointing()
    for got, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("explainer", [GradEclip(), GradEclip(heads="all"), GradCam(), MaskClip()])
def test_every_family_has_every_map(explainer: object, any_clip: Clip) -> None:
    """Patches alone carry relevance; class token, registers and mean token stay out."""
    pixels, target = images(any_clip, 2), torch.randn(3, 16)
    owner = torch.tensor([1, 0, 1])
    heat = explain_image(explainer, any_clip, pixels, target, owner)
    trace = any_clip.image.trace(pixels)
    assert heat.shape == (3, *trace.grid)
    assert heat.isfinite().all()
    assert (heat > 0).any()
    assert int(trace.explained.sum()) == 2 * trace.grid[0] * trace.grid[1]
    assert trace.explained[:, -trace.grid[0] * trace.grid[1] :].all()
    torch.testing.assert_close(heat_from_trace(explainer, trace, target, owner), heat)


@torch.no_grad()
def test_a_tower_without_query_still_encodes() -> None:
    """Average pooling: no row whose attention could be explained, yet retrieval works."""
    visual = timm_vit(class_token=False, global_pool="avg").eval()
    tower, pixels = image_tower(visual), torch.randn(2, 3, 32, 32)
    assert torch.equal(tower.encode(pixels), visual(pixels))
    assert tower.unexplained == "image tower pools by 'avg'"
    with pytest.raises(UnsupportedTowerError, match=r"'avg': it encodes, .* choose ViT-B-16"):
        tower.trace(pixels)


def test_training_mode_spares_batch_norms_and_frozen_parts() -> None:
    """Statistics of small batches would spoil a ResNet, dropout a tower that does not learn."""
    clip = make_tiny_clip("resnet")
    clip.train()
    before = clip.model.visual.bn1.running_mean.clone()
    clip.image.encode(images(clip, 2))
    assert torch.equal(clip.model.visual.bn1.running_mean, before)
    assert clip.model.text.transformer.training
    for parameter in clip.model.text.parameters():
        parameter.requires_grad = False
    clip.train()
    assert clip.model.visual.training
    assert not any(part.training for part in clip.model.text.modules())
    assert not any(part.training for part in clip.eval().modules())
    learning = make_tiny_clip("dinov2")
    learning.train()
    assert learning.model.visual.trunk.pos_drop.training
