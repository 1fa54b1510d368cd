"""The local loss against a double loop over eq. 22, and its behaviour at the edges."""

import math

import pytest
import torch

from gradeclip_ft.losses import AlignmentOptions, alignment_loss

SCALE = torch.tensor(20.0)


def loss_of(
    similarity: list[list[float]],
    *,
    identity: list[int] | None = None,
    weight: list[float] | None = None,
    owner: list[int] | None = None,
    scale: float = 20.0,
    **options: object,
) -> torch.Tensor:
    """The loss at chosen cosines: phrases are unit axes, regions carry the cosines."""
    table = torch.tensor(similarity, dtype=torch.float64)
    rows = len(table)
    rest = (1 - table.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
    regions = torch.cat([table, torch.diag(rest[:, 0])], dim=1).float()
    phrases = torch.eye(rows, 2 * rows)
    terms = alignment_loss(
        regions,
        phrases,
        identity=torch.tensor(identity or list(range(rows))),
        weight=torch.tensor(weight or [1.0] * rows),
        scale=torch.tensor(scale),
        options=AlignmentOptions(**options),
        owner=None if owner is None else torch.tensor(owner),
    )
    return terms.loss


TABLE = [[0.5, 0.2, 0.1], [0.3, 0.4, 0.25], [0.05, 0.15, 0.6]]


def test_focal_loss_equals_a_double_loop_over_eq_22() -> None:
    expected = 0.0
    for t in range(3):
        expected -= (1 - TABLE[t][t]) ** 2 * math.log(TABLE[t][t])
        for other in range(3):
            if other != t:
                expected -= TABLE[t][other] ** 2 * math.log(1 - TABLE[t][other])
    assert loss_of(TABLE).item() == pytest.approx(expected, rel=1e-5)


def test_phrase_weight_multiplies_both_terms_of_its_phrase() -> None:
    weight = [0.5, 2.0, 0.25]
    expected = 0.0
    for t in range(3):
        own = -((1 - TABLE[t][t]) ** 2) * math.log(TABLE[t][t])
        others = -sum(TABLE[t][o] ** 2 * math.log(1 - TABLE[t][o]) for o in range(3) if o != t)
        expected += weight[t] * (own + others)
    assert loss_of(TABLE, weight=weight).item() == pytest.approx(expected, rel=1e-5)


def test_the_mean_divides_by_phrases() -> None:
    positive = -sum((1 - TABLE[t][t]) ** 2 * math.log(TABLE[t][t]) for t in range(3))
    negative = -sum(
        TABLE[t][o] ** 2 * math.log(1 - TABLE[t][o]) for t in range(3) for o in range(3) if o != t
    )
    mean = loss_of(TABLE, reduction="mean").item()
    assert mean == pytest.approx((positive + negative) / 3, rel=1e-5)


def test_the_same_phrase_is_no_negative_unless_read_literally() -> None:
    same = loss_of([[0.5, 0.4], [0.4, 0.5]], identity=[7, 7])
    literal = loss_of([[0.5, 0.4], [0.4, 0.5]], identity=[7, 7], mask_duplicates=False)
    positive = -2 * 0.25 * math.log(0.5)
    assert same.item() == pytest.approx(positive, rel=1e-5)
    assert literal.item() == pytest.approx(positive - 2 * 0.16 * math.log(0.6), rel=1e-5)


def test_contrastive_loss_is_the_cross_entropy_of_both_directions() -> None:
    logits = 20 * torch.tensor(TABLE)
    target = torch.arange(3)
    expected = (
        torch.nn.functional.cross_entropy(logits, target)
        + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    torch.testing.assert_close(loss_of(TABLE, kind="contrastive"), expected, rtol=1e-5, atol=1e-5)


def test_other_phrases_of_the_image_share_the_answer() -> None:
    """beta-CLIP: rows of weights 1, β and 0, divided by their sum; both directions."""
    owner, identity, beta = [0, 0, 1], [5, 6, 5], 0.5
    wanted = torch.tensor([[1, beta, 0], [beta, 1, 0], [0, 0, 1]])
    wanted = wanted / wanted.sum(1, keepdim=True)
    expected = torch.zeros(())
    for table in (torch.tensor(TABLE), torch.tensor(TABLE).T):
        for t in range(3):
            # rows 0 and 2 are the same phrase of different images: neither answer nor negative
            kept = [c for c in range(3) if c == t or identity[c] != identity[t]]
            logits = table[t, kept] / 0.1
            expected -= (wanted[t, kept] * logits.log_softmax(0)).sum() / 6
    options = {"kind": "contrastive", "same_image": beta}
    loss = loss_of(TABLE, identity=identity, owner=owner, scale=10.0, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_awkward_cosines_give_finite_values_and_gradients(dtype: torch.dtype) -> None:
    """Cosines below 0, at 0 and above 1 by rounding; in bf16 as well (traps: D5)."""
    phrases = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    regions = phrases.clone()
    regions[0] *= -1
    regions[1] = 0
    regions[2] = torch.roll(phrases[2], 1)
    regions.requires_grad_()
    terms = alignment_loss(
        regions,
        phrases,
        identity=torch.arange(5),
        weight=torch.ones(5),
        scale=SCALE,
        options=AlignmentOptions(),
    )
    terms.loss.backward()
    assert terms.loss.isfinite()
    assert regions.grad.isfinite().all()


def test_a_negative_cosine_is_never_rewarded() -> None:
    """S² log(1 - S) changes sign below 0; the loss must not fall by pushing further."""
    assert loss_of([[0.5, -0.3], [-0.3, 0.5]]).item() == pytest.approx(
        loss_of([[0.5, 0.0], [0.0, 0.5]]).item(), abs=1e-6
    )


def test_a_map_of_zeros_leaves_its_phrase_out() -> None:
    """Weight 0 and a region of zeros: finite, and no gradient from that row."""
    regions = torch.tensor([[0.6, 0.8], [0.0, 0.0]], requires_grad=True)
    phrases = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    terms = alignment_loss(
        regions,
        phrases,
        identity=torch.arange(2),
        weight=torch.tensor([1.0, 0.0]),
        scale=SCALE,
        options=AlignmentOptions(reduction="mean"),
    )
    terms.loss.backward()
    assert terms.loss.isfinite()
    assert regions.grad[0].abs().sum() > 0
    assert regions.grad[1].abs().sum() == 0


@pytest.mark.parametrize("kind", ["focal", "contrastive"])
def test_no_phrase_gives_exactly_zero_with_a_graph(kind: str) -> None:
    regions = torch.zeros(0, 4, requires_grad=True)
    terms = alignment_loss(
        regions,
        torch.zeros(0, 4),
        identity=torch.zeros(0, dtype=torch.long),
        weight=torch.zeros(0),
        scale=SCALE,
        options=AlignmentOptions(kind=kind),
    )
    terms.loss.backward()
    assert terms.loss.item() == 0.0
    assert regions.grad is not None


def test_terms_report_cosines_and_clamped_positives() -> None:
    phrases = torch.eye(2)
    regions = torch.tensor([[0.6, 0.8], [1.0, -0.0]])
    terms = alignment_loss(
        regions,
        phrases,
        identity=torch.arange(2),
        weight=torch.ones(2),
        scale=SCALE,
        options=AlignmentOptions(),
    )
    assert terms.positive_cosine.item() == pytest.approx(0.3)
    assert terms.negative_cosine.item() == pytest.approx(0.9)
    assert terms.clamped_share.item() == pytest.approx(0.5)
