"""A part of an evaluation's samples, drawn by seed: for evaluation during training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


def subset(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """`limit` of the items in their order; all of them without a limit, or where there are fewer.

    >>> subset("abcdef", 3, seed=0) == subset("abcdef", 3, seed=0)
    True

    Raises:
        ValueError: The limit is below 1.
    """
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise ValueError(f"limit is {limit}; give 1 image or more, or null for all")
    return [items[row] for row in sorted(random.Random(seed).sample(range(len(items)), limit))]


def subset_protocol(limit: int | None, seed: int) -> dict[str, Any]:
    """What the protocol of a result says about the part; nothing about the whole."""
    return {} if limit is None else {"subset": f"{limit} images drawn with seed {seed}"}
