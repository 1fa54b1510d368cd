"""A short part of what tools/ does at length: faults, soak, fuzz."""

from pathlib import Path

import pytest

from gradeclip_ft.data import shards
from tools import faults, fuzz, soak


def test_every_fault_of_data_costs_what_is_broken_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MOST_BYTES", 4 * 2**20)  # typechecked, the true sizes take long
    monkeypatch.setattr(faults, "BOMB", 5 * 2**20)
    rows = [*faults.data_rows(tmp_path), *faults.remote_rows(tmp_path)]
    assert [row for row in rows if not row.handled] == []
    assert len(rows) >= 30


@pytest.mark.slow  # trains four times
def test_no_attack_succeeds_and_no_secret_is_written(tmp_path: Path) -> None:
    rows = list(faults.safety_rows(tmp_path))
    assert [row for row in rows if not row.handled] == []
    assert sum(row.outcome == "refused" for row in rows) >= 10


def test_two_hundred_mutated_inputs_raise_nothing_unforeseen(tmp_path: Path) -> None:
    """All kinds, a fixed seed; 20,000 by `python -m tools.fuzz`."""
    assert fuzz.fuzz(cases=200, seed=0, out=tmp_path / "failed") == 0


def test_a_fault_of_the_fuzzed_code_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fuzzer that cannot fail proves nothing: an error, and a file written elsewhere."""

    def breaks(path: Path) -> str:
        raise KeyError(path.name)

    def writes(path: Path) -> str:
        (tmp_path / "elsewhere").write_text("")
        return "fine"

    for run in (breaks, writes):
        monkeypatch.setitem(fuzz.KINDS, "sample", (fuzz.sample_input, run))
        assert fuzz.fuzz(cases=1, seed=0, out=tmp_path / "failed") == 1
    assert (tmp_path / "failed" / "0-sample" / "report.txt").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_counts_over_two_workers_are_exact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.soak(samples=4000, workers=2, folder=tmp_path) == 0
    assert "4,000 usable samples of 4,000" in capsys.readouterr().out
