"""Class-mean accuracy against loops and cases solved by hand."""

import math

import pytest
import torch
from torch import Tensor

from gradeclip_ft.metrics import ClassMeanAccuracy, class_mean, label_ranks, label_ties


def naive(scores: Tensor, labels: Tensor, k: int) -> float:
    """Sort with the class index as second key, count per class, average the classes."""
    hits: dict[int, list[bool]] = {}
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], c))
        hits.setdefault(label, []).append(label in order[:k])
    shares = [sum(each) / len(each) for each in hits.values()]
    return sum(shares) / len(shares)


def test_two_classes_with_nine_of_ten_and_one_of_one_give_095() -> None:
    """A micro average would give 10/11."""
    labels = torch.tensor([0] * 10 + [1])
    guess = torch.tensor([0] * 9 + [1] + [1])
    meter = ClassMeanAccuracy(classes=5, topk=(1,))
    meter.update(torch.nn.functional.one_hot(guess, 5).float(), labels)
    assert meter.mean()["top1"] == pytest.approx(0.95)


@pytest.mark.parametrize("seed", range(5))
def test_meter_equals_a_naive_loop_also_with_ties(seed: int) -> None:
    """Coarse scores make ties frequent: the first class has to win them."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (60, 7), generator=generator).float()
    labels = torch.randint(0, 6, (60,), generator=generator)  # class 6 never occurs
    meter = ClassMeanAccuracy(classes=7, topk=(1, 5))
    for start in range(0, 60, 13):
        meter.update(scores[start : start + 13], labels[start : start + 13])
    found = meter.mean()
    for k in (1, 5):
        assert found[f"top{k}"] == pytest.approx(naive(scores, labels, k), abs=1e-12)


def test_batches_do_not_change_the_result() -> None:
    scores, labels = torch.randn(50, 9), torch.randint(0, 9, (50,))
    whole, parts = ClassMeanAccuracy(9), ClassMeanAccuracy(9)
    whole.update(scores, labels)
    for row in range(50):
        parts.update(scores[row : row + 1], labels[row : row + 1])
    parts.update(scores[:0], labels[:0])
    assert whole.mean() == parts.mean()


def test_a_zero_vector_scores_as_the_first_class() -> None:
    """An empty mask has no feature; all its scores are 0."""
    ranks = label_ranks(torch.zeros(3, 10), torch.tensor([0, 4, 5]))
    assert ranks.tolist() == [0, 4, 5]
    assert label_ties(torch.zeros(3, 10), torch.tensor([0, 4, 5])).all()


def test_nan_scores_are_refused_instead_of_counted_as_correct() -> None:
    """Nothing is greater than NaN, so a broken model would have accuracy 1."""
    with pytest.raises(ValueError, match="not finite"):
        ClassMeanAccuracy(3).update(torch.full((2, 3), math.nan), torch.tensor([0, 1]))


def test_no_region_at_all_is_no_number() -> None:
    assert math.isnan(float(class_mean(torch.zeros(4), torch.zeros(4))))
