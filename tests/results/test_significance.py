"""Tests between the two best methods of a column, against closed forms and the papers' counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradeclip_ft.commands.compare import compare
from gradeclip_ft.results.record import Result
from gradeclip_ft.results.significance import bootstrap_test, chi_square, t_test


def result(**parts: Any) -> Result:
    settings: dict[str, Any] = {"metrics": {}, "protocol": {}, "data": {}, "details": {}, **parts}
    return Result("f", weights={"name": "m"}, versions={}, run="r", step=1, **settings)


def curves(**means: list[float]) -> dict[str, Any]:
    return {"curves": {name: {"deletion": {"mean": values}} for name, values in means.items()}}


def test_the_paired_t_test_is_that_of_the_textbook() -> None:
    """Its t is mean / (sd / √n) of the differences; p by the closed form."""
    differences = np.array([0.1, 0.2, 0.2, 0.5]) * 1.0
    t = differences.mean() / (differences.std(ddof=1) / 2)
    both = result(details=curves(a=list(0.5 + differences), b=[0.5] * 4))
    p = t_test(both, "a/deletion", "b/deletion")
    angle = np.arctan(t / 3**0.5)  # Student's distribution with 3 degrees has a closed form
    inside = 2 / np.pi * (angle + np.sin(angle) * np.cos(angle))
    assert p == pytest.approx(1 - inside, abs=1e-9)
    assert t_test(result(details=curves(a=[0.5] * 4, b=[0.5] * 4)), "a/deletion", "b/deletion") == 1
    assert t_test(both, "a/other", "b/other") is None


def test_the_bootstrap_finds_what_is_there_and_nothing_else() -> None:
    """Its p is near that of the normal distribution of the mean."""
    random = np.random.default_rng(2)
    noise = random.normal(size=400) * 1000
    noise -= noise.mean()
    sd = noise.std() / 20

    def p(shift: float) -> float | None:
        areas = {"a/deletion": noise + shift * sd, "b/deletion": np.zeros(400)}
        kept = {name: " ".join(map(str, np.rint(v).astype(int))) for name, v in areas.items()}
        return bootstrap_test(result(details={"areas": kept}), "a/deletion", "b/deletion")

    assert p(0) == pytest.approx(1, abs=0.06)
    assert p(1.96) == pytest.approx(0.05, abs=0.02)
    assert p(8) == pytest.approx(0.0005)


def test_chi_square_of_the_papers_pointing_game() -> None:
    """Closed form for two shares: z² of the difference. The printed 593.3 does not follow."""
    shares, n = (0.8899, 0.5759), 12419
    metrics = {"a/pointing": 0.53, "b/pointing": 0.5}
    found = chi_square(
        result(metrics=metrics, details={"phrases": 1000}), "a/pointing", "b/pointing"
    )
    z = 0.03 / (2 * 0.515 * 0.485 / 1000) ** 0.5
    assert found == pytest.approx(2 * (1 - _normal(z)), abs=1e-9)
    pooled = sum(shares) / 2
    assert (shares[0] - shares[1]) ** 2 / (2 * pooled * (1 - pooled) / n) > 3000


def _normal(z: float) -> float:
    from math import erf

    return (1 + erf(z / 2**0.5)) / 2


def test_a_table_names_the_two_best_with_their_p(tmp_path: Path) -> None:
    """Lower deletion is better, higher pointing; one row for each test that applies."""
    rising = [0.1, 0.2, 0.3, 0.4]
    details = curves(a=rising, b=[v + 0.1 + 0.01 * v for v in rising], c=[0.9] * 4)
    metrics = {"a/deletion": 0.25, "b/deletion": 0.35, "c/deletion": 0.9}
    metrics |= {"a/pointing": 0.2, "b/pointing": 0.5, "c/pointing": 0.49}
    result(metrics=metrics, details={**details, "phrases": 200}).write(tmp_path)
    compare(str(tmp_path), rows="methods", significance=True, out=str(tmp_path / "t"))
    shown = (tmp_path / "t.md").read_text()
    assert "| two best | a, b | b, c |" in shown
    assert "| p, t-test over points | <.001 |  |" in shown
    assert "| p, chi-square of hits |  | .841 |" in shown  # z = 0.2
    assert "significance=true" in shown


def test_a_table_without_what_a_test_needs_is_refused(tmp_path: Path) -> None:
    result(metrics={"a/energy": 0.1, "b/energy": 0.2}).write(tmp_path)
    with pytest.raises(ValueError, match="no column has curves"):
        compare(str(tmp_path), rows="methods", significance=True)
    with pytest.raises(ValueError, match="set rows=methods"):
        compare(str(tmp_path), significance=True)
