"""Captions per second of the phrase finder, beside nltk.pos_tag in a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import nltk

from gradeclip_ft.data.captions import caption_phrases, phrase_entry
from gradeclip_ft.data.coco import read_captions
from gradeclip_ft.text.phrases import PhraseFinder, load_tagger

from .clock import cpu_seconds, in_turns
from .inputs import PHOTOS, read_pairs, tagger_name
from .publish import Section, publish

GRAMMAR = nltk.RegexpParser("NP: {<JJ.*>*<NN.*>+}")


def phrases(
    *, captions: Path | None = None, count: int = 2000, rounds: int = 7, out: Path | None = None
) -> None:
    """Phrases by each tagger, by lookup, and by NLTK's own functions one after the other."""
    texts, source = _captions(captions, count)
    variants: dict[str, Callable[[], object]] = {}
    if tagger_name() == "nltk":
        variants["nltk.pos_tag and RegexpParser, plain loop"] = partial(_each, _plain, texts)
        variants["nltk.pos_tag alone, plain loop"] = partial(_each, _tags, texts)
    for name in [tagger_name(), "textblob"] if tagger_name() == "nltk" else ["textblob"]:
        finder = PhraseFinder(load_tagger(name), 5)
        variants[f"ours, {name}"] = partial(_each, finder, texts)
        record = {"phrases": phrase_entry(texts, finder)}
        variants[f"ours, {name}, computed ahead"] = partial(
            _each, partial(_stored, record, finder), texts
        )
    turns = in_turns(variants, rounds=rounds, now=cpu_seconds)
    base = next(iter(variants))
    rows: dict[str, dict[str, float | str]] = {
        name: {
            "captions/s": len(texts) / turns.median(name),
            "faster than the first row": turns.ratio(base, name),
            "rounds": turns.spread(base, name),
        }
        for name in variants
    }
    notes = [f"{source}; medians over {rounds} rounds in turns behind one of warm-up; one core."]
    publish(Section("phrases", rows, notes), out, threads=None)


def _captions(path: Path | None, count: int) -> tuple[list[str], str]:
    listing = path or PHOTOS / "annotations" / "captions_val2017.json"
    if listing.is_file():
        every = [caption for entry in read_captions(listing) for caption in entry.captions]
        return every[:count], f"{len(every[:count])} captions of {listing.name}"
    every = [caption for pair in read_pairs(0)[0] for caption in pair.captions]
    return every[:count], "written captions"


def _each(function: Callable[[str], object], texts: list[str]) -> None:
    for text in texts:
        function(text)


def _plain(text: str) -> list[str]:
    """What NLTK's documentation shows."""
    tree = GRAMMAR.parse(nltk.pos_tag(nltk.NLTKWordTokenizer().tokenize(text.lower())))
    found = (" ".join(word for word, _ in part) for part in tree.subtrees() if part.label() == "NP")
    return list(dict.fromkeys(found))


def _tags(text: str) -> object:
    return nltk.pos_tag(nltk.NLTKWordTokenizer().tokenize(text.lower()))


def _stored(record: Mapping[str, object], finder: PhraseFinder, text: str) -> object:
    return caption_phrases(record, text, finder)
