"""Loaders inside processes that somebody else started."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset

from gradeclip_ft.data import processes


class Numbers(Dataset[int]):
    """Five numbers."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> int:
        if index >= 5:
            raise IndexError
        return index


@pytest.mark.parametrize("foreign", [True, False])
def test_workers_start_also_below_joblib(foreign: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start method of joblib cannot start a loader's workers: a sweep with evaluators died."""
    import multiprocessing

    if foreign:
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "loky")
    loader = processes.once(Numbers(), torch.tensor, batch_size=2, workers=2)
    context = loader.multiprocessing_context
    assert (context is not None) == foreign
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
