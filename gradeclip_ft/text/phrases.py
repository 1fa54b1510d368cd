"""Phrases of a caption that name objects: "adjective + noun" (first extended version, 5.2).

Lower-cased, split into words as the Penn Treebank does, tagged, and chunked by the one rule
{<JJ.*>*<NN.*>+}: any adjectives, then one or more nouns. "a dog in a black car waiting for
traffic lights" gives dog, black car and traffic lights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from nltk.tokenize.destructive import NLTKWordTokenizer

from gradeclip_ft.text.taggers import Tagger, word_class

# Changes whenever the same caption and tagger would give other phrases; precomputed ones name it.
RULE = "JJ*NN+ 1"
_LONGEST_CAPTION = 2000  # characters: tagging takes time, and no text tower reads as far
_CHUNK = re.compile("J*N+")
# The tokenizer expects one sentence. A full stop inside a caption is set apart; "st." and "u.s."
# stay.
_SENTENCE_END = re.compile(r"(?<=[^\W\d_]{3})\.(?=\s)")
# Most captions hold words, commas and a last full stop alone: the Treebank's forty rules do to them
# what setting these marks apart does, unless a word is one of the contractions it splits.
_PLAIN = re.compile(r"[a-z0-9]+(?:(?:-| ?,? )[a-z0-9]+)* ?\.?")
_SPLIT_WORDS = re.compile(r"\b(?:cannot|gimme|gonna|gotta|lemme|wanna)\b")


@dataclass(frozen=True)
class Phrases:
    """Finds the phrases of a caption.

    Attributes:
        tagger: Gives the word classes.
        max_phrases: Only the first so many phrases of a caption are kept.
    """

    tagger: Tagger
    max_phrases: int
    _split: NLTKWordTokenizer = field(default_factory=NLTKWordTokenizer, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_phrases < 0:
            raise ValueError(f"max_phrases is {self.max_phrases}; use 0 (no phrases) or more")

    def __call__(self, caption: str) -> list[str]:
        """The distinct phrases of a caption, lower-cased, in the order they first occur."""
        if self.max_phrases == 0:
            return []
        tagged = self.tagger.tag(self._tokens(caption[:_LONGEST_CAPTION].lower()))
        return list(dict.fromkeys(chunks(tagged)))[: self.max_phrases]

    def _tokens(self, text: str) -> list[str]:
        """Words and marks as the Treebank splits them."""
        if _PLAIN.fullmatch(text) and not _SPLIT_WORDS.search(text):
            return text.replace(",", " ,").replace(".", " .").split()
        tokens: list[str] = self._split.tokenize(_SENTENCE_END.sub(" .", text))
        return tokens


def chunks(tagged: Iterable[tuple[str, str]]) -> list[str]:
    """Runs of words that match {<JJ.*>*<NN.*>+}, as `nltk.RegexpParser` finds them.

    A token without a letter or digit ends a run whatever its tag: taggers take "<" or "*" for
    nouns at times.
    """
    words, classes = [], []
    for word, tag in tagged:
        words.append(word)
        classes.append(word_class(tag) if any(map(str.isalnum, word)) else "-")
    return [" ".join(words[slice(*m.span())]) for m in _CHUNK.finditer("".join(classes))]
