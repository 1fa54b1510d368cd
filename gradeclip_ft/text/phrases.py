"""Phrases of a caption that name objects: "adjective + noun" (first extended version, 5.2).

Lower-cased, split into words as the Penn Treebank does, tagged, and chunked by the one rule
{<JJ.*>*<NN.*>+}: any adjectives, then one or more nouns. "a dog in a black car waiting for
traffic lights" gives dog, black car and traffic lights.
"""

from __future__ import annotations

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
from typing import Literal, Protocol, runtime_checkable

import nltk
from nltk.tag.perceptron import PerceptronTagger
from nltk.tokenize.destructive import NLTKWordTokenizer
from textblob import en

from gradeclip_ft.text.perceptron import Perceptron

PACKAGE = "averaged_perceptron_tagger_eng"
TaggerKind = Literal["auto", "nltk", "textblob"]

# Sentences of the two papers, each word with its class: J adjective, N noun, "-" any other.
KNOWN_SENTENCES = (
    ("a dog in a black car waiting for traffic lights", "-N--JN--NN"),
    ("beer and bananas for dinner on tuesday", "N-N-N-N"),
)
logger = logging.getLogger(__name__)


@runtime_checkable
class Tagger(Protocol):
    """Gives each word of one caption a Penn Treebank tag."""

    @property
    def name(self) -> str:
        """What the run's record and precomputed phrases call it."""
        ...

    def tag(self, tokens: Sequence[str]) -> list[tuple[str, str]]:
        """Pairs of word and tag, in the order of the words."""
        ...


@dataclass(frozen=True)
class _NamedTagger:
    name: str
    function: Callable[[Sequence[str]], Sequence[Sequence[str]]]

    def tag(self, tokens: Sequence[str]) -> list[tuple[str, str]]:
        return [(word, tag) for word, tag in self.function(tokens)]


def prepare_tagger(kind: TaggerKind, *, fetch: bool = True, timeout: float = 30.0) -> str:
    """Which tagger a run will use; fetches NLTK's data if it is missing.

    Call it in the main process, once per machine: simultaneous downloads into one folder would
    corrupt it.

    Args:
        kind: "auto" takes NLTK where its data can be had and TextBlob's lexicon, with a warning,
            elsewhere.
        fetch: Whether missing data may be downloaded.
        timeout: Seconds after which a download is given up.

    Returns:
        "nltk" or "textblob".

    Raises:
        LookupError: `kind` is "nltk" and its data is missing, refused or wrong; the text says
            what to do.
    """
    if kind not in ("auto", "nltk", "textblob"):
        raise ValueError(f"tagger {kind!r} is unknown; use auto, nltk or textblob")
    if kind == "textblob":
        return load_tagger("textblob").name
    problem = nltk_problem()
    if problem is not None and fetch and not _present():
        failure = _fetch(_data_home(), timeout)
        problem = nltk_problem() if failure is None else f"{problem} ({failure})"
    if problem is None:
        return "nltk"
    if kind == "nltk":
        raise LookupError(problem)
    _warn_fallback(problem)
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
        nltk_tagger = _load_perceptron()
        model = nltk_tagger.model
        quick = Perceptron(model.weights, nltk_tagger.tagdict, sorted(model.classes))
        tagger = _NamedTagger("nltk", quick.tag)
    elif name == "textblob":
        tagger = _NamedTagger("textblob", en.parser.find_tags)
    else:
        raise ValueError(f"tagger {name!r} is unknown; use nltk or textblob")
    _check(tagger)
    return tagger


def word_class(tag: str) -> str:
    """J for the tags <JJ.*>, N for <NN.*>, "-" for all others."""
    if tag.startswith("NN"):
        return "N"
    return "J" if tag.startswith("JJ") else "-"


def _load_perceptron() -> PerceptronTagger:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NLTK's note on refused folders: see below
        try:
            return PerceptronTagger()
        except LookupError:
            problem = _refusal() if _present() else _missing()
        except (OSError, ValueError, KeyError) as error:
            problem = f"NLTK's {PACKAGE} does not load ({error}); {_remedy()}"
    raise LookupError(problem)


def _missing() -> str:
    folders = ", ".join(map(str, nltk.data.path))
    return f"NLTK's {PACKAGE} is in none of {folders}; {_remedy()}"


def _refusal() -> str:
    """NLTK refuses data that another account could have changed."""
    folders = " ".join(f"'{path}'" for path in _suspects() or _present())
    return (
        f"NLTK refuses its {PACKAGE}: {folders} can be written by others or belongs to somebody "
        f"else; run `chmod -R go-w {folders}`, or copy it to a private folder and point NLTK_DATA "
        f"there"
    )


def _remedy() -> str:
    command = f"{sys.executable} -m nltk.downloader {PACKAGE}"
    return f"run `{command}`, or point NLTK_DATA to a folder that has it"


def _present() -> list[Path]:
    """Copies of the data on NLTK's path, readable or not."""
    folders = [Path(folder) / "taggers" for folder in nltk.data.path]
    names = (PACKAGE, f"{PACKAGE}.zip")
    return [folder / name for folder in folders for name in names if (folder / name).exists()]


def _data_home() -> Path:
    """Where a download goes: the first folder of NLTK_DATA, else nltk_data in the home folder."""
    return Path(os.environ.get("NLTK_DATA", "").split(os.pathsep)[0] or Path.home() / "nltk_data")


def _suspects() -> list[Path]:
    """Folders and files of the data with a writable mode or a foreign owner."""
    found = []
    for copy in _present():
        for path in (copy.parents[1], copy.parent, copy):
            status = path.stat()
            foreign = hasattr(os, "getuid") and status.st_uid not in (0, os.getuid())
            if status.st_mode & 0o022 or foreign:
                found.append(path)
    return found


def _check(tagger: Tagger) -> None:
    for sentence, expected in KNOWN_SENTENCES:
        classes = "".join(word_class(tag) for _, tag in tagger.tag(sentence.split()))
        if classes != expected:
            raise LookupError(
                f"the {tagger.name} tagger finds the word classes {classes} in {sentence!r}, "
                f"expected {expected}: its data is incomplete or not English; delete "
                f"{', '.join(map(str, _present()))}, then {_remedy()}"
            )


@cache
def _fetch(home: Path, timeout: float) -> str | None:
    """Downloads into a temporary folder, then renames: a parallel run never sees half a file.

    Returns:
        What went wrong, or None.
    """
    target = home / "taggers"
    name = f"{PACKAGE}.zip"
    try:
        target.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target) as folder:
            command = [sys.executable, "-m", "nltk.downloader", "-e", "-d", folder, PACKAGE]
            done = subprocess.run(command, timeout=timeout, capture_output=True, text=True)
            archive = Path(folder) / "taggers" / name
            if not archive.exists():  # the downloader's exit code is 0 even so
                words = done.stderr.replace("[nltk_data]", "").split()
                return f"the download failed: {' '.join(words)[-200:]}"
            archive.chmod(0o644)
            archive.replace(target / name)
    except subprocess.TimeoutExpired:
        return f"the download was given up after {timeout:.0f} s"
    except OSError as error:
        return f"the download failed: {error}"
    return None


@cache
def _warn_fallback(problem: str) -> None:
    logger.warning(
        "phrases come from TextBlob's packaged lexicon, a weaker tagger than the paper's: %s",
        problem,
    )


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
