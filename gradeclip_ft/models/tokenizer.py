"""Texts to token ids: open_clip's and Hugging Face's tokenizers, and the shapes world's words.

Cutting the padding after the longest text of a call saves most of the cost of short phrases. It is
exact for causal towers that pool at the end of the text, and for towers that mask their padding
(traps: E10).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from open_clip.tokenizer import HFTokenizer
from torch import Tensor

from gradeclip_ft.batch import PackedTexts
from gradeclip_ft.models.packing import MULTIPLE, pack_texts
from gradeclip_ft.models.trace import Foreign

STARTS = ("Ġ", "▁")  # byte-level and sentence pieces: the mark of a word's first piece
CONTINUES = "##"  # word pieces: the mark of every other piece
ENDS = "</w>"  # CLIP's own: the mark of a word's last piece
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Word:
    """One word of a text.

    Attributes:
        text: As the tokenizer gives it back: lower-cased or cleaned where it does so.
        pieces: Tokens that it became.
    """

    text: str
    pieces: int


def words_of(tokenizer: Foreign, text: str) -> list[Word]:
    """Words of a text of any length, without the tokens that mark start and end.

    Raises:
        ValueError: The tokenizer is neither open_clip's, nor its wrapper around transformers, nor
            one with `words` itself.
    """
    inner: Foreign = getattr(tokenizer, "tokenizer", None)
    if hasattr(tokenizer, "words"):
        found: list[Word] = tokenizer.words(text)
        return found
    if hasattr(tokenizer, "decoder"):
        pieces = tokenizer.encode(tokenizer.clean_fn(text))
        ends = [tokenizer.decoder[piece].endswith(ENDS) for piece in pieces]
        firsts, join = [True, *ends[:-1]], tokenizer.decode
    elif hasattr(inner, "convert_ids_to_tokens"):
        # One piece may carry no mark in either style; a text of two words tells which it is.
        pieces, two = (
            inner.convert_ids_to_tokens(
                inner(words, add_special_tokens=False, truncation=False)["input_ids"]
            )
            for words in (tokenizer.clean_fn(text), "a a")
        )
        marked = any(piece.startswith(STARTS) for piece in [*pieces, *two])
        firsts = [
            piece.startswith(STARTS) if marked else not piece.startswith(CONTINUES)
            for piece in pieces
        ]
        join = inner.convert_tokens_to_string
    else:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which tokens make a word; expected "
            "open_clip's tokenizer, one of transformers, or one with a method words(text)"
        )
    groups: list[list[Any]] = []
    for piece, first in zip(pieces, firsts, strict=False):
        if first or not groups:
            groups.append([])
        groups[-1].append(piece)
    return [Word(join(group).strip(), len(group)) for group in groups]


KEPT = 20_000  # texts whose ids are remembered, 12 MB at CLIP's context


@dataclass(frozen=True)
class Tokenizer:
    """One tokenizer, one call.

    Attributes:
        tokenize: Texts to ids at the full context, padded after the end of the text.
        context_length: L of the text tower.
        exact_cut: Whether the tower's result survives a shorter context.
        pad: Id of the padding.
        packs: Whether the tower takes packed texts.
    """

    tokenize: Callable[[list[str]], Tensor]
    context_length: int
    exact_cut: bool = True
    pad: int = 0
    packs: bool = False
    _known: dict[str, ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, texts: Sequence[str], *, trim: bool = False) -> Int[Tensor, "M L"]:
        """Token ids; texts that are too long keep their end-of-text token last.

        With `trim` cut after the longest text, rounded up to a multiple of 8, where that is exact.
        """
        if not texts:
            length = min(MULTIPLE, self.context_length) if trim else self.context_length
            return torch.full((0, length), self.pad, dtype=torch.long)
        ids = self._ids(texts)
        if not (trim and self.exact_cut):
            return ids
        return ids[:, : -(-int(self.lengths(ids).max()) // MULTIPLE) * MULTIPLE]

    def _ids(self, texts: Sequence[str]) -> Int[Tensor, "M L"]:
        """At the full context; texts that came before, as phrases do, are looked up."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        if len(self._known) + len(fresh) > KEPT:
            self._known.clear()
            fresh = list(dict.fromkeys(texts))
        if fresh:
            self._known.update(zip(fresh, self.tokenize(fresh).long().numpy(), strict=True))
        return torch.from_numpy(np.stack([self._known[text] for text in texts]))

    def pack(self, *groups: Int[Tensor, "_ _"]) -> PackedTexts | None:
        """Token ids of this tokenizer, one group after the other; None where the tower cannot.

        A text ends where its last id, the end of a text, occurs for the first time.
        """
        if not self.packs:
            return None
        texts = []
        for ids in groups:
            for row, length in zip(ids.tolist(), self.lengths(ids).tolist(), strict=True):
                texts.append(row[: row.index(row[length - 1]) + 1])
        return pack_texts(texts, pad=self.pad)

    def lengths(self, ids: Int[Tensor, "M L"]) -> Int[Tensor, " M"]:
        """Tokens of every text up to its end; at least one."""
        position = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        return (position * (ids != self.pad)).amax(1).clamp(min=1)

    def warn_of_unknown(self, texts: Iterable[str]) -> None:
        """Log which share of the words a closed vocabulary does not have, and which words."""
        if not isinstance(self.tokenize, WordTokenizer):
            return
        words = Counter(word for text in texts for word in split_words(text))
        unknown = [word for word, _ in words.most_common() if word not in self.tokenize.vocabulary]
        if unknown:
            log.warning(
                "this model knows %d words; %.0f %% of those here (%s) are others, which it cannot "
                "tell apart; choose a model for any text, such as model=ViT-B-32",
                len(self.tokenize.vocabulary),
                100 * sum(words[word] for word in unknown) / words.total(),
                ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else ""),
            )

    def words(self, text: str) -> tuple[list[Word], str]:
        """The words that fit into the context, and the rest of the text, which is never read.

        >>> Tokenizer(WordTokenizer(("red",), 4), 4).words("Red circles on grass")[1]
        'on grass'
        """
        words = words_of(self.tokenize, text)
        room = self.context_length - int(self.lengths(self.tokenize([""]))[0])
        ends = accumulate(word.pieces for word in words)
        kept = sum(end <= room for end in ends)
        return words[:kept], " ".join(word.text for word in words[kept:])


@dataclass(frozen=True)
class WordTokenizer:
    """Whole words of a closed vocabulary.

    Ids: 0 padding, 1 unknown, then the words, then start and end of text, the two largest, so that
    open_clip's arg-max pooling finds the end.

    """

    vocabulary: tuple[str, ...]
    context_length: int

    def __call__(self, texts: Sequence[str]) -> Int[Tensor, "M L"]:
        """Token ids at the full context."""
        index = {word: row for row, word in enumerate(self.vocabulary, start=2)}
        start, end = len(self.vocabulary) + 2, len(self.vocabulary) + 3
        ids = torch.zeros((len(texts), self.context_length), dtype=torch.long)
        for row, text in enumerate(texts):
            words = [index.get(word, 1) for word in split_words(text)]
            line = [start, *words[: self.context_length - 2], end]
            ids[row, : len(line)] = torch.tensor(line)
        return ids

    def words(self, text: str) -> list[Word]:
        """Words of a text, one token each."""
        return [Word(word, 1) for word in split_words(text)]


def fetch_tokenizer(source: str, length: int, extra: Mapping[str, Any]) -> HFTokenizer:
    """A tokenizer of Hugging Face with rows of this length, from a folder or the model hub.

    Raises:
        ValueError: transformers is not installed, or there is no such tokenizer.
    """
    try:
        return HFTokenizer(source, context_length=length, **extra)
    except ImportError as error:
        raise ValueError(
            f"the tokenizer {source} needs transformers; pip install 'gradeclip_ft[huggingface]'"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer {source} cannot be fetched ({str(error).splitlines()[0]}); download "
            "its folder where there is a network, and name it as text_cfg.hf_tokenizer_name in an "
            "open_clip_config.json beside the weights"
        ) from error


def split_words(text: str) -> list[str]:
    """Lower-case words and numbers; everything else separates.

    >>> split_words("A red circle, 2 stars.")
    ['a', 'red', 'circle', '2', 'stars']
    """
    return re.findall(r"[a-z]+|[0-9]+", text.lower())
