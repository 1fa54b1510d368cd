"""Images with one class each: a folder per class, or CLIP_benchmark's shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradeclip_ft.data.files import (
    ImageSet,
    TarSample,
    index_shards,
    subset,
    subset_protocol,
    tar_files,
    visible,
)
from gradeclip_ft.images import images_in

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class ClassFolders:
    """A folder per class, as ImageNet's validation set is unpacked; labels by sorted names.

    Attributes:
        folder: Of the folders.
        classes: Number of classes there must be; any other number is refused.
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
        """Check that the folders are there."""
        self._folders()

    def __call__(self) -> ImageSet:
        """The images that count."""
        folders = self._folders()
        skipped: Counter[str] = Counter()
        found = []
        for label, folder in enumerate(folders):
            images = images_in(folder)
            found += [(path, label) for path in images]
            skipped["file that is not an image"] += len(list(folder.iterdir())) - len(images)
        if not found:
            raise FileNotFoundError(f"no image in the folders of {self.folder}")
        skipped["hidden folder"] = len(list(Path(self.folder).glob("*/"))) - len(folders)
        chosen = subset(found, self.limit, self.limit_seed)
        paths = [path for path, _ in chosen]
        return ImageSet(
            images=paths,
            names=[path.name for path in paths],
            listed=paths,
            labels=[label for _, label in chosen],
            classes=[folder.name for folder in folders],
            skipped=+skipped,
        )

    def _folders(self) -> list[Path]:
        root = Path(self.folder)
        found = visible(root.iterdir()) if root.is_dir() else []
        folders = [path for path in found if path.is_dir() and path.name != "__MACOSX"]
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
    """

    folder: str
    limit: int | None = None
    limit_seed: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return subset_protocol(self.limit, self.limit_seed)

    def prepare(self) -> None:
        """Check that shards and class names are there."""
        tar_files(Path(self.folder))
        self._lines(CLASS_NAMES)

    def __call__(self) -> ImageSet:
        """The images that count."""
        shards = tar_files(Path(self.folder))
        names = self._lines(CLASS_NAMES)
        root = Path(self.folder).parent
        files = [root / name for name in (CLASS_NAMES, TEMPLATES) if (root / name).is_file()]
        templates = self._lines(TEMPLATES) if len(files) == 2 else []
        samples = subset(index_shards(shards), self.limit, self.limit_seed)
        return ImageSet(
            images=samples,
            names=[sample.where for sample in samples],
            listed=shards,
            files=files,
            labels=[_label(sample, len(names)) for sample in samples],
            classes=names,
            templates=[line.replace("{c}", "{}") for line in templates],
        )

    def _lines(self, name: str) -> list[str]:
        path = Path(self.folder).parent / name
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; it belongs next to the folder of the split")
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def _label(sample: TarSample, classes: int) -> int:
    text = sample.text("cls").strip()
    if not text.isdigit() or int(text) >= classes:
        raise ValueError(
            f"{sample.where}: class {text!r}, expected a number from 0 to {classes - 1}; class "
            "names and shards must be of one data set"
        )
    return int(text)
