"""Accuracy as the plain mean over classes, so that frequent classes do not decide it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric


def label_ranks(scores: Float[Tensor, "R K"], labels: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
    """Number of classes that come before the true one; of equal scores the first class wins.

    Raises:
        ValueError: A score is not finite: comparisons with it would count as correct.
    """
    require_finite(scores)
    own = scores.gather(1, labels.unsqueeze(1))  # (R, 1)
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels.unsqueeze(1)
    return ((scores > own) | ((scores == own) & earlier)).sum(1)


def label_ties(scores: Float[Tensor, "R K"], labels: Int[Tensor, " R"]) -> Bool[Tensor, " R"]:
    """Whether another class has exactly the score of the true one."""
    own = scores.gather(1, labels.unsqueeze(1))
    return (scores == own).sum(1) > 1


def class_mean(correct: Float[Tensor, " K"], total: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """Mean over the classes that occur of their share of correct answers; NaN where none occurs.

    >>> class_mean(torch.tensor([9.0, 1.0, 0.0]), torch.tensor([10.0, 1.0, 0.0]))
    tensor(0.9500)
    """
    present = total > 0
    return (correct[present] / total[present]).mean()


def require_finite(scores: Float[Tensor, "R K"]) -> None:
    """Refuse scores of a broken model.

    Raises:
        ValueError: A score is not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            "similarities are not finite: the model gives inf or NaN; check that its weights are "
            "those of the last good checkpoint"
        )


class ClassMeanAccuracy(Metric):
    """Top-k accuracy as mean over the classes that occur; sums as state, so batches do not matter.

    Attributes:
        correct: Correct answers by k and class.
        total: Answers by class.
        tied: Answers where another class scores exactly as the true one.
        confusion: Answers by true class and by the class that came first.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor
    tied: Tensor
    confusion: Tensor

    def __init__(self, classes: int, topk: Sequence[int] = (1, 5)) -> None:
        # One process evaluates while the others wait: a sum over processes would wait for ever.
        super().__init__(sync_on_compute=False)
        self.topk = tuple(topk)
        zeros = torch.zeros(len(self.topk), classes, dtype=torch.float64)
        self.add_state("correct", zeros, dist_reduce_fx="sum")
        self.add_state("total", zeros[0].clone(), dist_reduce_fx="sum")
        self.add_state("tied", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("confusion", torch.zeros(classes, classes).long(), dist_reduce_fx="sum")

    def update(self, scores: Float[Tensor, "R K"], labels: Int[Tensor, " R"]) -> None:
        """Count one batch, which may be empty.

        Raises:
            ValueError: A score is not finite.
        """
        ranks = label_ranks(scores, labels)
        ones = self.total.new_ones(len(labels))
        self.total.index_add_(0, labels, ones)
        for row, k in zip(self.correct, self.topk, strict=True):
            row.index_add_(0, labels, ones * (ranks < k))
        self.tied += label_ties(scores, labels).sum()
        first = scores.argmax(1)  # of equal scores the first
        self.confusion.index_put_((labels, first), torch.ones_like(labels), accumulate=True)

    def compute(self) -> dict[str, Tensor]:
        """Accuracy by name, "top1"; NaN where nothing was counted."""
        return {
            f"top{k}": class_mean(row, self.total)
            for k, row in zip(self.topk, self.correct, strict=True)
        }

    def micro(self) -> dict[str, Tensor]:
        """Share of correct answers, every answer alike, under the same names."""
        return {
            f"top{k}": row.sum() / self.total.sum()
            for k, row in zip(self.topk, self.correct, strict=True)
        }
