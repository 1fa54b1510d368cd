"""Results of evaluations as files: numbers with everything that changes them.

One JSON per evaluation, `<evaluator>@<step>.json`; step 0 is the model before training. Two numbers
may be compared when their protocols and data are equal.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from gradeclip_ft.results.masking import masked_texts

logger = logging.getLogger(__name__)

UNITS = {
    **{"seconds": "s", "seconds_per_map": "s", "times_encode_image": "x"},
    **{"rank": "places", "loss": "nats"},
    **{"otd": "sides of the picture", "kld": "nats", "jsd": "nats"},
}
"""Metrics whose last part, or its last word, is one of these are not fractions."""

# Packages that can change a number.
PACKAGES = (
    *("gradeclip_ft", "torch", "torchvision", "open_clip_torch", "timm", "lightning"),
    *("webdataset", "nltk", "textblob", "numpy", "pillow"),
)
# Versions of the plug-ins of which a configuration of this process names a class.
OTHER_CODE: dict[str, str] = {}
HASH_LENGTH = 16
AREA_SCALE = 10_000  # of the areas of curves that a result keeps of every image, whole numbers

Json = None | bool | int | float | str | list[Any] | dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What an evaluator returns.

    Attributes:
        metrics: Fractions by name; others where the name ends with one of `UNITS`, or beyond 1.
        protocol: Every choice that changes the numbers except data and weights.
        data: Fingerprint: files, counts, hash.
        details: Observations beside the metrics: ties, empty masks.
        page: Writes a page of pictures to a path, where there is something to see.
    """

    metrics: Mapping[str, float]
    protocol: Mapping[str, Json]
    data: Mapping[str, Any]
    details: Mapping[str, Json] = field(default_factory=dict)
    page: Callable[[Path], Path] | None = None


@dataclass(frozen=True)
class Result:
    """What was `Measured`, and of which weights.

    Attributes:
        evaluator: Name of the evaluator, also of the file.
        weights: Name of the model and hash of the weights.
        versions: Versions of the packages that computed it.
        run: Name of the run the weights come from; None for weights without a run.
        step: Optimiser steps of the weights; 0 is the model before training.
        seconds: Time of the evaluation.
        command: Command line that measured it.
    """

    evaluator: str
    metrics: Mapping[str, float]
    protocol: Mapping[str, Json]
    data: Mapping[str, Any]
    weights: Mapping[str, Json]
    versions: Mapping[str, str]
    run: str | None = None
    step: int = 0
    seconds: float = 0.0
    command: str | None = None
    details: Mapping[str, Json] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        """Share of the tuned weights; the rest are those before training."""
        return float(str(self.weights.get("alpha", 1.0)))

    def write(self, folder: Path) -> Path:
        """Write `<folder>/<evaluator>@<step>.json`, replacing it in one step.

        Raises:
            ValueError: A metric is not finite.
        """
        bad = [name for name, value in self.metrics.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(
                f"{self.evaluator} at step {self.step}: {', '.join(bad)} is not finite; "
                "the model gives no usable features"
            )
        path = result_path(folder, self.evaluator, self.step, self.alpha)
        content = masked_texts(asdict(self))
        write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return path


def result_path(folder: Path, evaluator: str, step: int, alpha: float = 1.0) -> Path:
    """Path of one evaluation's JSON."""
    return folder / f"{evaluator}@{step}{'' if alpha == 1.0 else f'_alpha{alpha:g}'}.json"


def read(path: Path) -> Result:
    """Result from its JSON.

    Raises:
        ValueError: The file is cut off, is not JSON, or lacks a key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not complete JSON ({error}); delete it and evaluate again"
        ) from error
    known = {entry.name for entry in fields(Result)}
    needed = {"evaluator", "metrics", "protocol", "data", "weights", "versions"}
    missing = needed - set(content) if isinstance(content, dict) else needed
    if missing:
        raise ValueError(f"{path} is not an evaluation: {', '.join(sorted(missing))} missing")
    return Result(**{key: value for key, value in content.items() if key in known})


def write_atomically(path: Path, text: str) -> None:
    """Write a file of which no reader ever sees half."""

    def write(aside: Path) -> None:
        aside.write_text(text, encoding="utf-8")

    replace_files({path: write})


def replace_files(
    writers: Mapping[Path, Callable[[Path], None]], between: Callable[[], None] = lambda: None
) -> None:
    """Write all files aside, flush them, call `between`, then rename them."""
    asides = {final: final.parent / f".{final.name}.{os.getpid()}" for final in writers}
    try:
        for final, write in writers.items():
            final.parent.mkdir(parents=True, exist_ok=True)
            write(asides[final])
            asides[final].chmod(0o644)
            with asides[final].open("rb+") as file:
                os.fsync(file.fileno())  # the bytes before the name points to them
        between()
        for final, aside in asides.items():
            aside.replace(final)
            if os.name == "posix":
                handle = os.open(final.parent, os.O_RDONLY)
                try:
                    os.fsync(handle)  # the renaming itself
                finally:
                    os.close(handle)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or yaml file that describes the files beside it; a crash may have cut it off.

    Returns:
        Its contents; empty if there is no such file or, with a warning, if it is cut off.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        found = None
    if isinstance(found, dict):
        return found
    logger.warning("%s is empty or cut off and is left out", path)
    return {}


def unit_of(metric: str, *values: float | None) -> str:
    """Unit of a metric's values as people read them: that of its name, else percent for fractions.

    Values beyond 1 are not fractions, and nothing is known of their unit.
    """
    last = metric.rpartition("/")[2]
    if known := UNITS.get(last) or UNITS.get(last.rpartition("_")[2]):
        return known
    return "" if any(value is not None and abs(value) > 1 for value in values) else "%"


def written(metric: str, value: float, *beside: float) -> str:
    """A metric's value in its unit, which is also that of the values beside it.

    >>> written("boxes/top1", 0.414), written("rise/seconds", 6.2376), written("mean_size", 31.5)
    ('41.4', '6.2376', '31.5')
    >>> written("mean_size", 0.5, 31.5)
    '0.5'
    """
    unit = unit_of(metric, value, *beside)
    if not unit:
        return f"{value:.4g}"
    return f"{100 * value:.1f}" if unit == "%" else f"{value:.{2 if unit == 'x' else 4}f}"


def as_text(numbers: Any) -> str:
    """A tensor of whole numbers, one after the other: in a list, a file gives each a line."""
    return " ".join(map(str, numbers.tolist()))


def hash_file(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:HASH_LENGTH]


def hash_json(value: Json) -> str:
    """Hash of a value as canonical JSON."""
    return _hash_text(json.dumps(value, sort_keys=True, ensure_ascii=False))


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:HASH_LENGTH]


def data_fingerprint(
    read: Iterable[Path], listed: Iterable[Path], counts: Mapping[str, Json]
) -> dict[str, Json]:
    """Data of an evaluation: file hashes, counts, and one hash over both that ignores folders.

    Args:
        read: Annotation files, hashed by content.
        listed: Images and masks, too many to read: hashed by name and size.
        counts: Samples used and samples skipped by cause.
    """
    files = {str(path): hash_file(path) for path in read}
    by_name = sorted([Path(path).name, digest] for path, digest in files.items())
    sizes = sorted(f"{path.name} {path.stat().st_size}" for path in listed)
    found: dict[str, Json] = {"listing": _hash_text("\n".join(sizes)), "counts": dict(counts)}
    return {"files": files, **found, "hash": hash_json([by_name, *found.values()])}


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python, of the packages that can change a number, and of plug-ins in use."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, **OTHER_CODE}


def commit() -> str | None:
    """Commit of this checkout, with "+" for local changes; None outside of one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None

    describe = ("describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+")
    command = ["git", "-C", str(folder), *describe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
