"""Words and options of a plain command become typed arguments."""

from pathlib import Path
from typing import Any, Literal

import pytest

from gradeclip_ft.commands.cli import call, usage
from gradeclip_ft.commands.config import ConfigurationError


def example(
    action: Literal["make", "count"],
    *words: str,
    out: Path,
    size: int = 64,
    share: float = 0.5,
    again: bool = False,
    limit: int | None = None,
    names: tuple[str, ...] = (),
    sizes: list[int] | None = None,
) -> tuple[Any, ...]:
    """All kinds of arguments."""
    return action, words, out, size, share, again, limit, names, sizes


def test_arguments_are_read_as_their_annotations_say() -> None:
    """Would catch the string "false" that counts as true, or "64" that is no number."""
    line = "make shapes out=a/b=c size=32 share=1 again=true limit=3 names=[x,y=z] sizes=1,2"
    assert call(example, line.split()) == (
        "make", ("shapes",), Path("a/b=c"), 32, 1.0, True, 3, ("x", "y=z"), [1, 2],
    )  # fmt: skip
    assert call(example, ["count", "out=x", "limit=null"])[6] is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "action is missing; expected make|count [WORDS ...] out=... [size=64]"),
        ("mkae out=x", "action: there is no mkae; did you mean make?"),
        ("make", "out=... is missing"),
        ("make out=x sise=3", "sise=3: no such option; did you mean size"),
        ("make out=x size=big", "size: got 'big', expected int"),
        ("make out=x again=yes", "again: got 'yes', expected true or false"),
        ("make out=x limit=few", "limit: got 'few', expected int"),
    ],
)
def test_what_cannot_be_read_is_named(line: str, words: str) -> None:
    """Would catch a TypeError of Python for a misspelt option."""
    with pytest.raises(ConfigurationError) as caught:
        call(example, line.split())
    assert words in str(caught.value)


def test_a_path_with_an_equals_sign_is_a_word() -> None:
    """Would catch runs called runs/lr=1e-5 that are taken for options."""
    assert call(example, ["count", "runs/lr=1e-5", "out=x"])[1] == ("runs/lr=1e-5",)


def test_usage_shows_what_may_be_left_out() -> None:
    """Would catch a help line that hides a required option."""
    assert usage(example).startswith("make|count [WORDS ...] out=... [size=64]")
