"""Local loss: regions and the phrases that found them (Grad-ECLIP, eq. 22), and an alternative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from open_clip.loss import ClipLoss
from torch import Tensor

from gradeclip_ft.ops.distributed import gather_rows, rank, row_counts, world_size
from gradeclip_ft.ops.similarity import unit


@dataclass(frozen=True)
class AlignmentOptions:
    """Choices that eq. 22 leaves open; the defaults are the literal reading.

    Attributes:
        kind: `focal` is eq. 22; `contrastive` is InfoNCE between the regions and the phrases of a
            batch (ours).
        eps: Distance of the clamped cosine from 0 and 1.
        gamma: Focal exponent.
        reduction: `sum` is literal; `mean` divides by the number of phrases whose map is not zero.
        mask_duplicates: Rows of the same phrase are not each other's negatives; False is literal.
        negatives: Phrases of this process, or gathered over all with gradient.
        same_image: For `contrastive`: β, weight of the other phrases of the same image among the
            answers, before these are brought to the sum 1 (beta-CLIP); 0 makes them mere negatives.
        temperature: For `contrastive`: the model's, one that is learned from 0.07 on, or a number.
    """

    kind: Literal["focal", "contrastive"] = "focal"
    eps: float = 1e-4
    gamma: float = 2.0
    reduction: Literal["sum", "mean"] = "sum"
    mask_duplicates: bool = True
    negatives: Literal["rank", "all"] = "rank"
    same_image: float = 0.0
    temperature: Literal["model", "learned"] | float = "model"


@dataclass(frozen=True)
class AlignmentTerms:
    """The loss and what is worth watching, without a graph.

    Attributes:
        loss: Scalar with a graph; exactly 0 where there is no phrase.
        positive_cosine: Mean S_tt.
        negative_cosine: Mean S_tt' over the negatives.
        clamped_share: Share of positives at or below eps, which get no gradient.
    """

    loss: Float[Tensor, ""]
    positive_cosine: Float[Tensor, ""]
    negative_cosine: Float[Tensor, ""]
    clamped_share: Float[Tensor, ""]


def alignment_loss(
    regions: Float[Tensor, "P D"],
    phrases: Float[Tensor, "P D"],
    *,
    identity: Int[Tensor, " P"],
    weight: Float[Tensor, " P"],
    scale: Float[Tensor, ""],
    options: AlignmentOptions,
    owner: Int[Tensor, " P"] | None = None,
) -> AlignmentTerms:
    """Pull every region to its phrase and push it from the others (eq. 22), in fp32.

    Args:
        regions: Region embeddings F_r, any length; a row of zeros belongs to a map of zeros.
        phrases: Phrase embeddings F_p, any length.
        identity: Equal numbers name equal phrases.
        weight: Factor w_t of each phrase (1, or the maximum of its map); 0 leaves it out as t, not
            as somebody's negative.
        scale: Inverse temperature for `contrastive`.
        options: See `AlignmentOptions`.
        owner: Image of each phrase, for `same_image`.
    """
    regions, phrases, weight = unit(regions), unit(phrases), weight.float()
    # P phrases of this process against S = P, or against those of all processes in order of rank.
    gathered = options.negatives == "all" and world_size() > 1
    counts = row_counts(len(phrases), phrases.device) if gathered else [len(phrases)]
    all_phrases = gather_rows(phrases, counts)  # (S, D)
    first = sum(counts[: rank()]) if gathered else 0
    column = first + torch.arange(len(phrases), device=phrases.device)  # where t meets itself
    own = torch.zeros((len(phrases), len(all_phrases)), dtype=torch.bool, device=phrases.device)
    own.scatter_(1, column.unsqueeze(1), True)
    negative = ~own
    if options.mask_duplicates:
        # "man" and "dog" occur in several captions of a batch. Eq. 22, read literally, would push
        # a region from the very phrase that found it.
        negative = negative & (identity.unsqueeze(1) != gather_rows(identity, counts))
    similarity = regions @ all_phrases.T  # (P, S), rows regions, columns phrases
    valid = (weight > 0).sum()  # a map of zeros found nothing, so its phrase does not count
    if gathered:
        valid = gather_rows(valid.reshape(1), [1] * len(counts)).sum()
    if options.kind == "focal":
        loss = _focal(similarity, column, negative, weight, valid, options)
    else:
        transposed = phrases @ gather_rows(regions, counts).T
        answers = own.float()
        if options.same_image:
            assert owner is not None, "same_image needs to know the image of each phrase"
            image = owner + (rank() << 32)  # rows of other processes are other images
            together = negative & (image.unsqueeze(1) == gather_rows(image, counts))
            answers = answers + options.same_image * together
        pairs = (similarity, transposed)
        loss = _contrastive(pairs, answers, own | negative, weight, valid, scale)
    # DDP averages gradients over processes, but with gathered negatives each process holds its own
    # part of one sum: times their number, so that the average is the gradient of that sum.
    share = len(counts) if gathered else 1
    # Zero, but in the graph: without a phrase, the text tower would have no gradient, and DDP
    # would wait for it for ever.
    connected = 0.0 * (regions.sum() + phrases.sum())
    positives, others = own.sum().clamp(min=1), negative.sum().clamp(min=1)
    cosines = similarity.detach()
    return AlignmentTerms(
        loss=loss * share + connected,
        positive_cosine=(cosines * own).sum() / positives,
        negative_cosine=(cosines * negative).sum() / others,
        clamped_share=((cosines <= options.eps) & own).sum() / positives,
    )


def _focal(
    similarity: Float[Tensor, "P S"],
    column: Int[Tensor, " P"],
    negative: Bool[Tensor, "P S"],
    weight: Float[Tensor, " P"],
    valid: Tensor,
    options: AlignmentOptions,
) -> Tensor:
    """- Σ_t w_t [(1 - S_tt)^γ log S_tt + Σ_t' S_tt'^γ log(1 - S_tt')]."""
    # Two cosines leave the domain of the logarithms: S <= 0, and S >= 1 by rounding. Clamped, the
    # loss and its gradient are finite; below eps a positive gets no gradient (`clamped_share`).
    share = similarity.clamp(options.eps, 1 - options.eps)  # (P, S)
    matched = _pick(share, column)  # (P)
    positive = -((1 - matched) ** options.gamma) * torch.log(matched)
    others = torch.where(negative, -(share**options.gamma) * torch.log1p(-share), 0.0).sum(1)
    total = (weight * (positive + others)).sum()
    return total if options.reduction == "sum" else total / valid.clamp(min=1)


def _contrastive(
    pairs: tuple[Tensor, Tensor],
    answers: Float[Tensor, "P S"],
    candidates: Bool[Tensor, "P S"],
    weight: Float[Tensor, " P"],
    valid: Tensor,
    scale: Tensor,
) -> Tensor:
    """Mean over both directions of the cross entropy to the answers, among the candidates."""
    share = answers / answers.sum(1, keepdim=True)
    total = weight.new_zeros(())
    for similarity in pairs:  # regions to phrases, and phrases to regions
        logits = scale.float() * similarity
        # A duplicate is neither an answer nor a wrong one: -inf takes it out of the denominator.
        among = logits.masked_fill(~candidates, -torch.inf).logsumexp(1)
        total = total + 0.5 * (weight * (among - (share * logits).sum(1))).sum()
    return total / valid.clamp(min=1)


def _pick(table: Float[Tensor, "P S"], column: Int[Tensor, " P"]) -> Float[Tensor, " P"]:
    """One entry of every row; a boolean index would make the device say how many there are."""
    return table.gather(1, column.unsqueeze(1)).squeeze(1)


def contrastive_loss(
    image: Float[Tensor, "B D"], text: Float[Tensor, "B D"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE on cosines (eq. 21; open_clip's ClipLoss).

    The second term of (21) mixes its indices in print; it is read as text to image. Under several
    processes every process contrasts its own rows with the rows of all, gathered with gradient, so
    the averaged gradient is that of one process on the joined batch.

    Args:
        image: Embeddings F_I, any length.
        text: Embeddings F_T of the captions, any length.
        scale: Inverse temperature, exp(log_scale).
    """
    # `unit` is fp32: at scale 100, a cosine rounded to bf16 (2^-9) would move its logit by 0.2.
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world_size())
    result: Tensor = loss(unit(image), unit(text), scale.float())
    return result


def pair_log_probabilities(
    image: Float[Tensor, "B D"], text: Float[Tensor, "B D"], scale: Float[Tensor, ""]
) -> Float[Tensor, "2 B"]:
    """Logarithms of the probabilities that (21) gives to the pairs: image to text, text to image.

    Minus their mean is `contrastive_loss`, also under several processes.

    Args:
        image: Embeddings F_I, any length.
        text: Embeddings F_T of the captions, any length.
        scale: Inverse temperature.
    """
    image, text = unit(image), unit(text)
    counts = row_counts(len(image), image.device)
    column = sum(counts[: rank()]) + torch.arange(len(image), device=image.device)
    directions = (image @ gather_rows(text, counts).T, text @ gather_rows(image, counts).T)
    tables = [(scale.float() * similarity).log_softmax(1) for similarity in directions]
    return torch.stack([_pick(table, column) for table in tables])
