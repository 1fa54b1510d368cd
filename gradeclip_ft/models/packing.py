"""Texts of a causal tower in few rows, with every common beginning once.

Behind a causal mask a token depends on the tokens before it and on nothing else. Texts that begin
alike therefore share the beginning's tokens: the prompt of all phrases is computed once per row,
and a phrase costs its own words. Several texts stand in one row, where a mask lets every token see
its own beginning alone, so hardly anything is computed for padding. Embeddings are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import torch

from gradeclip_ft.batch import PackedTexts

MULTIPLE = 8  # kernels of GPUs want such lengths
# Attention costs a token in a full row 4 % of the tower's matrix products; longer rows cost more,
# shorter ones repeat the prompt more often.
ROW = 128


@dataclass
class _Row:
    """Tokens of one row.

    Attributes:
        ids: Of the tokens.
        positions: Of the tokens in their texts.
        paths: Columns of every text, first token to last.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)


def pack_texts(texts: Sequence[Sequence[int]], *, pad: int = 0) -> PackedTexts:
    """Pack token ids, each text from its start to its end.

    Args:
        texts: At least one; none is empty.
        pad: Id of what fills a row up.
    """
    order = sorted(range(len(texts)), key=lambda number: list(texts[number]))
    ordered = [texts[number] for number in order]
    rows = _fill(ordered, _capacity(ordered))
    length = -(-max(len(row.ids) for row in rows) // MULTIPLE) * MULTIPLE
    ids = np.full((len(rows), length), pad)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    hidden = np.repeat(~np.eye(length, dtype=bool)[None], len(rows), axis=0)
    ends = []
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = row.ids
        positions[number, : len(row.ids)] = row.positions
        for path in row.paths:
            hidden[number][np.ix_(path, path)] &= np.triu(np.ones((len(path),) * 2, bool), 1)
            ends.append(number * length + path[-1])
    end = np.empty(len(texts), dtype=np.int64)
    end[order] = ends
    arrays = (ids, positions, hidden, end)
    return PackedTexts(*(torch.from_numpy(array) for array in arrays))


def _capacity(ordered: Sequence[Sequence[int]]) -> int:
    """Tokens of a row, so that the rows needed are about equally long."""
    total = len(_fill(ordered, sum(map(len, ordered)))[0].ids)
    longest = max(map(len, ordered))
    wanted = -(-total // max(ROW, longest))
    capacity = max(-(-total // wanted), longest)
    while len(_fill(ordered, capacity)) > wanted and capacity < ROW:
        capacity += MULTIPLE
    return capacity


def _fill(ordered: Sequence[Sequence[int]], capacity: int) -> list[_Row]:
    """Rows from texts in alphabetical order, where neighbours have most in common."""
    rows = [_Row()]
    before: Sequence[int] = ()
    for text in ordered:
        row = rows[-1]
        same = zip(before, text, strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], same)))
        if len(row.ids) + len(text) - shared > capacity:
            row, shared = _Row(), 0
            rows.append(row)
        start = len(row.ids)
        fresh = range(start, start + len(text) - shared)
        row.paths.append([*(row.paths[-1][:shared] if shared else ()), *fresh])
        row.ids.extend(text[shared:])
        row.positions.extend(range(shared, len(text)))
        before = text
    return rows
