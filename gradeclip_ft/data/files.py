"""Files of an evaluation: present, complete, readable, or a message that says what is missing."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from webdataset.tariterators import base_plus_ext

from gradeclip_ft.batch import ImageBatch, PairBatch
from gradeclip_ft.data.loading import evaluation_loader
from gradeclip_ft.images import IMAGE_SUFFIXES, read_image

Item = TypeVar("Item")
Opened = TypeVar("Opened", covariant=True)


@runtime_checkable
class Source(Protocol[Opened]):
    """Where the data of an evaluator come from.

    Some fields mean the same in every source. `limit` is the number of pictures, drawn with
    `limit_seed`; None for all. `expected` is how many the split has; any other number is refused.
    `make` is called when the annotation file does not exist, to make it; `world` is the version of
    the shapes world that it makes, which the protocol names beyond 1.
    """

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        ...

    def prepare(self) -> None:
        """Make or check the data; cheap when they are there."""
        ...

    def __call__(self, *args: Any, **settings: Any) -> Opened:
        """Read annotations, choose, and check that the images are there."""
        ...


@runtime_checkable
class Tokenize(Protocol):
    """Texts to token ids."""

    def __call__(self, texts: Sequence[str], *, trim: bool = False) -> Int[Tensor, "M L"]:
        """Ids of some texts, with `trim` no longer than needed."""
        ...


@dataclass(frozen=True)
class ImageSet(Dataset[tuple[Image.Image, Any]]):
    """Whole images, each with its captions or with its label.

    Attributes:
        images: Files, or samples of shards.
        names: Of the images, which say which photo each is.
        listed: Images or shards, which a fingerprint lists.
        files: Annotation files, which a fingerprint reads.
        captions: Of each image, in file order.
        kinds: Of each two captions, right and wrong, in their order.
        labels: Class of each image.
        classes: Class names in order of the labels, as the data have them.
        templates: Sentences with `{}`, where the data bring some.
        skipped: Left out, by cause.
    """

    images: Sequence[Path | TarSample]
    names: Sequence[str]
    listed: Sequence[Path]
    files: Sequence[Path] = ()
    captions: Sequence[tuple[str, ...]] = ()
    kinds: Sequence[str] = ()
    labels: Sequence[int] = ()
    classes: Sequence[str] = ()
    templates: Sequence[str] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, Any]:
        """What counts, and what was left out."""
        if self.captions:
            captions = sum(map(len, self.captions))
            return {"images": len(self), "captions": captions, "skipped": dict(self.skipped)}
        left_out = {"skipped": dict(self.skipped)} if self.skipped else {}
        return {"images": len(self), "classes": len(set(self.labels)), **left_out}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """Picture number `index` with its captions or its label."""
        image = self.images[index]
        picture = image.image() if isinstance(image, TarSample) else read_image(image)
        return picture, self.captions[index] if self.captions else self.labels[index]

    def pairs(
        self,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Tokenize,
        *,
        batch_size: int,
        workers: int,
    ) -> DataLoader[PairBatch]:
        """All images and captions once, in file order."""
        join = partial(_join_pairs, transform, tokenizer)
        return evaluation_loader(self, join, batch_size=batch_size, workers=workers)

    def labelled(
        self, transform: Callable[[Image.Image], Tensor], *, batch_size: int, workers: int
    ) -> DataLoader[ImageBatch]:
        """All images and labels once, in order."""
        join = partial(_join_labelled, transform)
        return evaluation_loader(self, join, batch_size=batch_size, workers=workers)


def _join_pairs(
    transform: Callable[[Image.Image], Tensor],
    tokenizer: Tokenize,
    samples: Sequence[tuple[Image.Image, tuple[str, ...]]],
) -> PairBatch:
    """Images of one batch with their captions flat."""
    counts = torch.tensor([len(captions) for _, captions in samples])
    return PairBatch(
        images=torch.stack([transform(picture) for picture, _ in samples]),
        texts=tokenizer([text for _, captions in samples for text in captions], trim=True),
        owner=torch.arange(len(samples)).repeat_interleave(counts),
    )


def _join_labelled(
    transform: Callable[[Image.Image], Tensor], samples: Sequence[tuple[Image.Image, int]]
) -> ImageBatch:
    return ImageBatch(
        images=torch.stack([transform(picture) for picture, _ in samples]),
        labels=torch.tensor([label for _, label in samples]),
    )


def prepare_files(
    annotations: str, folders: Iterable[str | None], make: Callable[[], object] | None
) -> None:
    """Have missing data made where that is possible."""
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
                f"no folder {folder} next to {annotations}; unpack it there or set its path"
            )


def require_images(folder: Path, images: Sequence[tuple[int, str]]) -> None:
    """Refuse a folder that lacks images."""
    missing = [(key, name) for key, name in images if not (folder / name).is_file()]
    if missing:
        key, name = missing[0]
        raise FileNotFoundError(
            f"{len(missing)} of {len(images)} annotated images are not in {folder}, first {name} "
            f"(id {key}); complete the folder or name another one as images="
        )


def load_json(path: Path) -> Any:
    """The content of a JSON file."""
    if not path.is_file():
        raise FileNotFoundError(f"no annotation file {path}; fetch it or set its path")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not complete JSON ({error}); it may be cut off: fetch it again"
        ) from error


def visible(paths: Iterable[Path]) -> list[Path]:
    """Those whose name does not begin with a dot, sorted: without the `._` files of macOS."""
    return sorted(path for path in paths if path.name[0] != ".")


def subset(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """`limit` of the items in their order; all of them without a limit, or where there are fewer.

    >>> subset("abcdef", 3, seed=0) == subset("abcdef", 3, seed=0)
    True
    """
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise ValueError(f"limit is {limit}; give 1 image or more, or null for all")
    return [items[row] for row in sorted(random.Random(seed).sample(range(len(items)), limit))]


def subset_protocol(limit: int | None, seed: int) -> dict[str, Any]:
    """What the protocol of a result says about the part; nothing about the whole."""
    return {} if limit is None else {"subset": f"{limit} images drawn with seed {seed}"}


@dataclass(frozen=True)
class TarSample:
    """One sample of a shard: where the bytes of each of its files are, by suffix."""

    shard: Path
    key: str
    places: dict[str, tuple[int, int]]

    @property
    def where(self) -> str:
        """Shard and key, for messages."""
        return f"{self.shard}:{self.key}"

    def read(self, suffix: str) -> bytes:
        """The content of one file."""
        if suffix not in self.places:
            raise ValueError(f"{self.where} has no .{suffix}, only {', '.join(self.places)}")
        offset, size = self.places[suffix]
        with self.shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def text(self, suffix: str) -> str:
        """The content of a text file."""
        try:
            return self.read(suffix).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where}: its .{suffix} is not in UTF-8 ({error})") from error

    def record(self) -> dict[str, Any]:
        """The content of its `.json`; empty without one."""
        if "json" not in self.places:
            return {}
        try:
            record = json.loads(self.read("json"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where}: its .json is broken ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{self.where}: its .json holds a {type(record).__name__}")
        return record

    def image_bytes(self) -> bytes:
        """The content of its picture."""
        return self.read(next((name for name in IMAGE_SUFFIXES if name in self.places), "jpg"))

    def image(self) -> Image.Image:
        """The picture in RGB."""
        return read_image(self.image_bytes(), name=self.where)


def tar_files(folder: Path) -> list[Path]:
    """The shards of a folder, by number; as many as its `nshards.txt` says, where there is one."""
    shards = sorted(visible(folder.glob("*.tar")), key=lambda path: (len(path.name), path.name))
    if not shards:
        raise FileNotFoundError(f"no .tar in {folder}; fetch the shards or set the folder")
    number = folder / "nshards.txt"
    if number.is_file() and number.read_text().strip() != str(len(shards)):
        raise FileNotFoundError(
            f"{folder} has {len(shards)} shards, its {number.name} says "
            f"{number.read_text().strip()}; fetch the others"
        )
    return shards


def index_shards(shards: Sequence[Path]) -> list[TarSample]:
    """Samples of all shards in their order, without reading them."""
    samples: dict[tuple[Path, str], TarSample] = {}
    for shard in shards:
        try:
            with tarfile.open(shard, mode="r:") as archive:
                for entry in archive:
                    key, suffix = base_plus_ext(entry.name)  # as training splits names
                    hidden = Path(entry.name).name.startswith(".")  # `._0.jpg` of macOS
                    if entry.isfile() and key is not None and not hidden:
                        sample = samples.setdefault((shard, key), TarSample(shard, key, {}))
                        sample.places[suffix.lower()] = (entry.offset_data, entry.size)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{shard} is not a complete tar ({error}); fetch it again") from error
    return list(samples.values())
