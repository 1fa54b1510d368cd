"""Signatures read from source text say what Python's own introspection says."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradeclip_ft.commands.config import UnknownTargetError, choices, docstring, fits, signature

CONF = Path(__file__).parents[2] / "conf"
MODULE = "gradeclip_ft.losses"


def targets(node: Any) -> set[str]:
    """Every `_target_` below a node."""
    if isinstance(node, dict):
        own = {node["_target_"]} if "_target_" in node else set()
        return own.union(*map(targets, node.values()))
    return set().union(*map(targets, node)) if isinstance(node, list) else set()


ALL = sorted(set().union(*(targets(yaml.safe_load(path.open())) for path in CONF.rglob("*.yaml"))))


@pytest.mark.parametrize("target", ALL)
def test_the_source_text_gives_the_arguments_that_python_sees(target: str) -> None:
    """Would catch an argument of a yaml target that the text reader misses or invents."""
    module, name = target.rsplit(".", 1)
    found = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    expected = {p.name: p.default is p.empty for p in found.values() if p.kind not in kinds}
    read = signature(target)
    assert {p.name: p.required for p in read.parameters.values()} == expected
    assert read.takes_any == any(p.kind is p.VAR_KEYWORD for p in found.values())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.optim.AdamW", "not in gradeclip_ft"),
        ("os.system", "not in gradeclip_ft"),
        ("gradeclip_ft.nowhere.Thing", "no such module"),
        ("gradeclip_ft.losses.Alignment", "AlignmentOptions"),
        ("gradeclip_ft.losses", "no class or function|no such module"),
    ],
)
def test_an_unknown_target_is_named(target: str, message: str) -> None:
    """Would catch yaml that constructs foreign classes, or a traceback for a typo."""
    with pytest.raises(UnknownTargetError, match=message):
        signature(target)


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [1, 0], [1.5, True, "1", None]),
        ("float", [1, 1.5], [True, "1e-5", None]),
        ("bool", [True], [1, "true"]),
        ("str | None", ["a", None], [1, ["a"]]),
        ("Optional[int]", [1, None], ["a"]),
        ("Union[int, str]", [1, "a"], [None, 1.5]),
        ("Path", ["a/b"], [1]),
        ("Literal['one', 'all']", ["one"], ["two", None, 1]),
        ("Literal[1, 2] | None", [1, None], [3, True, "1"]),
        ("Sequence[float]", [[0.9, 0.98], []], [0.9, ["a"], "ab"]),
        ("tuple[int, int]", [[1, 2]], [[1], [1, 2, 3], ["a", "b"]]),
        ("tuple[str, ...]", [["a"], []], ["a", [1]]),
        ("Mapping[str, int]", [{"a": 1}, {}], [{"a": "b"}, [1]]),
        ("'int | None'", [1, None], ["a"]),
        ("Annotated[int, 'unit']", [1], ["a"]),
        ("AlignmentOptions", [{"_target_": "x"}], ["focal", 1, {"kind": "focal"}, None]),
        ("Callable[[int], int] | None", [{"_target_": "x"}, None], ["anything", {"a": 1}]),
        ("torch.device", ["cpu"], []),
        ("Foreign", ["anything", 1], []),
    ],
)
def test_plain_types_and_literals_are_judged_from_the_text(
    annotation: str, good: list[Any], bad: list[Any]
) -> None:
    """Would catch a wrong word or type that surfaces only after a minute of loading."""
    node = ast.parse(annotation, mode="eval").body
    assert [value for value in good if not fits(value, node, MODULE)] == []
    assert [value for value in bad if fits(value, node, MODULE)] == []


def test_the_words_behind_an_alias_are_found() -> None:
    """Would catch a Literal under another name, in another module, that is not looked up."""
    kind = signature("gradeclip_ft.data.captions.CaptionShards").parameters["tagger"].annotation
    assert choices(kind, "gradeclip_ft.data.captions") == ["auto", "nltk", "textblob"]


def test_a_docstring_is_read_without_importing() -> None:
    """Would catch a help page that shows nothing, or another function's text."""
    module = importlib.import_module("gradeclip_ft.commands.train")
    assert docstring("gradeclip_ft.commands.train", "train") == inspect.getdoc(module.train)
