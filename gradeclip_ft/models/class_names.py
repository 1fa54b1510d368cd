"""Names of a classifier's classes, and the targets that stand for them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

SHOWN = 3


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Names from a text file, one a line, in the order of the logits.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It holds none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {file} with class names; give one with a name a line")
    names = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    if not names:
        raise ValueError(f"{file} holds no class name; write one a line, in the order of logits")
    return names


def one_hot(
    wanted: Sequence[str | int], classes: Sequence[str] | None, count: int
) -> Float[Tensor, "P K"]:
    """Unit vectors of classes, whose product with the logits is the logit of the class.

    Args:
        wanted: Names or numbers. A name may be one of several synonyms that commas part, in any
            case; a number may be written as text where no class has that name.
        classes: Names in the order of the logits; None where they are unknown.
        count: K.

    Raises:
        ValueError: No such class, or a name that several have.
    """
    index = _index(classes or ())
    rows = [_number(one, index, count) for one in wanted]
    return torch.nn.functional.one_hot(torch.tensor(rows, dtype=torch.long), count).float()


def _index(classes: Sequence[str]) -> dict[str, list[int]]:
    """Classes by name, and by each of their synonyms."""
    index: dict[str, list[int]] = {}
    for number, name in enumerate(classes):
        for one in dict.fromkeys([name, *name.split(",")]):
            index.setdefault(one.strip().lower(), []).append(number)
    return {name: sorted(set(numbers)) for name, numbers in index.items()}


def _number(wanted: str | int, index: dict[str, list[int]], count: int) -> int:
    if isinstance(wanted, str):
        found = index.get(wanted.strip().lower(), [])
        if len(found) == 1:
            return found[0]
        if found:
            numbers = ", ".join(map(str, found))
            raise ValueError(f"{wanted!r} names several classes; give a number: {numbers}")
        if not wanted.strip().isdecimal():
            raise ValueError(_unknown(wanted, index, count))
    number = int(wanted)
    if not 0 <= number < count:
        raise ValueError(f"class {number} of {count}; choose 0 to {count - 1}")
    return number


def _unknown(wanted: str, index: dict[str, list[int]], count: int) -> str:
    if not index:
        return (
            f"the names of the {count} classes are unknown, so {wanted!r} is none; give a number, "
            "or the names as classes="
        )
    close = difflib.get_close_matches(wanted.lower(), index, n=SHOWN, cutoff=0.5)
    close += [name for name in index if wanted.lower() in name and name not in close][:SHOWN]
    hint = f"did you mean {', '.join(close[:SHOWN])}?" if close else "give a name of its classes,"
    return f"no class {wanted!r} among {count}; {hint} or a number from 0 to {count - 1}"
