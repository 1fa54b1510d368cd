"""Files of an evaluation: present, complete, readable, or a message that says what is missing."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from webdataset.tariterators import base_plus_ext

from gradeclip_ft.images import IMAGE_SUFFIXES, read_image


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


def read_image_at(paths: Sequence[Path], index: int) -> Image.Image:
    """Image number `index` of a list; as a partial it crosses to other processes.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is no complete image.
    """
    return read_image(paths[index])


Item = TypeVar("Item")


def subset(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """`limit` of the items in their order; all of them without a limit, or where there are fewer.

    >>> subset("abcdef", 3, seed=0) == subset("abcdef", 3, seed=0)
    True

    Raises:
        ValueError: The limit is below 1.
    """
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise ValueError(f"limit is {limit}; give 1 image or more, or null for all")
    return [items[row] for row in sorted(random.Random(seed).sample(range(len(items)), limit))]


def subset_protocol(limit: int | None, seed: int) -> dict[str, Any]:
    """What the protocol of a result says about the part; nothing about the whole."""
    return {} if limit is None else {"subset": f"{limit} images drawn with seed {seed}"}


NUMBER = "nshards.txt"


@dataclass(frozen=True)
class Member:
    """A file inside a shard: its first byte and its length."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its content."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class TarSample:
    """Files of one sample, by suffix."""

    key: str
    files: dict[str, Member]

    @property
    def where(self) -> str:
        """Shard and key, for messages."""
        shard = next(iter(self.files.values())).shard
        return f"{shard}:{self.key}"

    def text(self, suffix: str) -> str:
        """Content of a text file.

        Raises:
            ValueError: The sample has no such file, or it is not in UTF-8.
        """
        if suffix not in self.files:
            raise ValueError(f"{self.where} has no .{suffix}, only {', '.join(self.files)}")
        try:
            return self.files[suffix].read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where}: its .{suffix} is not in UTF-8 ({error})") from error

    def record(self) -> dict[str, Any]:
        """Content of its `.json`; empty without one.

        Raises:
            ValueError: It is no JSON object.
        """
        if "json" not in self.files:
            return {}
        try:
            record = json.loads(self.files["json"].read())
        except ValueError as error:
            raise ValueError(f"{self.where}: its .json is broken ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{self.where}: its .json holds no object")
        return record

    def image(self) -> Image.Image:
        """The picture in RGB.

        Raises:
            ValueError: There is none, or it cannot be decoded.
        """
        suffix = next((name for name in IMAGE_SUFFIXES if name in self.files), None)
        if suffix is None:
            raise ValueError(f"{self.where} has no image, only {', '.join(self.files)}")
        return read_image(self.files[suffix].read(), name=self.where)


def tar_files(folder: Path) -> list[Path]:
    """The shards of a folder, by number; as many as its `nshards.txt` says, where there is one.

    Raises:
        FileNotFoundError: No folder, no shard, or fewer or more than there should be.
    """
    shards = sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))
    if not shards:
        raise FileNotFoundError(f"no .tar in {folder}; fetch the shards or set the folder")
    number = folder / NUMBER
    if number.is_file() and number.read_text().strip() != str(len(shards)):
        raise FileNotFoundError(
            f"{folder} has {len(shards)} shards, its {NUMBER} says {number.read_text().strip()}; "
            "fetch the others"
        )
    return shards


def index_shards(shards: Sequence[Path]) -> list[TarSample]:
    """Samples of all shards in their order, without reading them.

    Raises:
        ValueError: A shard is cut off or no tar.
    """
    samples: dict[tuple[Path, str], TarSample] = {}
    for shard in shards:
        try:
            with tarfile.open(shard, mode="r:") as archive:
                for entry in archive:
                    key, suffix = base_plus_ext(entry.name)  # as training splits names
                    if entry.isfile() and key is not None:
                        sample = samples.setdefault((shard, key), TarSample(key, {}))
                        sample.files[suffix.lower()] = Member(
                            shard, entry.name, entry.offset_data, entry.size
                        )
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{shard} is no complete tar ({error}); fetch it again") from error
    return list(samples.values())


def decode_at(samples: Sequence[TarSample], index: int) -> Image.Image:
    """Image of sample number `index`; as a partial it crosses to other processes.

    Raises:
        ValueError: There is none, or it cannot be decoded.
    """
    return samples[index].image()
