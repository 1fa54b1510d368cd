"""Fast maps against slow ones, written from the formulas without the package's own operations."""

import dataclasses
import math

import pytest
import torch
from timm.layers import apply_rot_embed_cat

from gradeclip_ft.explain.base import TraceExplainer, explain_image, heat_from_trace
from gradeclip_ft.explain.grad_cam import GradCam
from gradeclip_ft.explain.grad_eclip import GradEclip, channel_weight
from gradeclip_ft.explain.maskclip import MaskClip
from gradeclip_ft.explain.uniform import Uniform
from gradeclip_ft.models.clip import Clip
from tests.explain.oracle import written_out

EXPLAINERS = [GradEclip(), GradEclip(heads="all"), GradCam(), MaskClip(), Uniform()]
OWNER = torch.tensor([1, 0, 1, 2])


class SlowLastLayer:
    """The last block over all tokens with one head (eqs. 2-7), straight from the weights."""

    def __init__(self, clip: Clip, image: torch.Tensor) -> None:
        visual = clip.model.visual
        self.is_vit = hasattr(clip.model.visual, "transformer")
        with torch.no_grad():
            if self.is_vit:
                self.x = visual._embeds(image)
                for block in visual.transformer.resblocks[:-1]:
                    self.x = block(self.x)
                self.block = visual.transformer.resblocks[-1]
                y = self.block.ln_1(self.x)
                joined = y @ self.block.attn.in_proj_weight.T + self.block.attn.in_proj_bias
                self.q, self.k, self.v = joined.chunk(3, dim=-1)
            else:
                trunk = visual.trunk
                self.x, rope = trunk._pos_embed(trunk.patch_embed(image))
                for block in trunk.blocks[:-1]:
                    self.x = block(self.x, rope=rope)
                self.block = trunk.blocks[-1]
                attention, y = self.block.attn, self.block.norm1(self.x)
                if attention.qkv is None:
                    self.q, self.k = attention.q_proj(y), attention.k_proj(y)
                    self.v = attention.v_proj(y)
                else:
                    bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
                    self.q, self.k, self.v = (attention.qkv(y) + bias).chunk(3, dim=-1)
                self.q, self.k = self._rotate(self.q, rope), self._rotate(self.k, rope)
        self.visual = visual

    def _rotate(self, rows: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        heads = rows.view(1, 17, 4, 8).transpose(1, 2)
        turned = [heads[:, :, :1], apply_rot_embed_cat(heads[:, :, 1:], rope)]
        return torch.cat(turned, dim=2).transpose(1, 2).reshape(1, 17, 32)

    def output(self) -> torch.Tensor:
        scores = self.q @ self.k.transpose(1, 2) / math.sqrt(32)
        return scores.softmax(-1) @ self.v

    def embed(self, o: torch.Tensor) -> torch.Tensor:
        block, visual = self.block, self.visual
        if self.is_vit:
            x = self.x + block.ls_1(block.attn.out_proj(o))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
            return (visual.ln_post(x) @ visual.proj)[:, 0]
        x = self.x + block.attn.proj(block.attn.norm(o))
        x = x + block.mlp(block.norm2(x))
        return visual.trunk.head(visual.trunk.norm(x))[:, 0]


def slow_grad_eclip(
    clip: Clip, image: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One image, one phrase: gradient over all of the attention output, then eq. 19 by patch."""
    layer = SlowLastLayer(clip, image)
    o = layer.output().requires_grad_()
    score = torch.nn.functional.cosine_similarity(layer.embed(o), target[None]).sum()
    weight = torch.autograd.grad(score, o)[0][0, 0]
    similar = [
        torch.nn.functional.cosine_similarity(layer.q[0, 0], layer.k[0, i], dim=0).item()
        for i in range(1, 17)
    ]
    low, high = min(similar), max(similar)
    heat = [
        max(0.0, (a - low) / (high - low) * float(weight @ layer.v[0, i + 1]))
        for i, a in enumerate(similar)
    ]
    return torch.tensor(heat).view(4, 4), weight


def test_grad_eclip_equals_the_slow_loop_over_phrases(tiny_clip: Clip) -> None:
    """Late expansion against a full last block and one backward pass per phrase (eqs. 15-20)."""
    images, target = torch.randn(3, 3, 32, 32), torch.randn(4, 16)
    heat = explain_image(GradEclip(), tiny_clip, images, target, OWNER)
    trace = tiny_clip.image.trace(images).detach()
    unit_target = target / target.norm(dim=1, keepdim=True)
    weights = channel_weight(trace, unit_target, OWNER)
    for row, owner in enumerate(OWNER.tolist()):
        expected, weight = slow_grad_eclip(tiny_clip, images[owner : owner + 1], target[row])
        torch.testing.assert_close(weights[row], weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(heat[row], expected, rtol=1e-4, atol=1e-6)


def test_maps_of_single_heads_use_their_own_channels(tiny_clip: Clip) -> None:
    """H^a_i = ReLU(Σ over the channels of head a of w_c λ^a_i v_ic), λ^a from its q and k alone."""
    image, target = torch.randn(1, 3, 32, 32), torch.randn(1, 16)
    layer = SlowLastLayer(tiny_clip, image)
    trace = tiny_clip.image.trace(image).detach()
    direction = target / target.norm()
    weight = channel_weight(trace, direction, torch.tensor([0]), heads="all")[0]
    for head in range(4):
        own = slice(8 * head, 8 * head + 8)
        similar = torch.nn.functional.cosine_similarity(
            layer.q[0, :1, own], layer.k[0, 1:, own], dim=1
        )
        spatial = (similar - similar.min()) / (similar.max() - similar.min())
        expected = (spatial * (layer.v[0, 1:, own] @ weight[own])).relu().view(4, 4)
        method = GradEclip(heads="all", head=head)
        heat = explain_image(method, tiny_clip, image, target, torch.tensor([0]))[0]
        torch.testing.assert_close(heat, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"head is 4 .* choose 0 to 3"):
        explain_image(GradEclip(head=4), tiny_clip, image, target, torch.tensor([0]))


def test_one_head_may_keep_the_scale_of_many(tiny_clip: Clip) -> None:
    """The authors' notebook for BLIP: one softmax over all channels, but at (C / heads)^-0.5."""
    layer = SlowLastLayer(tiny_clip, image := torch.randn(1, 3, 32, 32))
    scores = layer.q[:, :1] @ layer.k.transpose(1, 2) * 8**-0.5
    expected = (scores.softmax(-1) @ layer.v)[:, 0]
    trace = tiny_clip.image.trace(image)
    torch.testing.assert_close(trace.output("one", "head"), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(trace.output("one"), expected, atol=1e-3)


@pytest.mark.parametrize(("method", "single"), [(GradCam(), 1), (GradCam(heads="all"), None)])
def test_grad_cam_equals_the_gradient_through_the_librarys_block(
    tiny_clip: Clip, method: GradCam, single: int | None
) -> None:
    """Catches a replay whose gradient misses a path, and another score than the authors'."""
    image, target, kept = torch.randn(1, 3, 32, 32), torch.randn(16), []
    block = SlowLastLayer(tiny_clip, image).block
    handle = block.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    with written_out(single_head_from=single):
        embedding = tiny_clip.model.visual(image)
    handle.remove()
    score = torch.nn.functional.cosine_similarity(embedding, target[None]).sum()
    (gradient,) = torch.autograd.grad(score, kept[0])
    expected = (kept[0] @ gradient.mean(1)[0]).relu()[0, 1:].view(4, 4).detach()
    heat = explain_image(method, tiny_clip, image, target[None], torch.tensor([0]))
    torch.testing.assert_close(heat[0], expected, rtol=1e-4, atol=1e-6)


def test_maskclip_is_the_cosine_of_dense_features(tiny_clip: Clip) -> None:
    """With the key factor of the authors' script times that of the projected keys."""
    images, target = torch.randn(3, 3, 32, 32), torch.randn(4, 16)
    with torch.no_grad():
        dense = tiny_clip.image.trace(images).dense()
    heat = explain_image(MaskClip(), tiny_clip, images, target, OWNER)
    expected = torch.nn.functional.cosine_similarity(dense[OWNER], target[:, None, None], dim=-1)
    torch.testing.assert_close(heat, expected.relu(), rtol=1e-4, atol=1e-6)
    for row, owner in enumerate(OWNER.tolist()):
        layer = SlowLastLayer(tiny_clip, images[owner, None])
        project = layer.block.attn.out_proj if layer.is_vit else layer.block.attn.proj
        keys = project(layer.k)[0]
        factor = torch.nn.functional.cosine_similarity(keys[:1], keys[1:]).view(4, 4)
        method, one = MaskClip(key_factor=True), torch.tensor([0])
        heat = explain_image(method, tiny_clip, images[owner, None], target[row, None], one)
        wanted = (expected[row] * factor).relu()
        torch.testing.assert_close(heat[0], wanted.detach(), rtol=1e-4, atol=1e-6)


def test_softmax_map_over_all_tokens_is_complete(tiny_clip: Clip) -> None:
    """One head, λ = attention, no ReLU: the relevance of all tokens sums to w · o exactly."""
    trace = tiny_clip.image.trace(torch.randn(3, 3, 32, 32)).detach()
    trace = dataclasses.replace(trace, explained=torch.ones_like(trace.explained))
    target = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    relevance = GradEclip(spatial="softmax", relu=False).from_trace(trace, target, OWNER)
    weight = channel_weight(trace, target, OWNER)
    expected = (weight * trace.output("one")[OWNER]).sum(1)
    torch.testing.assert_close(relevance.sum(1), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("explainer", EXPLAINERS, ids=lambda e: type(e).__name__)
class TestEveryTraceExplainer:
    """Promises that every method keeps."""

    def test_differentiable_and_stopped_maps_are_equal(
        self, explainer: TraceExplainer, tiny_clip: Clip
    ) -> None:
        trace = tiny_clip.image.trace(torch.randn(3, 3, 32, 32))
        target = torch.randn(4, 16, requires_grad=True)
        stopped = heat_from_trace(explainer, trace, target, OWNER)
        moving = heat_from_trace(
            dataclasses.replace(explainer, create_graph=True), trace, target, OWNER
        )
        torch.testing.assert_close(moving, stopped)
        assert not stopped.requires_grad
        assert moving.requires_grad == (not isinstance(explainer, Uniform))

    def test_phrase_order_and_target_length_do_not_change_maps(
        self, explainer: TraceExplainer, tiny_clip: Clip
    ) -> None:
        images, target = torch.randn(3, 3, 32, 32), torch.randn(4, 16)
        order = torch.tensor([3, 1, 0, 2])
        heat = explain_image(explainer, tiny_clip, images, target, OWNER)
        again = explain_image(explainer, tiny_clip, images, 7 * target[order], OWNER[order])
        torch.testing.assert_close(again, heat[order], rtol=1e-4, atol=1e-7)

    def test_no_phrase_gives_no_map(self, explainer: TraceExplainer, tiny_clip: Clip) -> None:
        nothing = torch.zeros(0, dtype=torch.long)
        heat = explain_image(
            explainer, tiny_clip, torch.randn(3, 3, 32, 32), torch.randn(0, 16), nothing
        )
        assert heat.shape == (0, 4, 4)


def test_a_differentiable_map_has_the_gradient_of_finite_differences(tiny_vit: Clip) -> None:
    """Second derivative through finish and attention, in double precision."""
    clip = tiny_vit.double()
    images, target = torch.randn(1, 3, 32, 32).double(), torch.randn(1, 16).double()
    owner, weights = torch.tensor([0]), torch.randn(17).double()
    explainer = GradEclip(create_graph=True, relu=False)
    parameter = clip.model.visual.transformer.resblocks[-1].attn.in_proj_weight

    def value() -> torch.Tensor:
        trace = clip.image.trace(images)
        unit_target = torch.nn.functional.normalize(target, dim=1)
        return (explainer.from_trace(trace, unit_target.float(), owner) * weights).sum()

    (gradient,) = torch.autograd.grad(value(), parameter)
    direction, step = torch.randn_like(parameter), 1e-3
    with torch.no_grad():
        parameter.add_(step * direction)
    above = value().item()
    with torch.no_grad():
        parameter.sub_(2 * step * direction)
    below = value().item()
    slope = (above - below) / (2 * step)
    # The score is computed in fp32, so the difference quotient is good to about 1 %.
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=2e-2, abs=1e-6)


def test_spatial_weight_runs_from_0_to_1_over_patches(tiny_clip: Clip) -> None:
    """A huge class-token key changes nothing; equal keys give 1 everywhere."""
    trace = tiny_clip.image.trace(torch.randn(2, 3, 32, 32)).detach()
    explainer = GradEclip(similarity="product")
    weight = explainer._spatial_weight(trace, trace.q, trace.k)[:, 1:]
    torch.testing.assert_close(weight.amin(1), torch.zeros(2))
    torch.testing.assert_close(weight.amax(1), torch.ones(2))
    huge = trace.k.clone()
    huge[:, 0] *= 1e6
    large = dataclasses.replace(trace, k=huge)
    changed = explainer._spatial_weight(large, large.q, large.k)[:, 1:]
    torch.testing.assert_close(changed, weight)
    equal = dataclasses.replace(trace, k=trace.k[:, 1:2].expand_as(trace.k))
    assert GradEclip()._spatial_weight(equal, equal.q, equal.k)[:, 1:].eq(1).all()
