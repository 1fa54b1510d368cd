"""The page of an evaluation of methods: what it shows, and its charts."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradeclip_ft.report.evaluation import evaluation_page
from gradeclip_ft.report.page import write_page
from gradeclip_ft.results.record import Result


def result(**metrics: float) -> Result:
    names = [f"method {n}" for n in range(10)]
    found = {f"{name}/deletion": 0.5 - n / 50 for n, name in enumerate(names)}
    found |= {f"{name}/insertion": 0.3 for name in names}
    curve = {"mean": [0.5, 0.4, 0.3], "error": [0.01, 0.02, 0.02]}
    short = {"mean": [0.2, 0.4], "error": [0.0, 0.0]}
    return Result(
        evaluator="faithful",
        metrics=metrics or found,
        protocol={"task": "faithfulness", "methods": {names[0]: {"depth": 2}}},
        data={"counts": {"images": 40, "skipped": {}}},
        weights={"name": "tiny"},
        versions={"torch": "2"},
        details={
            "fractions": [0.0, 0.25, 0.5],
            "curves": {name: {"deletion": curve, "insertion": short} for name in names},
            "areas": {f"{name}/deletion": "5000 3000 1000" for name in names},
        },
    )


def test_a_page_has_curves_with_bands_and_bars_with_errors(tmp_path: Path) -> None:
    """Insertion has no point at 0; the error of a bar is that of the mean over images."""
    page = evaluation_page(result())
    deletion, insertion, bars, plain = page.charts
    assert deletion.series["method 3"] == [(0.0, 0.5), (0.25, 0.4), (0.5, 0.3)]
    assert insertion.series["method 3"] == [(0.25, 0.2), (0.5, 0.4)]
    assert deletion.errors["method 3"] == [0.01, 0.02, 0.02]
    assert bars.bars
    assert bars.series["method 1"] == [(0.0, pytest.approx(0.48))]
    assert bars.errors["method 1"][0] == pytest.approx(0.2 / 3**0.5)
    assert not plain.errors
    assert page.intro == "Faithfulness; 40 images."
    text = write_page(page, tmp_path / "page.html").read_text()
    assert text.count("<svg") == 4
    assert text.count("method 9") >= 4
    assert "Curves and bars" in text
    assert "stroke-dasharray" in text  # the ninth line is told from the first by its style
    assert text.count('"stroke dashed"') == 4  # two methods in the legends of two charts of curves


def test_a_result_without_methods_has_no_page() -> None:
    with pytest.raises(ValueError, match="compares no methods, so it has no page"):
        evaluation_page(result(top1=0.5))
