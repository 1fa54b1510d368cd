"""Accuracy over classes, recall of retrieval, and where heat maps point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gradeclip_ft.ops.similarity import unit


def label_ranks(
    scores: Float[Tensor, "R K"],
    labels: Int[Tensor, " R"],
    among: Bool[Tensor, "K K"] | None = None,
) -> Int[Tensor, " R"]:
    """Number of classes that come before the true one; of equal scores the first class wins.

    Args:
        scores: Of every class.
        labels: The true classes.
        among: For each true class, the classes that it competes with; None for all.

    Raises:
        ValueError: A score is not finite: comparisons with it would count as correct.
    """
    require_finite(scores)
    own = scores.gather(1, labels.unsqueeze(1))  # (R, 1)
    earlier = torch.arange(scores.shape[1], device=scores.device) < labels.unsqueeze(1)
    before = (scores > own) | ((scores == own) & earlier)
    return (before if among is None else before & among[labels]).sum(1)


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


class ClassMeanAccuracy:
    """Top-k accuracy as mean over the classes that occur; sums as state, so batches do not matter.

    Attributes:
        correct: Correct answers by k and class.
        total: Answers by class.
        tied: Answers where another class scores exactly as the true one.
        confusion: Answers by true class and by the class that came first.
    """

    def __init__(self, classes: int, topk: Sequence[int] = (1, 5)) -> None:
        self.topk = tuple(topk)
        self.correct = torch.zeros(len(self.topk), classes, dtype=torch.float64)
        self.total = torch.zeros(classes, dtype=torch.float64)
        self.tied = 0
        self.confusion = torch.zeros(classes, classes, dtype=torch.long)

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
        self.tied += int(label_ties(scores, labels).sum())
        first = scores.argmax(1)  # of equal scores the first
        self.confusion.index_put_((labels, first), torch.ones_like(labels), accumulate=True)

    def mean(self) -> dict[str, float]:
        """Accuracy by name, "top1"; NaN where nothing was counted."""
        rows = zip(self.topk, self.correct, strict=True)
        return {f"top{k}": float(class_mean(row, self.total)) for k, row in rows}

    def micro(self) -> dict[str, float]:
        """Share of correct answers, every answer alike, under the same names."""
        rows = zip(self.topk, self.correct, strict=True)
        return {f"top{k}": float(row.sum() / self.total.sum()) for k, row in rows}

    @property
    def share_of_ties(self) -> float:
        """Share of answers where another class scores exactly as the true one."""
        return self.tied / max(1.0, float(self.total.sum()))

    def by_class(self, names: Sequence[str]) -> dict[str, dict[str, float | int]]:
        """Number of answers and share of correct ones for each class that occurs."""
        total, correct = self.total.tolist(), self.correct.tolist()
        return {
            name: {
                "samples": int(total[row]),
                **{
                    f"top{k}": round(right[row] / total[row], 4)
                    for k, right in zip(self.topk, correct, strict=True)
                },
            }
            for row, name in enumerate(names)
            if total[row]
        }

    def most_confused(self, names: Sequence[str], limit: int = 20) -> list[dict[str, str | int]]:
        """Pairs of true class and class that came first instead, with their number."""
        return most_confused(self.confusion, names, limit, "samples")


def most_confused(
    confusion: Int[Tensor, "K K"], names: Sequence[str], limit: int, unit_name: str
) -> list[dict[str, str | int]]:
    """Pairs of true class and class that came instead, with their number, the most first."""
    mistakes = confusion.clone().fill_diagonal_(0).flatten()
    most = mistakes.sort(descending=True, stable=True)
    pairs = zip(most.values[:limit].tolist(), most.indices.tolist(), strict=False)
    return [
        {
            "is": names[place // len(names)],
            "taken for": names[place % len(names)],
            unit_name: count,
        }
        for count, place in pairs
        if count
    ]


class SegmentationMatrix:
    """Pixels by true and by predicted class, over a whole set.

    Matrices of parts, of several processes too, add up to that of the whole. A mean over images
    (torchmetrics' segmentation.MeanIoU) is another number.

    Attributes:
        pixels: (true class, predicted class).
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.pixels = torch.zeros(classes, classes, dtype=torch.long, device=device)

    def update(self, truth: Shaped[Tensor, "H W"], predicted: Int[Tensor, "H W"]) -> None:
        """Count one image; true labels beyond the classes are ignored."""
        classes = len(self.pixels)
        counted = truth < classes
        pairs = truth[counted].long() * classes + predicted[counted]
        self.pixels += pairs.bincount(minlength=classes**2).view(classes, classes)

    @property
    def by_class(self) -> Float[Tensor, "3 K"]:
        """Intersection over union, share of true pixels found, and true pixels, of every class.

        NaN for the first two where a class is neither true nor predicted anywhere, or never true.
        """
        table = self.pixels.double()
        right, true, said = table.diagonal(), table.sum(1), table.sum(0)
        return torch.stack([right / (true + said - right), right / true, true])

    def mean(self) -> dict[str, float]:
        """Means mIoU and mAcc over the classes that have a value, and aAcc over all pixels.

        A class that is predicted and never true counts as 0 in mIoU, as in mmseg.
        """
        overlap, found, true = self.by_class
        right = self.pixels.diagonal().sum() / true.sum()
        means = [values.nanmean() for values in (overlap, found)]
        return dict(zip(("mIoU", "mAcc", "aAcc"), map(float, [*means, right]), strict=True))


def first_hits(
    scores: Float[Tensor, "Q G"], relevant: Bool[Tensor, "Q G"]
) -> tuple[Int[Tensor, " Q"], Bool[Tensor, " Q"]]:
    """Items that come before the first right one, and whether a wrong one scores the same.

    Of equal scores the first item wins. Every query needs a right item.
    """
    require_finite(scores)
    items = torch.arange(scores.shape[1], device=scores.device)
    best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)  # (Q, 1)
    equal = scores == best
    first = items.where(equal & relevant, scores.shape[1]).amin(1, keepdim=True)
    before = (scores > best) | (equal & (items < first))
    return before.sum(1), (equal & ~relevant).any(1)


def search(
    queries: Float[Tensor, "Q D"],
    gallery: Float[Tensor, "G D"],
    query_key: Int[Tensor, " Q"],
    gallery_key: Int[Tensor, " G"],
    *,
    chunk: int = 512,
) -> tuple[Int[Tensor, " Q"], Bool[Tensor, " Q"]]:
    """`first_hits` of every query by cosine in fp32; right items are those of the same key.

    Args:
        queries: Embeddings, of any length.
        gallery: Embeddings, of any length.
        query_key: Image number of each query.
        gallery_key: Image number of each item.
        chunk: Queries compared at a time; bounds memory, not the result.
    """
    items = unit(gallery).T  # (D, G)
    found = []
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        relevant = query_key[part].unsqueeze(1) == gallery_key
        found.append(first_hits(unit(queries[part]) @ items, relevant))
    ranks, ties = zip(*found, strict=True)
    return torch.cat(ranks), torch.cat(ties)


def recall(ranks: Int[Tensor, " Q"], topk: Sequence[int]) -> dict[int, float]:
    """Share of queries whose first hit is among the first k.

    >>> recall(torch.tensor([0, 4, 7]), (1, 5))
    {1: 0.3333333333333333, 5: 0.6666666666666666}
    """
    return {k: float((ranks < k).double().mean()) for k in topk}


def average_precision(
    score: Float[Tensor, "P N"], right: Bool[Tensor, "P N"]
) -> Float[Tensor, " P"]:
    """Average precision of every row, Σ (R_k - R_k-1) P_k over distinct scores.

    Equal scores come together, as in scikit-learn's `average_precision_score`. A row without a
    right item is NaN.
    """
    order = score.sort(descending=True)
    hit = right.gather(1, order.indices)
    place = torch.arange(score.shape[1], device=score.device)
    precision = hit.double().cumsum(1) / (place + 1)
    last = torch.ones_like(hit)
    last[:, :-1] = order.values[:, 1:] != order.values[:, :-1]
    # The end of the run of equal scores that an item is in.
    end = place.expand_as(hit).masked_fill(~last, score.shape[1]).flip(1).cummin(1).values.flip(1)
    return ((precision.gather(1, end) * hit).sum(1) / hit.sum(1)).float()


TOLERANCE = 1e-6
"""Differences below this part of a map's size are rounding."""


def pointing_game(heat: Float[Tensor, "P H W"], mask: Bool[Tensor, "P H W"]) -> Float[Tensor, " P"]:
    """Share of a map's highest pixels that lie on the object; a constant map scores 0.

    Zhang et al., "Top-down Neural Attention by Excitation Backprop", count a hit where the arg-max
    lies on the object. A bilinearly enlarged map has its maximum at several pixels at once (four,
    or a corner of the picture), so that the arg-max would be a matter of order: all of them count,
    each for its share. There is no tolerance around the object.
    """
    low, high = heat.amin((1, 2)), heat.amax((1, 2))
    highest = heat >= (high - TOLERANCE * (high - low)).view(-1, 1, 1)
    share = (highest & mask).sum((1, 2)) / highest.sum((1, 2))
    return share.masked_fill(is_constant(heat), 0.0)


def energy_pointing_game(
    heat: Float[Tensor, "P H W"], mask: Bool[Tensor, "P H W"]
) -> Float[Tensor, " P"]:
    """Σ H on the object / Σ H, of the map shifted to a minimum of 0; a constant map scores 0.

    Wang et al., "Score-CAM", on the min-maxed map as in Grad-ECLIP's Table 4; the share does not
    depend on the maximum that it is scaled to.
    """
    shifted = (heat - heat.amin((1, 2), keepdim=True)).double()
    total = shifted.sum((1, 2))
    share = (shifted * mask).sum((1, 2)) / total.masked_fill(total == 0, 1.0)
    return share.masked_fill(is_constant(heat), 0.0).to(heat.dtype)


def share_inside(heat: Float[Tensor, "P H W"], mask: Bool[Tensor, "P H W"]) -> Float[Tensor, " P"]:
    """Σ H⁺ on the object / Σ H⁺, H⁺ the map above 0; 0 for a map without such values.

    Not shifted, since F_r = Σ H_i F_d,i is not: a map that is high everywhere pools everything.
    """
    positive = heat.clamp(min=0).double()
    total = positive.sum((1, 2))
    share = (positive * mask).sum((1, 2)) / total.masked_fill(total == 0, 1.0)
    return share.to(heat.dtype)


def chance(
    mask: Bool[Tensor, "P H W"], counted: Bool[Tensor, "P H W"] | None = None
) -> Float[Tensor, " P"]:
    """Share of the pixels that count that is object: the expected score of a random pixel."""
    if counted is None:
        return mask.float().mean((1, 2))
    return (mask & counted).sum((1, 2)) / counted.sum((1, 2))


def is_constant(heat: Float[Tensor, "P H W"]) -> Bool[Tensor, " P"]:
    """Whether a map says nothing about any place.

    Raises:
        ValueError: A value is not finite.
    """
    if not bool(torch.isfinite(heat).all()):
        raise ValueError("a heat map is not finite; check that the weights are those of a good run")
    size = heat.abs().amax((1, 2))
    return heat.amax((1, 2)) - heat.amin((1, 2)) <= TOLERANCE * size


Threshold = float | Literal["mean", "otsu"]


def scaled(
    heat: Float[Tensor, "P H W"], counted: Bool[Tensor, "P H W"] | None = None
) -> Float[Tensor, "P H W"]:
    """Maps between their minimum (0) and maximum (1) over the pixels that count; constant ones 0.

    Pixels that do not count are 0.
    """
    constant = is_constant(heat).view(-1, 1, 1)
    among = torch.ones_like(heat, dtype=torch.bool) if counted is None else counted
    low = heat.masked_fill(~among, torch.inf).amin((1, 2), keepdim=True)
    high = heat.masked_fill(~among, -torch.inf).amax((1, 2), keepdim=True)
    values = (heat - low) / (high - low).masked_fill(constant | (high <= low), 1.0)
    return values.masked_fill(constant | ~among, 0.0)


def confusion(
    heat: Float[Tensor, "P H W"],
    mask: Bool[Tensor, "P H W"],
    counted: Bool[Tensor, "P H W"],
    threshold: Threshold = 0.5,
) -> Int[Tensor, "P 4"]:
    """Pixels above a threshold on the object and outside, then those below it, of `scaled` maps.

    `mean` is the mean of each map, `otsu` the threshold that separates its values best (Otsu, 1979,
    256 bins).
    """
    if threshold == "mean":
        total = counted.sum((1, 2)).clamp(min=1)
        limit = ((heat * counted).sum((1, 2)) / total).view(-1, 1, 1)
    elif threshold == "otsu":
        limit = _otsu(heat, counted).view(-1, 1, 1)
    else:
        limit = heat.new_full((1, 1, 1), float(threshold))
    above = (heat > limit) & counted
    below, outside = counted & ~above, counted & ~mask
    inside = counted & mask
    groups = (above & inside, above & outside, below & inside, below & outside)
    return torch.stack([group.sum((1, 2)) for group in groups], 1)


def _otsu(heat: Float[Tensor, "P H W"], counted: Bool[Tensor, "P H W"]) -> Float[Tensor, " P"]:
    bins = 256
    place = (heat * (bins - 1)).round().long().flatten(1)
    histogram = heat.new_zeros(len(heat), bins, dtype=torch.float64)
    histogram.scatter_add_(1, place, counted.flatten(1).double())
    level = torch.arange(bins, device=heat.device, dtype=torch.float64)
    below, moment = histogram.cumsum(1), (histogram * level).cumsum(1)
    above, rest = below[:, -1:] - below, moment[:, -1:] - moment
    distance = moment / below.clamp(min=1) - rest / above.clamp(min=1)
    return ((below * above * distance.square()).argmax(1).float() + 0.5) / (bins - 1)


def overlap(pixels: Int[Tensor, "P 4"]) -> dict[str, Float[Tensor, " P"]]:
    """Precision, recall, accuracy and intersection over union from `confusion`; 0 for 0 / 0."""
    hit, wrong, missed, clear = pixels.double().unbind(1)

    def share(part: Tensor, whole: Tensor) -> Tensor:
        return (part / whole.clamp(min=1)).float()

    return {
        "pixel_precision": share(hit, hit + wrong),
        "pixel_recall": share(hit, hit + missed),
        "pixel_accuracy": share(hit + clear, hit + wrong + missed + clear),
        "iou": share(hit, hit + wrong + missed),
    }
