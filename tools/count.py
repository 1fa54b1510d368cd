"""Counts what there is to read: `python tools/count.py [REVISION ...]`, else the checkout.

Code lines hold code; docstrings and comments are not code. A name has two meanings where two
modules of the package define it at their top level. A private function is called once where its
name is read at one place of its module.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (".py", ".sh")
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def count(root: Path) -> dict[str, str]:
    """Facts about a source tree, by their names."""
    package, tests, tools = (
        {path: path.read_text() for path in (root / folder).rglob("*.*") if path.suffix in SOURCES}
        for folder in ("gradeclip_ft", "tests", "tools")
    )

    def lines(files: dict[Path, str]) -> int:
        return sum(text.count("\n") for text in files.values())

    code = {path: code_lines(text) for path, text in package.items()}
    comments = sum(len(found) for _, found in code.values())
    total = sum(len(lines) for lines, _ in code.values())
    trees = [ast.parse(text) for text in package.values()]
    public: Counter[str] = Counter()
    private = []
    for tree in trees:
        read = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
        read.update(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                private.append(read[node.name])
            elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                public[node.name] += 1
    double = sorted(name for name, times in public.items() if times > 1)
    cases = [text.count("\ndef test_") + text.count("\n    def test_") for text in tests.values()]
    return {
        "package, files": f"{len(package):,}",
        "package, lines": f"{lines(package):,}",
        "package, code lines": f"{total:,}",
        "comments per 100 code lines": f"{100 * comments / total:.1f}",
        "public names with two meanings": f"{len(double)}: {', '.join(double)}",
        "private functions": f"{len(private)}",
        "private functions called once": f"{private.count(1)}",
        "tests, functions": f"{sum(cases):,}",
        "tests, lines": f"{lines(tests):,}",
        "tools, lines": f"{lines(tools):,}",
    }


def code_lines(text: str) -> tuple[set[int], set[int]]:
    """Numbers of the lines with code, and of those with a comment for people."""
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
        elif token.type == tokenize.COMMENT and not token.string.startswith(("# type", "# noqa")):
            comments.add(token.start[0])
    for node in ast.walk(ast.parse(text)):  # docstrings, and strings after attributes
        match node:
            case ast.Expr(value=ast.Constant(value=str()), lineno=first, end_lineno=int(last)):
                code -= set(range(first, last + 1))
    return code, comments


def main(revisions: list[str]) -> None:
    """Print a table with a column for each revision, or for the checkout."""
    columns = [] if revisions else [count(ROOT)]
    for revision in revisions:
        command = ["git", "archive", revision, "gradeclip_ft", "tests", "tools"]
        archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
        with (
            tempfile.TemporaryDirectory() as folder,
            tarfile.open(fileobj=io.BytesIO(archive)) as tree,
        ):
            tree.extractall(folder, filter="data")
            columns.append(count(Path(folder)))
    print(f"| | {' | '.join(revisions or ['checkout'])} |\n|--|{'--|' * len(columns)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
