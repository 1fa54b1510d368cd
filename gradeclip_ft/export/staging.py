"""Export folders that appear complete or not at all.

Files are written into a hidden folder beside the target, checked there, and moved when all is well.
A note in every export lists its files: a later export replaces exactly those.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

NOTE = "gradeclip_ft.json"


@contextmanager
def staged(folder: Path, kind: str) -> Iterator[Path]:
    """A folder to write into; its files stand in `folder` once the block ends without an error.

    Args:
        folder: Absent, empty, or an earlier export in the same format, whose files are replaced.
        kind: The format, as the note says it under `target`.

    Raises:
        FileExistsError: The folder holds something else.
    """
    target = folder.absolute()
    found = _kind(target)
    if found not in (None, kind):
        raise FileExistsError(
            f"{folder} holds {found}, which an export to {kind} does not replace; choose another "
            "folder with out=DIR"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        stage.chmod(0o755)
        yield stage
        _publish(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def save_state(
    state: Mapping[str, Tensor], path: Path, note: Mapping[str, str] | None = None
) -> None:
    """A plain dict of tensors as .safetensors or .pt.

    Args:
        state: Contiguous tensors on the CPU.
        path: Its suffix decides.
        note: Strings for the header of a .safetensors; a .pt holds tensors alone.
    """
    if path.suffix == ".safetensors":
        save_file(dict(state), path, metadata={**(note or {}), "format": "pt"})
    else:
        torch.save(dict(state), path)
    path.chmod(0o644)


def write_json(content: object, path: Path) -> None:
    """JSON as people read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def files_of(folder: Path) -> list[str]:
    """Files below a folder, relative to it, without the note."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != NOTE)


def _kind(folder: Path) -> str | None:
    """What a folder holds: None if nothing, an export's format, or words for something else."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / NOTE).is_file():
        return f"files but no {NOTE}"
    return str(json.loads((folder / NOTE).read_text(encoding="utf-8")).get("target"))


def _publish(stage: Path, folder: Path) -> None:
    if _kind(folder) is None:
        stage.replace(folder)
        return
    earlier = json.loads((folder / NOTE).read_text(encoding="utf-8")).get("files", [])
    names = files_of(stage)
    for name in [*names, NOTE]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).replace(folder / name)
    for name in set(earlier) - set(names):
        path = (folder / name).resolve()
        if path.is_relative_to(folder.resolve()):
            path.unlink(missing_ok=True)
