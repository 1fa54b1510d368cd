"""The follow-up's momentum copy: weights of pairs, and when the copy moves."""

import pytest
import torch

from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.objectives.sff import SFF


def test_pairs_count_as_the_copy_believes_them(tiny_vit: Clip, tiny_batch: CaptionBatch) -> None:
    """Against loops over the softmax of both directions; the copy is the start model."""
    objective = SFF(GradEclip())
    objective.begin(tiny_vit)
    then = table(tiny_vit, tiny_batch)
    with torch.no_grad():
        for parameter in tiny_vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    now = table(tiny_vit, tiny_batch)
    expected = torch.zeros(())
    for before, after in ((then, now), (then.T, now.T)):
        for row in range(3):
            weight = 0.4 * before[row].softmax(0)[row] + 0.6
            expected -= weight * after[row].log_softmax(0)[row] / 6
    terms = objective(tiny_vit, tiny_batch)
    torch.testing.assert_close(terms.parts["global"], expected.detach())


def table(clip: Clip, batch: CaptionBatch) -> torch.Tensor:
    """Logits of all images and captions."""
    normal = torch.nn.functional.normalize
    images, texts = clip.image.encode(batch.images), clip.text.encode(batch.captions)
    return (clip.log_scale.exp() * normal(images) @ normal(texts).T).detach()


def test_without_trust_it_is_the_paper_s_loss(tiny_vit: Clip, tiny_batch: CaptionBatch) -> None:
    objective = SFF(GradEclip(), trust=0.0)
    objective.begin(tiny_vit)
    plain = GlobalLocal(GradEclip())(tiny_vit, tiny_batch)
    torch.testing.assert_close(objective(tiny_vit, tiny_batch).total, plain.total)


def test_the_copy_moves_once_per_epoch(tiny_vit: Clip) -> None:
    objective = SFF(GradEclip(), momentum=0.5, every=2)
    objective.begin(tiny_vit)
    start = tiny_vit.model.visual.proj.detach().clone()
    with torch.no_grad():
        tiny_vit.model.visual.proj.add_(1.0)
    (copied,) = [p for n, p in objective.named_parameters() if n.endswith("visual.proj")]
    for step, moved in ((1, 0.0), (2, 0.5), (3, 0.5), (4, 0.75)):
        objective.after_step(tiny_vit, step)
        assert (copied - start).mean().item() == pytest.approx(moved, abs=1e-5)
