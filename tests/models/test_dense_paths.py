"""Dense features by other attention in the last block, against blocks written out by hand."""

import math
from typing import get_args

import pytest
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from gradeclip_ft.explain.base import explain_image
from gradeclip_ft.explain.clip_surgery import ClipSurgery
from gradeclip_ft.explain.maskclip import MaskClip
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.trace import UnsupportedTowerError
from gradeclip_ft.ops.attention import DensePath, attend_alike
from tests.tiny import images, make_tiny_clip

PATHS = get_args(DensePath)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums in another order, in fp32
BLOCKS = ("vit", "vit_layer_scale", "eva02", "eva02_fused", "timm_vit", "dinov2")


def parts(clip: Clip, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (A, N, c) of one image, from the library's own modules."""
    visual = clip.model.visual
    if hasattr(visual, "transformer"):
        block = visual.transformer.resblocks[-1]
        joined = linear(block.ln_1(tokens), block.attn.in_proj_weight, block.attn.in_proj_bias)
        return tuple(x.unflatten(1, (4, 8)).transpose(0, 1) for x in joined.chunk(3, dim=1))
    block, rope = visual.trunk.blocks[-1], getattr(visual.trunk, "rope", None)
    attention, y = block.attn, block.norm1(tokens)
    if rope is None:
        q, k, v = attention.qkv(y).unflatten(1, (3, 4, 8)).permute(1, 2, 0, 3)
        return attention.q_norm(q), attention.k_norm(k), v
    if attention.qkv is None:
        found = [attention.q_proj(y), attention.k_proj(y), attention.v_proj(y)]
    else:
        bias = torch.cat([attention.q_bias, torch.zeros(32), attention.v_bias])
        found = list(linear(y, attention.qkv.weight, bias).chunk(3, dim=1))
    q, k, v = (x.unflatten(1, (4, 8)).transpose(0, 1) for x in found)
    turned = []
    for x in (q, k):
        patches = apply_rot_embed_cat(x[None, :, 1:], rope.get_embed(), attention.rotate_half)[0]
        turned.append(torch.cat([x[:, :1], patches], 1))
    return turned[0], turned[1], v


def weights_by_hand(path: str, q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
    """One head, one row at a time."""
    count, scale = len(q), 1 / math.sqrt(q.shape[1])
    table = torch.zeros(count, count)
    for i in range(count):
        if path == "value":
            table[i, i] = 1
        elif path == "sclip":
            table[i] = (scale * q @ q[i]).softmax(0) + (scale * k @ k[i]).softmax(0)
        elif path == "clearclip":
            table[i] = (scale * q @ q[i]).softmax(0)
        elif path == "vv":
            table[i] = (scale * v @ v[i]).softmax(0)
        else:
            scores = scale * k @ k[i]
            for j in range(count):
                if min(i, j) >= prefix:
                    one, other = divmod(i - prefix, 4), divmod(j - prefix, 4)
                    squared = (one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2
                    scores[j] += math.exp(-squared / 50)
            table[i] = scores.softmax(0)
    return table


def block_by_hand(clip: Clip, tokens: Tensor, path: str) -> Tensor:
    """Features of all patches of one image by the formulas of the papers."""
    visual, prefix = clip.model.visual, len(tokens) - 16
    q, k, v = parts(clip, tokens)
    o = [weights_by_hand(path, q[a], k[a], v[a], prefix) @ v[a] for a in range(4)]
    joined = torch.cat(o, dim=1)
    if hasattr(visual, "transformer"):
        block = visual.transformer.resblocks[-1]
        added = block.ls_1(block.attn.out_proj(joined))
        mlp = lambda x: block.ls_2(block.mlp(block.ln_2(x)))  # noqa: E731
        head = lambda x: visual.ln_post(x) @ visual.proj  # noqa: E731
    else:
        trunk, block = visual.trunk, visual.trunk.blocks[-1]
        added = block.attn.proj(block.attn.norm(joined))
        scale = getattr(block, "ls1", nn.Identity())
        added = scale(added)
        mlp = lambda x: getattr(block, "ls2", nn.Identity())(block.mlp(block.norm2(x)))  # noqa: E731
        head = lambda x: trunk.head(trunk.fc_norm(trunk.norm(x)))  # noqa: E731
    if path in ("clearclip", "naclip"):
        rows = added
    elif path == "vv":
        rows = tokens + added
    else:
        rows = tokens + added
        rows = rows + mlp(rows)
    return head(rows)[prefix:].view(4, 4, -1)


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", BLOCKS)
def test_each_path_is_the_block_of_its_paper(family: str, path: DensePath) -> None:
    """Catches a lost head, scale, rotation, layer scale, residual, class token or norm."""
    clip = make_tiny_clip(family)
    trace = clip.image.trace(images(clip, 2))
    expected = torch.stack([block_by_hand(clip, row, path) for row in trace.tokens])
    torch.testing.assert_close(trace.dense(path), expected, **CLOSE)


@torch.no_grad()
def test_attention_to_oneself_alone_is_the_value_path(tiny_clip: Clip) -> None:
    """Sharp enough, any of the softmaxes is the identity, and the block gives `Trace.dense()`."""
    trace = tiny_clip.image.trace(images(tiny_clip, 1))
    far = torch.nn.functional.pad(100 * torch.eye(17), (0, 15))[None]
    for path in ("clearclip", "naclip"):
        o = attend_alike(path, far, far, trace.v, heads=1, grid=(4, 4))
        torch.testing.assert_close(o, trace.v, **CLOSE)
        expected = trace.finish(trace.tokens, o)[:, 1:].view(1, 4, 4, -1)
        torch.testing.assert_close(expected, trace.dense(), **CLOSE)
    twice = attend_alike("sclip", far, far, trace.v, heads=1, grid=(4, 4))
    torch.testing.assert_close(twice, 2 * trace.v, **CLOSE)
    assert torch.equal(attend_alike("value", far, far, trace.v, heads=1, grid=(4, 4)), trace.v)


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_the_same_for_features_maskclip_and_surgery(path: DensePath) -> None:
    """One choice, three readers: a map by MaskCLIP is the cosine of these features."""
    clip = make_tiny_clip("eva02")
    pixels, target = images(clip, 2), normalize(torch.randn(3, 16))
    owner = torch.tensor([0, 1, 1])
    dense = normalize(clip.image.trace(pixels).dense(path), dim=-1)
    heat = explain_image(MaskClip(dense=path), clip, pixels, target, owner)
    expected = (dense[owner] * target[:, None, None]).sum(-1)
    torch.testing.assert_close(heat, expected.relu(), **CLOSE)
    if path == "vv":  # its last layer alone, less what the empty text says
        nothing = normalize(torch.randn(1, 16))
        surgery = ClipSurgery(depth=1, embedded=nothing)
        found = explain_image(surgery, clip, pixels, target, owner)
        expected = (dense[owner] * (target - nothing)[:, None, None]).sum(-1)
        torch.testing.assert_close(found, expected, **CLOSE)
    else:
        other = ClipSurgery(depth=2, dense=path, embedded=target[:1])
        usual = ClipSurgery(depth=2, embedded=target[:1])
        maps = [explain_image(m, clip, pixels, target, owner) for m in (other, usual)]
        assert maps[0].isfinite().all()
        assert not torch.allclose(*maps)


@pytest.mark.parametrize("family", ["siglip", "pe", "coca", "resnet"])
def test_a_tower_with_a_pool_has_the_value_path_alone(family: str) -> None:
    trace = make_tiny_clip(family).image.trace(images(make_tiny_clip(family), 1))
    assert trace.dense().isfinite().all()
    with pytest.raises(UnsupportedTowerError, match=r"dense=naclip .* attention pool.*dense=value"):
        trace.dense("naclip")
