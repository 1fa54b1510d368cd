"""Where a number comes from: hashes of files, versions of packages, commit."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gradeclip_ft.results.record import Json

PACKAGES = (
    "gradeclip_ft",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "lightning",
    "webdataset",
    "nltk",
    "textblob",
    "numpy",
    "pillow",
)
HASH_LENGTH = 16


def hash_file(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:HASH_LENGTH]


def hash_listing(paths: Iterable[Path]) -> str:
    """Hash of names and sizes, for folders too large to read; order does not matter."""
    lines = sorted(f"{path.name} {path.stat().st_size}" for path in paths)
    return hash_text("\n".join(lines))


def hash_json(value: Json) -> str:
    """Hash of a value as canonical JSON."""
    return hash_text(json.dumps(value, sort_keys=True, ensure_ascii=False))


def hash_text(text: str) -> str:
    """First 16 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:HASH_LENGTH]


def data_fingerprint(
    read: Iterable[Path], listed: Iterable[Path], counts: Mapping[str, Json]
) -> dict[str, Json]:
    """Data of an evaluation: file hashes, counts, and one hash over both that ignores folders.

    Args:
        read: Annotation files, hashed by content.
        listed: Images and masks, hashed by name and size.
        counts: Samples used and samples skipped by cause.
    """
    files = {str(path): hash_file(path) for path in read}
    by_name = sorted((Path(path).name, digest) for path, digest in files.items())
    listing = hash_listing(listed)
    return {
        "files": files,
        "listing": listing,
        "counts": dict(counts),
        "hash": hash_json([[list(pair) for pair in by_name], listing, dict(counts)]),
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """Commit of this checkout, with "+" for local changes; None outside of one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if changed else head


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
