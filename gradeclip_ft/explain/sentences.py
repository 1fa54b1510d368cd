"""Sentences to relevance per word, by several methods for the same pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradeclip_ft.explain.base import Explainer, explain_text
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.tower import UnsupportedTowerError

Merge = Literal["sum", "max", "mean"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sentence:
    """What each word says for a picture.

    Attributes:
        words: Those that the model reads.
        cut: The rest of the text, beyond its context.
        values: Relevance of every word by method; with `sum` they sum to 1, less what stands on a
            word that the context cuts in two, or are all 0.
    """

    words: tuple[str, ...]
    cut: str
    values: Mapping[str, Float[Tensor, " W"]]


def explain_sentences(
    loaded: LoadedClip,
    texts: Sequence[str],
    target: Float[Tensor, "P D"],
    methods: Mapping[str, Explainer],
    *,
    owner: Int[Tensor, " P"] | None = None,
    merge: Merge = "sum",
    skip: bool = False,
) -> list[Sentence]:
    """Relevance of the words of texts for pictures.

    Args:
        loaded: The model, on its device.
        texts: Sentences.
        target: Embeddings of pictures, any length.
        methods: By name.
        owner: Text of each picture; None for one each.
        merge: How the tokens of a word become its value. Relevance is a distribution over tokens,
            so their sum is the default; the authors merge nothing.
        skip: Leave out, with a word in the log, what this model cannot do.

    Returns:
        One per picture, in the order of `target`.

    Raises:
        UnsupportedTowerError: The text tower cannot do a method and `skip` is false.
        ValueError: Counts of texts and pictures differ without an `owner`.
    """
    if owner is None:
        if len(texts) != len(target):
            raise ValueError(
                f"{len(texts)} texts for {len(target)} pictures; give one each, or owner="
            )
        owner = torch.arange(len(texts))
    read = [loaded.tokenizer.words(text) for text in texts]
    ids = loaded.tokenizer(texts, trim=True).to(loaded.clip.log_scale.device)
    found: dict[str, Tensor] = {}
    left: dict[str, list[str]] = {}
    for name, method in methods.items():
        try:
            found[name] = explain_text(method, loaded.clip, ids, target, owner).cpu()
        except UnsupportedTowerError as error:
            if not skip:
                raise
            left.setdefault(str(error), []).append(name)
    for reason, names in left.items():
        log.warning("words by %s are left out: %s", ", ".join(names), reason)
    first = _first_words(loaded, ids) if found else torch.zeros(len(texts), dtype=torch.long)
    sentences = []
    for row, text in enumerate(owner.tolist()):
        words, cut = read[text]
        pieces = [word.pieces for word in words]
        values = {
            name: merge_pieces(relevance[row, int(first[text]) :], pieces, merge)
            for name, relevance in found.items()
        }
        sentences.append(Sentence(tuple(word.text for word in words), cut, values))
    return sentences


def merge_pieces(
    relevance: Float[Tensor, " N"], pieces: Sequence[int], merge: Merge = "sum"
) -> Float[Tensor, " W"]:
    """Relevance per token to relevance per word.

    Args:
        relevance: From the first word's first token on; what follows the last word is ignored.
        pieces: Tokens of every word.
        merge: Sum, largest or mean.
    """
    ends = list(accumulate(pieces))
    parts = [relevance[end - count : end] for count, end in zip(pieces, ends, strict=True)]
    how: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": torch.sum,
        "max": torch.amax,
        "mean": torch.mean,
    }
    return torch.stack([how[merge](part) for part in parts]) if parts else relevance.new_zeros(0)


def _first_words(loaded: LoadedClip, ids: Int[Tensor, "M L"]) -> Int[Tensor, " M"]:
    """Position of the first token of the first word."""
    with torch.no_grad():
        explained = loaded.clip.text.open(ids).explained
    return explained.int().argmax(1).cpu()
