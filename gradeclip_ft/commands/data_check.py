"""`data check`: are the data of an evaluator there, complete and free of training images?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradeclip_ft.commands.compose import ConfigurationError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from gradeclip_ft.data.inspect import Findings

SHOWN = 5


def check(
    *,
    evaluators: Sequence[str],
    annotations: Path | None = None,
    images: Path | None = None,
    segments: Path | None = None,
    folder: Path | None = None,
    part: str | None = None,
    against: str | None = None,
    read: bool = False,
) -> int:
    """Open the data of evaluators as `evaluate` does, and print what they hold."""
    from gradeclip_ft.data.inspect import training_images

    given = {
        "annotations": annotations,
        "images": images,
        "segments": segments,
        "folder": folder,
        "part": part,
    }
    options = {key: str(value) for key, value in given.items() if value is not None}
    seen = None if against is None else training_images(against)
    good = [_check(name, options, seen, read=read) for name in evaluators]
    return 0 if all(good) else 1


def _check(name: str, options: dict[str, str], seen: set[str] | None, *, read: bool) -> bool:
    """Print what one evaluator's data hold; whether all is well."""
    from gradeclip_ft.commands.build import make
    from gradeclip_ft.commands.tracked import tracked
    from gradeclip_ft.data.inspect import image_key, inspect

    node = _data(name, options)
    try:
        found = inspect(make(node), read=read, track=tracked)
    except (FileNotFoundError, ValueError) as error:
        print(f"{name}: {error}")
        return False
    _print(name, found, read=read)
    overlap = [image for image in found.images if seen is not None and image_key(image) in seen]
    if seen is not None:
        print(f"  in the training data too: {_some(overlap, len(found.images))}")
    return not overlap and not found.unreadable


def _data(name: str, options: dict[str, str]) -> DictConfig:
    """The data node of an evaluator with the user's paths."""
    from gradeclip_ft.commands.compose import compose

    node: DictConfig = compose("evaluate", [f"evaluator={name}"]).evaluator[name].data
    for key, value in options.items():
        if key not in node:
            known = [word for word in map(str, node) if not word.startswith("_")]
            raise ConfigurationError(f"{name} has no {key}=; its data take {', '.join(known)}")
        node[key] = value
    return node


def _print(name: str, found: Findings, *, read: bool) -> None:
    skipped = found.counts.get("skipped") or {}
    counts = [f"{n:,} {what}" for what, n in found.counts.items() if isinstance(n, int)]
    print(f"{name}: {', '.join(counts)}")
    for cause, number in skipped.items():
        print(f"  left out: {number:,} ({cause})")
    if found.classes:
        print(f"  classes without a sample: {_some(found.absent, len(found.classes))}")
    if found.captions:
        by_number = ", ".join(f"{number} x {n}" for n, number in sorted(found.captions.items()))
        print(f"  images by number of captions: {by_number}")
    if read:
        print(f"  not readable: {_some(found.unreadable, len(found.images))}")


def _some(names: Sequence[str], total: int) -> str:
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names):,} of {total:,}{': ' + shown if names else ''}"
