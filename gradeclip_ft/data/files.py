"""Files of an evaluation: present, complete, readable, or a message that says what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError


def prepare_files(
    annotations: str, folders: Iterable[str | None], make: Callable[[], object] | None
) -> None:
    """Have missing data made where that is possible.

    Raises:
        FileNotFoundError: A file or folder is missing and nothing makes it.
    """
    if make is not None and not Path(annotations).is_file():
        make()
    if not Path(annotations).is_file():
        raise FileNotFoundError(
            f"no annotation file {annotations}; fetch it (docs/data.md) or set "
            "annotations= to where it is"
        )
    for folder in folders:
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(
                f"no folder {folder} beside {annotations}; unpack it there or set its path"
            )


def require_images(folder: Path, images: Sequence[tuple[int, str]]) -> None:
    """Refuse a folder that lacks images.

    Raises:
        FileNotFoundError: With their number and the first of them.
    """
    missing = [(key, name) for key, name in images if not (folder / name).is_file()]
    if missing:
        key, name = missing[0]
        raise FileNotFoundError(
            f"{len(missing)} of {len(images)} annotated images are not in {folder}, first {name} "
            f"(id {key}); complete the folder or name another one as images="
        )


def read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object with at least these keys.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is cut off or of another kind.
    """
    content = load_json(path)
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; it is a file of another kind")
    result: dict[str, Any] = content
    return result


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is cut off.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file {path}; fetch it or set its path")
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no complete JSON ({error}); it may be cut off: fetch it again"
        ) from error


def open_image(path: Path) -> Image.Image:
    """An image in RGB, as its pixels are stored: COCO's annotations ignore EXIF rotation.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no complete image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no image {path}") from error
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); fetch it again") from error


def read_image_at(paths: Sequence[Path], index: int) -> Image.Image:
    """Image number `index` of a list; as a partial it crosses to other processes.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no complete image.
    """
    return open_image(paths[index])
