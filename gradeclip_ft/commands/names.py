"""What somebody may have meant by a misspelt name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

LISTED = 12
LIKE = 0.6  # difflib's usual bound for "similar"
TIE = 0.1


def close_to(name: str, names: Iterable[str]) -> list[str]:
    """The name most like `name`, and a second one if it is nearly as like; else abbreviations."""
    listed = list(dict.fromkeys(names))
    likeness = {known: SequenceMatcher(None, name, known).ratio() for known in listed}
    ranked = sorted(listed, key=lambda known: -likeness[known])[:2]
    best = likeness[ranked[0]] if ranked else 0.0
    if best >= LIKE:
        return [known for known in ranked if likeness[known] >= max(LIKE, best - TIE)]
    return [known for known in listed if name and known.startswith(name)][:2]


def suggest(name: str, names: Iterable[str]) -> str:
    """Close names as a question, or else all there is to choose from."""
    listed = list(dict.fromkeys(names))
    close = close_to(name, listed)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if not listed:
        return "there is nothing to choose from"
    shown = ", ".join(listed[:LISTED])
    return f"choose from {shown}{', ...' if len(listed) > LISTED else ''}"
