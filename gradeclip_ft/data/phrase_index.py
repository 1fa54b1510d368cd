"""Phrases computed ahead, in each sample's JSON: written once, looked up by the loader.

    "phrases": {"rule": "JJ*NN+ 1", "tagger": "nltk", "max_phrases": 5,
                "found": {"a dog in a black car": ["dog", "black car"]}}

They are looked up by the caption's own words, so a sample whose caption was edited, or that was
computed by another tagger, is simply parsed anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradeclip_ft.data.samples import MOST_CHARACTERS
from gradeclip_ft.text.phrases import RULE, Phrases

KEY = "phrases"


def phrase_entry(captions: Sequence[str], phrases: Phrases) -> dict[str, Any]:
    """What a sample's JSON gets under "phrases"."""
    return {
        "rule": RULE,
        "tagger": phrases.tagger.name,
        "max_phrases": phrases.max_phrases,
        "found": {caption: phrases(caption) for caption in captions},
    }


def stored_phrases(
    record: Mapping[str, Any], caption: str, *, tagger: str, max_phrases: int
) -> list[str] | None:
    """Phrases of a caption from its sample's JSON; None if they were made with other settings.

    Phrases made with a higher `max_phrases` serve too: the first ones are the same.
    """
    entry = record.get(KEY)
    if not isinstance(entry, Mapping):
        return None
    stored, found = entry.get("max_phrases"), entry.get("found")
    same = entry.get("rule") == RULE and entry.get("tagger") == tagger
    enough = isinstance(stored, int) and stored >= max_phrases
    if not (same and enough and isinstance(found, Mapping) and caption in found):
        return None
    phrases = found[caption]
    if not isinstance(phrases, list) or not all(map(_is_phrase, phrases)):
        return None
    return phrases[:max_phrases]


def _is_phrase(entry: object) -> bool:
    """Words of a caption, in characters that every tokenizer knows."""
    return isinstance(entry, str) and 0 < len(entry) <= MOST_CHARACTERS and entry.isprintable()
