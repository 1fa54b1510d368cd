"""Samples inside tar files by their place, so that an evaluation can read them in any order."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gradeclip_ft.data.samples import IMAGE_SUFFIXES, read_image
from gradeclip_ft.data.stream import BadSampleError

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
        content = {} if suffix is None else {suffix: self.files[suffix].read()}
        try:
            return read_image(content)
        except BadSampleError as error:
            raise ValueError(f"{self.where}: {': '.join(map(str, error.args))}") from error


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
                    if entry.isfile():
                        key, _, suffix = entry.name.partition(".")
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
