"""Fast maps against slow ones, written from the formulas without the package's own operations."""

import dataclasses

import pytest
import torch

from gradeclip_ft.explain.base import TraceExplainer, explain_image, heat_from_trace
from gradeclip_ft.explain.grad_cam import GradCam
from gradeclip_ft.explain.grad_eclip import GradEclip, channel_weight
from gradeclip_ft.explain.maskclip import MaskClip
from gradeclip_ft.explain.uniform import Uniform
from gradeclip_ft.models.clip import Clip
from tests.explain.oracle import Seen, written_out

EXPLAINERS = [GradEclip(), GradEclip(heads="all"), GradCam(), MaskClip(), Uniform()]
OWNER = torch.tensor([1, 0, 1, 2])


def last_layer(clip: Clip, image: torch.Tensor, *, heads: str = "one") -> tuple[torch.Tensor, Seen]:
    """Embedding and last attention call of the library's own pass, two layers (eqs. 2-7)."""
    with written_out(single_head_from=1 if heads == "one" else None) as seen:
        embedding = clip.model.visual(image)
    return embedding, seen[-1]


def slow_grad_eclip(
    clip: Clip, image: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One image, one phrase: gradient over all of the attention output, then eq. 19 by patch."""
    embedding, seen = last_layer(clip, image)
    score = torch.nn.functional.cosine_similarity(embedding, target[None]).sum()
    weight = torch.autograd.grad(score, seen.o)[0].transpose(1, 2).flatten(2)[0, 0]
    q, k, v = (seen.rows(name)[0].detach() for name in "qkv")
    similar = [float(torch.nn.functional.cosine_similarity(q[0], k[i], dim=0)) for i in range(17)]
    low, high = min(similar[1:]), max(similar[1:])
    heat = [
        max(0.0, (similar[i] - low) / (high - low) * float(weight @ v[i])) for i in range(1, 17)
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
    _, seen = last_layer(tiny_clip, image, heads="all")
    q, k, v = (seen.rows(name)[0].detach() for name in "qkv")
    trace = tiny_clip.image.trace(image).detach()
    direction = target / target.norm()
    weight = channel_weight(trace, direction, torch.tensor([0]), heads="all")[0]
    for head in range(4):
        own = slice(8 * head, 8 * head + 8)
        similar = torch.nn.functional.cosine_similarity(q[:1, own], k[1:, own], dim=1)
        spatial = (similar - similar.min()) / (similar.max() - similar.min())
        expected = (spatial * (v[1:, own] @ weight[own])).relu().view(4, 4)
        method = GradEclip(heads="all", head=head)
        heat = explain_image(method, tiny_clip, image, target, torch.tensor([0]))[0]
        torch.testing.assert_close(heat, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"head is 4 .* choose 0 to 3"):
        explain_image(GradEclip(head=4), tiny_clip, image, target, torch.tensor([0]))


def test_one_head_may_keep_the_scale_of_many(tiny_clip: Clip) -> None:
    """The authors' notebook for BLIP: one softmax over all channels, but at (C / heads)^-0.5."""
    _, seen = last_layer(tiny_clip, image := torch.randn(1, 3, 32, 32), heads="all")
    q, k, v = (seen.rows(name) for name in "qkv")
    expected = ((q[:, :1] @ k.transpose(1, 2) * 8**-0.5).softmax(-1) @ v)[:, 0]
    trace = tiny_clip.image.trace(image)
    torch.testing.assert_close(trace.output("one", "head"), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(trace.output("one"), expected, atol=1e-3)


def test_maskclip_is_the_cosine_of_dense_features(tiny_clip: Clip) -> None:
    images, target = torch.randn(3, 3, 32, 32), torch.randn(4, 16)
    with torch.no_grad():
        dense = tiny_clip.image.trace(images).dense()
    heat = explain_image(MaskClip(), tiny_clip, images, target, OWNER)
    expected = torch.nn.functional.cosine_similarity(dense[OWNER], target[:, None, None], dim=-1)
    torch.testing.assert_close(heat, expected.relu(), rtol=1e-4, atol=1e-6)


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
