"""Texts of a causal tower in few rows, with every common beginning once.

Behind a causal mask a token depends on the tokens before it and on nothing else. Texts that begin
alike therefore share the beginning's tokens: the prompt of all phrases is computed once per row,
and a phrase costs its own words. Several texts stand in one row, where a mask lets every token see
its own beginning alone, so hardly anything is computed for padding. Embeddings are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from gradeclip_ft.batch import PackedTexts

MULTIPLE = 8  # kernels of GPUs want such lengths
# Attention costs a token in a full row 4 % of the tower's matrix products; longer rows cost more,
# shorter ones repeat the prompt more often.
ROW = 128


def pack_texts(texts: Sequence[Sequence[int]], *, pad: int = 0) -> PackedTexts:
    """Pack token ids, each text from its start to its end.

    Args:
        texts: At least one; none is empty.
        pad: Id of what fills a row up.
    """
    order = sorted(range(len(texts)), key=lambda number: list(texts[number]))
    ordered = [texts[number] for number in order]  # neighbours have most in common
    shared = [0, *(_common(*pair) for pair in pairwise(ordered))]
    starts = _balanced(list(map(len, ordered)), shared)
    rows = [_row(ordered[a:b], shared[a:b]) for a, b in pairwise([*starts, len(texts)])]
    length = -(-max(len(row.ids) for row in rows) // MULTIPLE) * MULTIPLE
    ids = np.full((len(rows), length), pad)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    seen = np.repeat(np.eye(length, dtype=bool)[None], len(rows), axis=0)
    ends = []
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = row.ids
        positions[number, : len(row.ids)] = row.positions
        for column, parent in enumerate(row.parents):
            if parent is not None:
                seen[number, column] |= seen[number, parent]
        ends += [number * length + column for column in row.ends]
    end = np.empty(len(texts), dtype=np.int64)
    end[order] = ends
    return PackedTexts(*map(torch.from_numpy, (ids, positions, ~seen, end)))


@dataclass(frozen=True)
class _Row:
    """Tokens of one row.

    Attributes:
        ids: Of the tokens.
        positions: Of the tokens in their texts.
        parents: Column of the token before each; None at the start of a text.
        ends: Column of every text's last token.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    parents: list[int | None] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


def _row(texts: Sequence[Sequence[int]], shared: Sequence[int]) -> _Row:
    """A row from texts in alphabetical order, and what each shares with the one before."""
    row = _Row()
    path: list[int] = []  # columns of the last text
    for number, (text, same) in enumerate(zip(texts, shared, strict=True)):
        kept = same if number else 0
        del path[kept:]
        for position in range(kept, len(text)):
            row.parents.append(path[-1] if path else None)
            path.append(len(row.ids))
            row.ids.append(text[position])
            row.positions.append(position)
        row.ends.append(path[-1])
    return row


def _balanced(lengths: Sequence[int], shared: Sequence[int]) -> list[int]:
    """Number of the first text of every row, the rows about equally long."""
    total, longest = sum(lengths) - sum(shared), max(lengths)
    wanted = -(-total // max(ROW, longest))
    capacity = max(-(-total // wanted), longest)
    while len(starts := _starts(lengths, shared, capacity)) > wanted and capacity < ROW:
        capacity += MULTIPLE
    return starts


def _starts(lengths: Sequence[int], shared: Sequence[int], capacity: int) -> list[int]:
    starts, used = [0], 0
    for number, (length, same) in enumerate(zip(lengths, shared, strict=True)):
        used += length - same
        if used > capacity:
            starts.append(number)
            used = length
    return starts


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for number, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return number
    return min(len(a), len(b))
