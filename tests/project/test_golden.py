"""Four losses of the experiment `smoke`: a change that should not matter must not move them."""

from pathlib import Path

import pytest

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands.cli import run
from gradeclip_ft.training.run_files import read_lines

# By `python -m gradeclip_ft train +exp=smoke name=golden`. A commit that changes them says why.
GOLDEN = [1.51191, 0.491784, 0.821181, 0.398107]
# Another number of threads moves them by 1e-6; other processors and JPEG decoders by more.
TOLERANCE = 1e-3


def test_four_losses_of_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a refactoring that changes data order, phrases, maps, losses or the optimiser."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gradeclip_ft"])
    quiet = ("evaluation.before=false", "evaluation.after=false")
    assert run(COMMANDS, ["train", "+exp=smoke", "name=golden", *quiet]) == 0
    lines = read_lines(tmp_path / "runs" / "golden" / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(GOLDEN, rel=TOLERANCE)
