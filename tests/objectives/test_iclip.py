"""ICLIP: its loss against the library's own pass, and the map of what it learned."""

from pathlib import Path

import pytest
import torch

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.base import explain_image
from gradeclip_ft.explain.itsm import Itsm
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.trace import UnsupportedTowerError
from gradeclip_ft.objectives.iclip import ICLIP
from gradeclip_ft.training.optim import freeze
from tests.explain.oracle import written_out
from tests.tiny import make_tiny_clip

normal = torch.nn.functional.normalize


def draw(objective: ICLIP) -> tuple[torch.Tensor, torch.Tensor]:
    """Other projections than the identity."""
    torch.manual_seed(0)
    with torch.no_grad():
        for place in (objective.map_image, objective.map_text):
            place[0].copy_(torch.randn_like(place[0]))
    return objective.map_image[0].detach(), objective.map_text[0].detach()


def test_patches_are_masked_by_attention_and_pooled_by_channel(tiny_batch: CaptionBatch) -> None:
    """Loops over images, patches and channels."""
    clip = make_tiny_clip("vit")
    visual = clip.model.visual
    ends: list[torch.Tensor] = []
    hook = visual.transformer.register_forward_hook(lambda *call: ends.append(call[-1]))
    with written_out() as seen:
        classes = clip.model.encode_image(tiny_batch.images)
    hook.remove()
    freeze(clip.model, train_image=False)  # attention without gradients is fused, and unseen
    objective = ICLIP()
    objective.check(clip)
    objective.begin(clip)
    of_images, of_texts = draw(objective)
    pooled = []
    for image in range(3):
        attention = seen[-1].weights[image, :, 0, 1:].mean(0)
        low, high = attention.min(), attention.max()
        mask = (attention - low) / (high - low)
        rows = visual.ln_post(ends[0][image, 1:]) @ visual.proj
        pooled.append(torch.stack([(rows[:, c] * mask).max() for c in range(16)]))
    texts = clip.text.encode(tiny_batch.captions)
    total = torch.zeros(())
    for image, text in (
        (classes.detach(), texts),
        (torch.stack(pooled).detach() @ of_images, texts @ of_texts),
    ):
        logits = clip.log_scale.exp() * normal(image, dim=1) @ normal(text, dim=1).T
        for table in (logits, logits.T):
            total = total + torch.nn.functional.cross_entropy(table, torch.arange(3)) / 4
    terms = objective(clip, tiny_batch)
    torch.testing.assert_close(terms.total, total, rtol=1e-4, atol=1e-5)
    terms.total.backward()
    learning = [p for p in [*clip.parameters(), *objective.parameters()] if p.requires_grad]
    assert all(p.grad is not None for p in learning)


def test_a_step_passes_the_image_tower_once(tiny_vit: Clip, tiny_batch: CaptionBatch) -> None:
    """Patches are those of the pass that gives the class token."""
    freeze(tiny_vit.model, train_image=False)
    objective, passes = ICLIP(), []
    objective.begin(tiny_vit)
    first = tiny_vit.model.visual.transformer.resblocks[0]
    first.register_forward_hook(lambda *call: passes.append(call))
    objective(tiny_vit, tiny_batch)
    assert len(passes) == 1


def test_the_loss_in_bf16_is_near_that_in_fp32(tiny_vit: Clip, tiny_batch: CaptionBatch) -> None:
    """The attention is computed without autocast, after layers with it."""
    freeze(tiny_vit.model, train_image=False)
    objective = ICLIP()
    objective.begin(tiny_vit)
    exact = objective(tiny_vit, tiny_batch).total
    with torch.autocast("cpu", torch.bfloat16):
        total = objective(tiny_vit, tiny_batch).total
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, exact, rtol=0.03, atol=0.03)  # bf16 keeps about three digits


def test_the_map_reads_what_a_run_learned(tmp_path: Path, tiny_batch: CaptionBatch) -> None:
    clip = make_tiny_clip("vit")
    freeze(clip.model, train_image=False)
    objective = ICLIP()
    objective.begin(clip)
    of_images, of_texts = draw(objective)
    state = {f"objective.{name}": value for name, value in objective.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    target, owner = torch.randn(1, 16), torch.tensor([1])
    visual, ends = clip.model.visual, []
    hook = visual.transformer.register_forward_hook(lambda *call: ends.append(call[-1]))
    clip.model.encode_image(tiny_batch.images)
    hook.remove()
    rows = visual.ln_post(ends[0][1, 1:]) @ visual.proj @ of_images
    cosines = torch.nn.functional.cosine_similarity(rows, normal(target, dim=1) @ of_texts)
    expected = (cosines - cosines.min()) / (cosines.max() - cosines.min())
    explainer = Itsm(projections=str(tmp_path / "last.ckpt"))
    heat = explain_image(explainer, clip, tiny_batch.images, target, owner)[0]
    torch.testing.assert_close(heat.flatten(), expected.detach(), rtol=1e-4, atol=1e-5)
    other = Itsm(projections=str(tmp_path / "other.ckpt"))
    with pytest.raises(ValueError, match="not of a run with objective=iclip"):
        explain_image(other, clip, tiny_batch.images, target, owner)


def test_what_iclip_cannot_train_is_refused() -> None:
    clip = make_tiny_clip("siglip")
    with pytest.raises(UnsupportedTowerError, match="attention of a class token"):
        ICLIP().check(clip)
    with pytest.raises(ValueError, match=r"set optim\.train_image=false"):
        ICLIP().begin(clip)
