"""Boxes with a right text and wrong ones: FG-OVD as FG-CLIP and its successors read it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F  # noqa: N812

from gradeclip_ft.data.files import require_images, subset, subset_protocol
from gradeclip_ft.data.loading import evaluation_loader
from gradeclip_ft.data.regions import letterbox_boxes, letterbox_image
from gradeclip_ft.images import read_image

LAYOUT = "expected lines with img_path, bbox, pos_expression and neg_expression"
Squares = tuple[Float[Tensor, "B 3 S S"], Float[Tensor, "R 4"], Int[Tensor, " R"]]


@dataclass(frozen=True)
class BoxText:
    """A box (x, y, width, height) in pixels of a photo, and its texts, the right one first."""

    part: str
    box: tuple[float, float, float, float]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class BoxTextImages(Dataset[tuple[Image.Image, Float[Tensor, "_ 4"]]]):
    """Photos with their boxes.

    Attributes:
        images: Files.
        boxes: Of each photo.
        files: The lists, which a fingerprint reads.
    """

    images: Sequence[Path]
    boxes: Sequence[Sequence[BoxText]]
    files: Sequence[Path]
    labels: Sequence[int] = ()
    classes: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        """File names of the photos."""
        return [path.name for path in self.images]

    @property
    def counts(self) -> dict[str, Any]:
        """Photos and boxes."""
        return {"images": len(self.images), "boxes": sum(map(len, self.boxes))}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Float[Tensor, "_ 4"]]:
        """Photo number `index` and its boxes as xyxy in [0, 1]."""
        photo = read_image(self.images[index], exif=False)
        boxes = torch.tensor([one.box for one in self.boxes[index]])
        size = {"height": photo.height, "width": photo.width}
        return photo, letterbox_boxes(boxes, **size, squash=True)

    def batches(
        self,
        side: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int,
        workers: int,
    ) -> DataLoader[Squares]:
        """All photos once, squashed to squares, with their boxes and the row of each box."""
        join = partial(_join, side, mean, std)
        return evaluation_loader(self, join, batch_size=batch_size, workers=workers)


def _join(
    side: int,
    mean: Sequence[float],
    std: Sequence[float],
    items: Sequence[tuple[Image.Image, Float[Tensor, "_ 4"]]],
) -> Squares:
    squares = [F.pil_to_tensor(letterbox_image(photo, side, squash=True)) for photo, _ in items]
    pixels = F.normalize(torch.stack(squares).float() / 255, list(mean), list(std))
    counts = torch.tensor([len(boxes) for _, boxes in items])
    owner = torch.arange(len(items)).repeat_interleave(counts)
    return pixels, torch.cat([boxes for _, boxes in items]), owner


@dataclass(frozen=True)
class BoxTexts:
    """Lists in JSON lines, one box a line.

    Attributes:
        folder: Of the lists.
        parts: File of each part, such as hard and easy.
        images: Folder that the names in the lists begin in.
    """

    folder: str
    parts: Mapping[str, str]
    images: str
    limit: int | None = None
    limit_seed: int = 0

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return {
            "parts": list(self.parts),
            "texts": "lower case, no prompt",
            "letterbox": "bicubic, squashed to the square",
            **subset_protocol(self.limit, self.limit_seed),
        }

    def prepare(self) -> None:
        """Check that the lists are there."""
        for path in self._files():
            if not path.is_file():
                raise FileNotFoundError(
                    f"no list {path}; fetch the data (docs/data.md) or set folder= and parts="
                )

    def __call__(self) -> BoxTextImages:
        """The photos that count."""
        self.prepare()
        found: dict[str, list[BoxText]] = {}
        for part, path in zip(self.parts, self._files(), strict=True):
            for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
                if line.strip():
                    name, one = _read(part, line, f"{path}:{number}")
                    found.setdefault(name, []).append(one)
        names = subset(list(found), self.limit, self.limit_seed)
        require_images(Path(self.images), list(enumerate(names)))
        return BoxTextImages(
            images=[Path(self.images) / name for name in names],
            boxes=[found[name] for name in names],
            files=self._files(),
        )

    def _files(self) -> list[Path]:
        return [Path(self.folder) / name for name in self.parts.values()]


def _read(part: str, line: str, where: str) -> tuple[str, BoxText]:
    """The photo of a line, and its box."""
    try:
        entry = json.loads(line)
        right, wrong = entry["pos_expression"], entry["neg_expression"]
        texts = ([right] if isinstance(right, str) else right[:1]) + wrong
        x, y, width, height = map(float, entry["bbox"])
        one = BoxText(part, (x, y, width, height), tuple(text.lower() for text in texts))
        return str(entry["img_path"]), one
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: {type(error).__name__} {error}; {LAYOUT}") from error
