"""SugarCrepe's files: one JSON per kind of change, each entry an image and two captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from gradeclip_ft.data.files import load_json, read_image_at, require_images
from gradeclip_ft.data.pair_images import CaptionedImages, Tokenize
from gradeclip_ft.data.subset import subset, subset_protocol

KEYS = ("filename", "caption", "negative_caption")


@dataclass(frozen=True)
class CaptionChoices:
    """A folder of `KIND.json`: {"0": {"filename", "caption", "negative_caption"}, ...}.

    Attributes:
        folder: Of the JSON files.
        images: Folder of the images, COCO val2017 for SugarCrepe.
        kinds: Names of the files without `.json`; None for all.
        limit: Only so many images, drawn with `limit_seed`; None for all.
        limit_seed: Of that draw.
    """

    folder: str
    images: str
    kinds: tuple[str, ...] | list[str] | None = None
    limit: int | None = None
    limit_seed: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        kinds = "all" if self.kinds is None else list(self.kinds)
        return {"kinds": kinds, **subset_protocol(self.limit, self.limit_seed)}

    def prepare(self) -> None:
        """Check that files and images are there.

        Raises:
            FileNotFoundError: They are not.
        """
        self._files()
        if not Path(self.images).is_dir():
            raise FileNotFoundError(f"no folder {self.images}; set images= to where they are")

    def __call__(
        self, *, transform: Callable[[Image.Image], Tensor], tokenizer: Tokenize
    ) -> tuple[CaptionedImages, list[str]]:
        """Images with their captions, right and wrong in turn, and the kind of each two.

        Raises:
            FileNotFoundError: A file or an image is missing.
            ValueError: A file is damaged or of another kind.
        """
        self.prepare()
        files = self._files()
        captions: dict[str, list[str]] = {}
        kinds: dict[str, list[str]] = {}
        for path in files:
            for name, right, wrong in _entries(path):
                captions.setdefault(name, []).extend((right, wrong))
                kinds.setdefault(name, []).append(path.stem)
        names = subset(list(captions), self.limit, self.limit_seed)
        folder = Path(self.images)
        require_images(folder, list(enumerate(names)))
        paths = [folder / name for name in names]
        opened = CaptionedImages(
            names=names,
            captions=[tuple(captions[name]) for name in names],
            read=partial(read_image_at, paths),
            files=files,
            listed=paths,
            skipped={},
            transform=transform,
            tokenizer=tokenizer,
        )
        return opened, [kind for name in names for kind in kinds[name]]

    def _files(self) -> list[Path]:
        folder = Path(self.folder)
        if self.kinds is None:
            files = sorted(folder.glob("*.json"))
        else:
            files = [folder / f"{kind}.json" for kind in self.kinds]
        missing = [path.name for path in files if not path.is_file()]
        if missing or not files:
            raise FileNotFoundError(
                f"no {', '.join(missing) or '.json'} in {folder}; fetch the files of the "
                "benchmark or set folder="
            )
        return files


def _entries(path: Path) -> list[tuple[str, str, str]]:
    content = load_json(path)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no entries by number; it is a file of another kind")
    found = []
    for key, entry in content.items():
        missing = [name for name in KEYS if not isinstance(entry, Mapping) or name not in entry]
        if missing:
            raise ValueError(f"{path}: entry {key} has no {', '.join(missing)}")
        found.append((entry["filename"], entry["caption"], entry["negative_caption"]))
    return found
