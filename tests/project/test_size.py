"""The limits of size: a file has one subject, a function fits a screen."""

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "gradeclip_ft").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
FILE, FUNCTION, POSITIONAL = 250, 60, 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path: Path) -> None:
    """Would catch a file with two subjects, or a function that needs comments as headings."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= FILE
    long = [
        f"{node.name}: {length(node)} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and length(node) > FUNCTION
    ]
    assert not long


def test_half_of_the_files_are_short() -> None:
    """Would catch a house whose rooms all grow to the limit."""
    sizes = [len(path.read_text(encoding="utf-8").splitlines()) for path in FILES]
    assert statistics.median(size for size in sizes if size) <= 130


def test_no_file_is_a_drawer_for_everything() -> None:
    """Would catch functions that live nowhere."""
    assert not [path for path in FILES if path.stem in ("utils", "misc", "common", "helpers")]


def test_package_files_are_empty() -> None:
    """Would catch work at import time, or a second way to a name."""
    inner = (ROOT / "gradeclip_ft").glob("*/**/__init__.py")
    assert not [path for path in inner if path.read_text(encoding="utf-8").strip()]


def length(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines
