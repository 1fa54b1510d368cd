"""Plain English where users read: documentation, messages and docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CHANGELOG.md", "docs", "gradeclip_ft", "conf", "tools"]
HABITS = {
    r"(?<!background )\bbehind\b": "say after, or by",
    r"(?<!here )\b(?:is|are|was|were) no (?!longer|more\b|less\b)": "say: is not a",
    r"\b(?:stands?|stood) (?!for\b|in front\b)": "say is, or is listed",
}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """What a reader sees of a file, by line: all of a page, strings and comments of a program."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), start=1)
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())
    for number, line in enumerate(text.splitlines(), start=1):
        if "# " in line:
            yield number, line.split("# ", 1)[1]


@pytest.mark.parametrize("page", PAGES)
def test_no_text_has_a_habit_that_readers_stumble_over(page: str) -> None:
    """`behind` for after, `is no X` for is not an X, `stands` for is."""
    place = ROOT / page
    files = [place] if place.is_file() else sorted(place.rglob("*"))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {text[:90]!r}: {remedy}"
        for path in files
        if path.suffix in (".md", ".py", ".yaml", ".j2", ".sh")
        for number, text in texts(path)
        for pattern, remedy in HABITS.items()
        if re.search(pattern, text)
    ]
    assert not found, "\n".join(found)
