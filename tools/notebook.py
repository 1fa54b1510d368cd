"""Writes docs/explain.ipynb from docs/api.md: its text, and its Python with what it gives.

    python -m tools.notebook

The lines are executed here, one after another, in a folder of their own that holds docs/images.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PAGE, NOTEBOOK = DOCS / "api.md", DOCS / "explain.ipynb"


def cells(page: str) -> Iterator[tuple[str, str]]:
    """Kind and source of every cell: text and blocks of Python in turns."""
    for number, part in enumerate(re.split(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)):
        if part.strip():
            yield ("code" if number % 2 else "markdown"), part.strip()


def execute(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the lines of a cell; what was printed, the last value and the figures, as nbformat 4."""
    from matplotlib import pyplot

    lines, value, printed = ast.parse(source), None, io.StringIO()
    last = lines.body.pop() if isinstance(lines.body[-1], ast.Expr) else None
    with redirect_stdout(printed):
        exec(compile(lines, PAGE.name, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), PAGE.name, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", dpi=72)
        shown = {"image/png": base64.b64encode(file.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": shown, "metadata": {}})
    if value is not None and not pyplot.get_fignums():
        shown = {"text/plain": repr(value)}
        result = {"output_type": "execute_result", "data": shown, "metadata": {}}
        outputs.append({**result, "execution_count": None})
    pyplot.close("all")
    return outputs


def notebook(page: str) -> dict[str, Any]:
    """The whole notebook, executed in the working directory."""
    names: dict[str, Any] = {}
    made = []
    for number, (kind, source) in enumerate(cells(page)):
        cell: dict[str, Any] = {
            "cell_type": kind,
            "id": f"cell-{number}",
            "metadata": {},
            "source": source,
        }
        if kind == "code":
            cell |= {"execution_count": None, "outputs": execute(source, names)}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": made,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def main() -> None:
    """Write the file."""
    import matplotlib as mpl

    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        shutil.copytree(DOCS / "images", "images")
        content = notebook(PAGE.read_text(encoding="utf-8"))
    text = json.dumps(content, indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
