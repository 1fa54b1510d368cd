"""Texts of a causal tower in few rows, with every common beginning once.

With a causal mask a token depends on the tokens before it and on nothing else. Texts that begin
alike therefore share the beginning's tokens: the prompt of all phrases is computed once per row,
and a phrase costs its own words. Several texts are in one row, where a mask lets every token see
its own beginning alone, so very little is computed for padding. Embeddings are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    # In alphabetical order of ids, neighbours have most in common: the texts form a trie that is
    # read from left to right, and each needs only what the one before it does not already have.
    order = sorted(range(len(texts)), key=lambda number: list(texts[number]))
    ordered = [texts[number] for number in order]
    shared = [0, *(_common(*pair) for pair in pairwise(ordered))]
    starts = _balanced(list(map(len, ordered)), shared)
    rows = [_row(ordered[a:b], shared[a:b]) for a, b in pairwise([*starts, len(texts)])]
    length = -(-max(len(row) for row, _ in rows) // MULTIPLE) * MULTIPLE
    # R rows of T columns. What fills a row up has id `pad` and sees itself: a row of the mask
    # without any visible token would give NaN, and its gradient would reach every parameter.
    ids = np.full((len(rows), length), pad)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    seen = np.repeat(np.eye(length, dtype=bool)[None], len(rows), axis=0)  # (R, T, T)
    ends = []
    for number, (tokens, last) in enumerate(rows):
        for column, (token, position, parent) in enumerate(tokens):
            ids[number, column], positions[number, column] = token, position
            if parent is not None:
                # A parent is further left, so its own row of the mask is complete already: a
                # token sees what its parent sees, and itself.
                seen[number, column] |= seen[number, parent]
        ends += [number * length + column for column in last]
    # Back to the caller's order: text `order[i]` ends at place `ends[i]` of the flattened rows.
    end = np.empty(len(texts), dtype=np.int64)
    end[order] = ends
    return PackedTexts(*map(torch.from_numpy, (ids, positions, ~seen, end)))


Token = tuple[int, int, int | None]
"""Id, position in its text, and column of the token before it; None at the start of a text."""


def _row(texts: Sequence[Sequence[int]], shared: Sequence[int]) -> tuple[list[Token], list[int]]:
    """The tokens of a row of texts in alphabetical order, and the column of every text's last."""
    tokens: list[Token] = []
    ends: list[int] = []
    path: list[int] = []  # columns of the last text
    for number, (text, same) in enumerate(zip(texts, shared, strict=True)):
        kept = same if number else 0  # what the last text of the row above has is not here
        del path[kept:]
        for position in range(kept, len(text)):
            tokens.append((text[position], position, path[-1] if path else None))
            path.append(len(tokens) - 1)
        ends.append(path[-1])
    return tokens, ends


def _balanced(lengths: Sequence[int], shared: Sequence[int]) -> list[int]:
    """Number of the first text of every row, the rows about equally long."""
    # All rows are as long as the longest, so an uneven one is paid for R times. The fewest rows
    # that could hold the trie come first; each cut repeats a beginning, so the room may not do.
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
            used = length  # the first text of a row shares with nobody
    return starts


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for number, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return number
    return min(len(a), len(b))
