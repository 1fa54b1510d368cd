"""Images with one class each: a folder per class, or CLIP_benchmark's shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradeclip_ft.batch import ImageBatch
from gradeclip_ft.data.files import (
    TarSample,
    decode_at,
    index_shards,
    read_image_at,
    subset,
    subset_protocol,
    tar_files,
)
from gradeclip_ft.data.loading import evaluation_loader
from gradeclip_ft.images import images_in

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Opened images: one with its label per item.

    Attributes:
        names: Class names in order of the labels, as the data have them.
        templates: Sentences with `{}`, where the data bring some.
        labels: Class of each image.
        read: Image number to its picture.
        files: Small files, which a fingerprint reads.
        listed: Images or shards, which a fingerprint lists.
        transform: The model's own preprocessing.
    """

    names: Sequence[str]
    templates: Sequence[str]
    labels: Sequence[int]
    read: Callable[[int], Image.Image]
    files: Sequence[Path]
    listed: Sequence[Path]
    transform: Callable[[Image.Image], Tensor]

    @property
    def counts(self) -> dict[str, Any]:
        """Images, and classes with and without one."""
        return {"images": len(self.labels), "classes": len(set(self.labels))}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 H W"], int]:
        """Image and label number `index`.

        Raises:
            ValueError: The image cannot be read.
        """
        return self.transform(self.read(index)), self.labels[index]

    def batches(self, batch_size: int, workers: int) -> DataLoader[ImageBatch]:
        """All images once, in order; leaves torch's global random state alone."""
        return evaluation_loader(self, join_images, batch_size=batch_size, workers=workers)


def join_images(samples: Sequence[tuple[Tensor, int]]) -> ImageBatch:
    """Images of one batch."""
    return ImageBatch(
        images=torch.stack([image for image, _ in samples]),
        labels=torch.tensor([label for _, label in samples]),
    )


@dataclass(frozen=True)
class ClassFolders:
    """A folder per class, as ImageNet's validation set is unpacked; labels by sorted names.

    Attributes:
        folder: Of the folders.
        classes: Number of classes there must be; any other number is refused.
        limit: Only so many images, drawn with `limit_seed`; None for all.
        limit_seed: Of that draw.
    """

    folder: str
    classes: int | None = None
    limit: int | None = None
    limit_seed: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return subset_protocol(self.limit, self.limit_seed)

    def prepare(self) -> None:
        """Check that the folders are there.

        Raises:
            FileNotFoundError: There is none.
            ValueError: There are more or fewer classes than expected.
        """
        self._folders()

    def __call__(self, *, transform: Callable[[Image.Image], Tensor]) -> LabelledImages:
        """The images as a model wants them.

        Raises:
            FileNotFoundError: There is no image.
            ValueError: There are more or fewer classes than expected.
        """
        folders = self._folders()
        found = [
            (path, label) for label, folder in enumerate(folders) for path in images_in(folder)
        ]
        if not found:
            raise FileNotFoundError(f"no image in the folders of {self.folder}")
        chosen = subset(found, self.limit, self.limit_seed)
        paths = [path for path, _ in chosen]
        return LabelledImages(
            names=[folder.name for folder in folders],
            templates=(),
            labels=[label for _, label in chosen],
            read=partial(read_image_at, paths),
            files=(),
            listed=paths,
            transform=transform,
        )

    def _folders(self) -> list[Path]:
        root = Path(self.folder)
        folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        if not folders:
            raise FileNotFoundError(
                f"no folder per class in {root}; sort the images into folders, or set folder="
            )
        if self.classes is not None and len(folders) != self.classes:
            raise ValueError(
                f"{root} has {len(folders)} folders, there must be {self.classes} classes: labels "
                "are the ranks of the sorted names, so every class needs its folder"
            )
        return folders


@dataclass(frozen=True)
class ClassShards:
    """CLIP_benchmark's webdataset: images with `.cls`; class names in `classnames.txt` above.

    Attributes:
        folder: Of the split, with the shards.
        limit: Only so many images, drawn with `limit_seed`; None for all.
        limit_seed: Of that draw.
    """

    folder: str
    limit: int | None = None
    limit_seed: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return subset_protocol(self.limit, self.limit_seed)

    def prepare(self) -> None:
        """Check that shards and class names are there.

        Raises:
            FileNotFoundError: They are not.
        """
        tar_files(Path(self.folder))
        self._lines(CLASS_NAMES)

    def __call__(self, *, transform: Callable[[Image.Image], Tensor]) -> LabelledImages:
        """The images as a model wants them.

        Raises:
            FileNotFoundError: Shards or class names are missing.
            ValueError: A shard is damaged, or a label has no name.
        """
        shards = tar_files(Path(self.folder))
        names = self._lines(CLASS_NAMES)
        root = Path(self.folder).parent
        templates = self._lines(TEMPLATES) if (root / TEMPLATES).is_file() else []
        samples = subset(index_shards(shards), self.limit, self.limit_seed)
        return LabelledImages(
            names=names,
            templates=[line.replace("{c}", "{}") for line in templates],
            labels=[_label(sample, len(names)) for sample in samples],
            read=partial(decode_at, samples),
            files=[root / name for name in (CLASS_NAMES, TEMPLATES) if (root / name).is_file()],
            listed=shards,
            transform=transform,
        )

    def _lines(self, name: str) -> list[str]:
        path = Path(self.folder).parent / name
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; it stands beside the folder of the split")
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def _label(sample: TarSample, classes: int) -> int:
    text = sample.text("cls").strip()
    if not text.isdigit() or int(text) >= classes:
        raise ValueError(
            f"{sample.where}: class {text!r}, expected a number from 0 to {classes - 1}; class "
            "names and shards must be of one data set"
        )
    return int(text)
