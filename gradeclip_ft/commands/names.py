"""What somebody may have meant by a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LISTED = 12


def close_to(name: str, names: Iterable[str]) -> list[str]:
    """The names most like `name`, at most two; also those that it abbreviates."""
    listed = list(dict.fromkeys(names))
    close = difflib.get_close_matches(name, listed, n=2, cutoff=0.6)
    return close or [known for known in listed if name and known.startswith(name)][:2]


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
