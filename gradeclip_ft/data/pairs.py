"""Images with all their captions, for retrieval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gradeclip_ft.batch import PairBatch
from gradeclip_ft.data.coco import CaptionedPicture, read_captions
from gradeclip_ft.data.files import open_image, prepare_files, require_images


@runtime_checkable
class Tokenize(Protocol):
    """Texts to token ids."""

    def __call__(self, texts: Sequence[str], *, trim: bool = False) -> Int[Tensor, "M L"]:
        """Ids of some texts, with `trim` no longer than needed."""
        ...


@dataclass(frozen=True)
class CocoCaptions:
    """A captions file in COCO's layout, which Karpathy splits use as well.

    Attributes:
        annotations: The captions file.
        images: Folder of the images.
        split: Its name in the protocol: recalls of different splits cannot be compared.
        expected: Number of images the split has; any other number is refused.
        make: Called when the annotation file does not exist, to make it.
    """

    annotations: str
    images: str
    split: str
    expected: int | None = None
    make: Callable[[], object] | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        """Choices that change the numbers."""
        return {"split": self.split, "captions": "all of each image, plain"}

    def prepare(self) -> None:
        """Make what can be made; cheap when it is there.

        Raises:
            FileNotFoundError: A file or folder is missing and nothing makes it.
        """
        prepare_files(self.annotations, (self.images,), self.make)

    def __call__(
        self, *, transform: Callable[[Image.Image], Tensor], tokenizer: Tokenize
    ) -> CaptionedImages:
        """The pairs as a model wants them; images without a caption are left out and counted.

        Raises:
            FileNotFoundError: Images are missing.
            ValueError: The file is damaged, has another number of images, or no caption at all.
        """
        self.prepare()
        pictures = read_captions(Path(self.annotations))
        if self.expected is not None and len(pictures) != self.expected:
            raise ValueError(
                f"{self.annotations} lists {len(pictures)} images, split {self.split} has "
                f"{self.expected}; choose the file of that split"
            )
        require_images(Path(self.images), [(entry.id, entry.file_name) for entry in pictures])
        captioned = [picture for picture in pictures if picture.captions]
        if not captioned:
            raise ValueError(f"{self.annotations} has no image with a caption")
        missing = len(pictures) - len(captioned)
        return CaptionedImages(
            settings=self,
            pictures=captioned,
            skipped={"image without caption": missing} if missing else {},
            transform=transform,
            tokenizer=tokenizer,
        )


@dataclass(frozen=True)
class CaptionedImages(Dataset[tuple[Tensor, tuple[str, ...]]]):
    """Opened pairs: one image with its captions per item.

    Attributes:
        settings: Where they come from.
        pictures: Images with at least one caption.
        skipped: Left out, by cause.
        transform: The model's own preprocessing.
        tokenizer: Texts to token ids.
    """

    settings: CocoCaptions
    pictures: Sequence[CaptionedPicture]
    skipped: dict[str, int]
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Tokenize

    @property
    def files(self) -> list[Path]:
        """Annotation files, which a fingerprint reads."""
        return [Path(self.settings.annotations)]

    @property
    def listed(self) -> list[Path]:
        """Images, which a fingerprint lists."""
        return [Path(self.settings.images) / picture.file_name for picture in self.pictures]

    @property
    def counts(self) -> dict[str, Any]:
        """Images and captions that count, and those left out."""
        return {
            "images": len(self.pictures),
            "captions": sum(len(picture.captions) for picture in self.pictures),
            "skipped": self.skipped,
        }

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 H W"], tuple[str, ...]]:
        """Image and captions number `index`.

        Raises:
            ValueError: The image cannot be read.
        """
        picture = self.pictures[index]
        image = open_image(Path(self.settings.images) / picture.file_name)
        return self.transform(image), picture.captions

    def join(self, samples: Sequence[tuple[Tensor, tuple[str, ...]]]) -> PairBatch:
        """Images of one batch with their captions flat."""
        captions = [captions for _, captions in samples]
        counts = torch.tensor([len(some) for some in captions])
        return PairBatch(
            images=torch.stack([image for image, _ in samples]),
            texts=self.tokenizer([text for some in captions for text in some], trim=True),
            owner=torch.arange(len(samples)).repeat_interleave(counts),
        )

    def batches(self, batch_size: int, workers: int) -> DataLoader[PairBatch]:
        """All pairs once, in file order; leaves torch's global random state alone."""
        return DataLoader(
            self,  # type: ignore[arg-type]
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=self.join,
            generator=torch.Generator(),
        )
