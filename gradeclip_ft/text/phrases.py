"""Phrases of a caption that name objects: "adjective + noun" (first extended version, 5.2).

Lower-cased, split into words as the Penn Treebank does, tagged, and chunked by the one rule
{<JJ.*>*<NN.*>+}: any adjectives, then one or more nouns. "a dog in a black car waiting for
traffic lights" gives dog, black car and traffic lights.
"""

from __future__ import annotations

import html
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import nltk
from nltk.tag.perceptron import PerceptronTagger
from nltk.tokenize.destructive import NLTKWordTokenizer
from textblob import en

PACKAGE = "averaged_perceptron_tagger_eng"
TaggerKind = Literal["auto", "nltk", "textblob"]
# Changes whenever the same caption and tagger would give other phrases; precomputed ones name it.
RULE = "JJ*NN+ 2"
# Sentences of the two papers, each word with its class: J adjective, N noun, "-" any other.
KNOWN_SENTENCES = (
    ("a dog in a black car waiting for traffic lights", "-N--JN--NN"),
    ("beer and bananas for dinner on tuesday", "N-N-N-N"),
)
SECONDS = 30  # that a download may take
LONGEST_CAPTION = 2000  # characters: tagging takes time, and no text tower reads as far
CHUNK = re.compile("J*N+")
# The tokenizer expects one sentence. A full stop inside a caption is set apart, also one without a
# space ("A dog.A cat."); "st." and "u.s." stay.
SENTENCE_END = re.compile(
    r"(?<=[^\W\d_]{3})\.(?=\s|[A-Z]|(?:an?|the|this|there|some|one|two|three|he|she|it|they)\b)"
)
# Leftovers of web pages. "<PERSON>" and its like, by which data sets replace names, stay.
MARKUP = re.compile(r"[<&]|://|\bwww\.", re.IGNORECASE)
BREAK = re.compile(
    r"</?(?:br|p|div|h[1-6]|hr|li|ul|ol|tr|td|th|table|img|figure|script|style)\b[^<>]*>"
    r"|https?://\S+|\bwww\.\S+",
    re.IGNORECASE,
)
TAG = re.compile(
    r"</?(?:a|abbr|b|big|center|cite|code|em|font|i|mark|q|s|small|span|strike|strong|sub|sup|tt|u)"
    r"(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
ENTITY = re.compile(r"&(?:#\d+|#x[\da-f]+|[a-z][a-z\d]*);", re.IGNORECASE)
# Most captions hold words, commas and a last full stop alone: the Treebank's forty rules do to them
# what setting these marks apart does, unless a word is one of the contractions it splits.
PLAIN = re.compile(r"[a-z0-9]+(?:(?:-| ?,? )[a-z0-9]+)* ?\.?")
SPLIT_WORDS = re.compile(r"\b(?:cannot|gimme|gonna|gotta|lemme|wanna)\b")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tagger:
    """Gives each word of one caption a Penn Treebank tag.

    Attributes:
        name: What the run's record and precomputed phrases call it.
        tag: Words to pairs of word and tag, in their order.
    """

    name: str
    tag: Callable[[Sequence[str]], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class PhraseFinder:
    """Finds the phrases of a caption.

    Attributes:
        tagger: Gives the word classes.
        max_phrases: Most phrases that are kept of a caption, the first ones.
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
        text = SENTENCE_END.sub(" . ", without_markup(caption[:LONGEST_CAPTION]))
        tagged = self.tagger.tag(self._tokens(text.lower()))
        return list(dict.fromkeys(chunks(tagged)))[: self.max_phrases]

    def _tokens(self, text: str) -> list[str]:
        """Words and marks as the Treebank splits them."""
        if PLAIN.fullmatch(text) and not SPLIT_WORDS.search(text):
            return text.replace(",", " ,").replace(".", " .").split()
        tokens: list[str] = self._split.tokenize(text)
        return tokens


def without_markup(caption: str) -> str:
    """A caption without tags, entities and addresses of web pages.

    >>> without_markup("A &quot;red&quot; <b>dog</b><br/>by https://example.com/a.jpg")
    'A "red"  dog  . by  . '
    """
    if not MARKUP.search(caption):
        return caption
    text = ENTITY.sub(lambda entity: html.unescape(entity[0]), caption)
    return TAG.sub(" ", BREAK.sub(" . ", text))


def chunks(tagged: Iterable[Sequence[str]]) -> list[str]:
    """Runs of words that match {<JJ.*>*<NN.*>+}, as `nltk.RegexpParser` finds them.

    A token without a letter or digit ends a run whatever its tag: taggers take "<" or "*" for
    nouns at times.
    """
    words, classes = [], []
    for word, tag in tagged:
        words.append(word)
        classes.append(word_class(tag) if any(map(str.isalnum, word)) else "-")
    return [" ".join(words[slice(*m.span())]) for m in CHUNK.finditer("".join(classes))]


def word_class(tag: str) -> str:
    """J for the tags <JJ.*>, N for <NN.*>, "-" for all others."""
    if tag.startswith("NN"):
        return "N"
    return "J" if tag.startswith("JJ") else "-"


def prepare_tagger(kind: TaggerKind, *, fetch: bool = True) -> str:
    """Which tagger a run will use; fetches NLTK's data if it is missing.

    Call it in the main process, once per machine: simultaneous downloads into one folder would
    corrupt it.

    Args:
        kind: "auto" takes NLTK where its data can be had and TextBlob's lexicon, with a warning,
            elsewhere.
        fetch: Whether missing data may be downloaded.

    Returns:
        "nltk" or "textblob".

    Raises:
        LookupError: `kind` is "nltk" and its data is missing, refused or wrong; the text says
            what to do.
    """
    if kind == "textblob":
        return load_tagger(kind).name
    if kind not in ("auto", "nltk"):
        raise ValueError(f"tagger {kind!r} is unknown; use auto, nltk or textblob")
    problem = nltk_problem()
    if problem is not None and fetch and not _present():
        failure = _fetch()
        problem = f"{problem} ({failure})" if failure else nltk_problem()
    if problem is None:
        return "nltk"
    if kind == "nltk":
        raise LookupError(problem)
    missing = (
        f"its data are not here and cannot be fetched; run python -m nltk.downloader {PACKAGE}"
    )
    _warn_fallback(problem if _present() else missing)
    return load_tagger("textblob").name


def nltk_problem() -> str | None:
    """Why NLTK's tagger cannot be used, with the remedy; None if it can."""
    try:
        load_tagger("nltk")
    except LookupError as error:
        return str(error)
    return None


@cache
def load_tagger(name: str) -> Tagger:
    """The tagger of that name, checked with two known sentences; kept, so forked workers share it.

    Raises:
        LookupError: NLTK's data is missing, refused or wrong.
    """
    if name == "nltk":
        tagger = Tagger(name, _load_nltk().tag)
    elif name == "textblob":
        tagger = Tagger(name, en.parser.find_tags)
    else:
        raise ValueError(f"tagger {name!r} is unknown; use nltk or textblob")
    for sentence, expected in KNOWN_SENTENCES:
        classes = "".join(word_class(tag) for _, tag in tagger.tag(sentence.split()))
        if classes != expected:
            raise LookupError(
                f"the {name} tagger finds the word classes {classes} in {sentence!r}, expected "
                f"{expected}: its data is incomplete or not English; {_remedy()}"
            )
    return tagger


def _load_nltk() -> PerceptronTagger:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what the LookupError says as well
            return PerceptronTagger()
    except LookupError:
        if folders := " ".join(f"'{path.parents[1]}'" for path in _present()):
            problem = (
                f"NLTK refuses its {PACKAGE}: {folders} can be written by others or belongs to "
                f"somebody else; run `chmod -R go-w {folders}`, or copy it to a private folder "
                "and point NLTK_DATA there"
            )
        else:
            problem = f"NLTK's {PACKAGE} is in none of {', '.join(nltk.data.path)}; {_remedy()}"
    except Exception as error:  # of damaged files: from BadZipFile to KeyError
        problem = f"NLTK's {PACKAGE} does not load ({type(error).__name__}: {error}); {_remedy()}"
    raise LookupError(problem)


def _remedy() -> str:
    present = ", ".join(map(str, _present()))
    again = f"delete {present}, then " if present else ""
    command = f"{sys.executable} -m nltk.downloader {PACKAGE}"
    return f"{again}run `{command}`, or point NLTK_DATA to a folder that has it"


def _present() -> list[Path]:
    """Copies of the data on NLTK's path, readable or not."""
    names = (PACKAGE, f"{PACKAGE}.zip")
    paths = [Path(folder) / "taggers" / name for folder in nltk.data.path for name in names]
    return [path for path in paths if path.exists()]


@cache
def _fetch() -> str | None:
    """Downloads aside, then renames: a parallel run never sees half a file.

    In a process of its own, because NLTK's downloader has no time limit.

    Returns:
        What went wrong, or None.
    """
    home = os.environ.get("NLTK_DATA", "").split(os.pathsep)[0] or Path.home() / "nltk_data"
    target = Path(home) / "taggers"
    try:
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as folder:
            command = [sys.executable, "-m", "nltk.downloader", "-e", "-d", folder, PACKAGE]
            done = subprocess.run(command, timeout=SECONDS, capture_output=True, text=True)
            archive = Path(folder) / "taggers" / f"{PACKAGE}.zip"
            if not archive.exists():  # the downloader's exit code is 0 even so
                words = done.stderr.replace("[nltk_data]", "").split()
                return f"the download failed: {' '.join(words)[-200:]}"
            archive.chmod(0o644)  # NLTK refuses what a group may write
            archive.replace(target / archive.name)
    except subprocess.TimeoutExpired:
        return f"the download was given up after {SECONDS} s"
    except OSError as error:
        return f"the download failed: {error}"
    return None


@cache
def _warn_fallback(reason: str) -> None:
    logger.warning(
        "phrases come from TextBlob's lexicon, a weaker tagger than the paper's NLTK: %s", reason
    )
