"""A COCO-format world whose pixels tell the class, and models that read them: perfect or blind."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from gradeclip_ft.models.architecture import Architecture
from gradeclip_ft.models.clip import Clip, LoadedClip, Preprocessing
from gradeclip_ft.models.tokenizer import Tokenizer

THINGS = tuple(f"thing {n}" for n in range(12))
STUFF = tuple(f"stuff {n}" for n in range(5))
NAMES = THINGS + STUFF
SIZES = ((300, 200), (200, 300), (256, 256), (427, 640), (333, 160), (90, 400))


def colour_of(label: int) -> tuple[int, int, int]:
    """One of 63 colours 85 grey levels apart; black is the padding."""
    code = label * 3 + 1
    return (code % 4 * 85, code // 4 % 4 * 85, code // 16 * 85)


@dataclass(frozen=True)
class World:
    """Files of a small panoptic and captions data set, and what they hold."""

    folder: Path
    rectangles: dict[str, list[tuple[int, int, int, int, int]]]  # name: label, x, y, w, h

    @property
    def panoptic(self) -> dict[str, str]:
        """Where the panoptic files are, as options of `CocoRegions`."""
        return {
            "annotations": str(self.folder / "panoptic.json"),
            "images": str(self.folder / "images"),
            "segments": str(self.folder / "segments"),
        }

    @property
    def captions(self) -> dict[str, str]:
        """Where the captions are, as options of `CaptionFile`."""
        return {
            "annotations": str(self.folder / "captions.json"),
            "images": str(self.folder / "images"),
        }


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """18 pictures of six shapes, each cut into four rectangles of three things and stuff.

    Every picture has two captions, "main N" and "second N" for the labels of its first regions.
    """
    return make_world(tmp_path_factory.mktemp("world"), pictures=18)


def make_world(folder: Path, *, pictures: int) -> World:
    """Write the files."""
    random = np.random.default_rng(0)
    for name in ("images", "segments"):
        (folder / name).mkdir()
    images, annotations, captions, rectangles = [], [], [], {}
    for number in range(pictures):
        height, width = SIZES[number % len(SIZES)]
        cut_x = round(width * random.uniform(0.4, 0.6))
        cut_y = round(height * random.uniform(0.4, 0.6))
        labels = [number % len(THINGS), (number * 5 + 1) % len(THINGS), (number * 7 + 2) % 12]
        labels = [*dict.fromkeys(labels), len(THINGS) + number % len(STUFF)]
        quarters = [
            (0, 0, cut_x, cut_y),
            (cut_x, 0, width - cut_x, cut_y),
            (0, cut_y, cut_x, height - cut_y),
            (cut_x, cut_y, width - cut_x, height - cut_y),
        ]
        pixels = np.zeros((height, width, 3), np.uint8)
        colours = np.zeros((height, width, 3), np.uint8)
        segments, found = [], []
        for place, (label, (x, y, w, h)) in enumerate(zip(labels, quarters, strict=False)):
            code = 65000 + number * 300 + place
            pixels[y : y + h, x : x + w] = colour_of(label)
            colours[y : y + h, x : x + w] = (code % 256, code // 256 % 256, code // 65536)
            bbox = [x, y, w, h]
            segments.append({"id": code, "category_id": label * 2 + 1, "bbox": bbox, "iscrowd": 0})
            found.append((label, x, y, w, h))
        name = f"{number:012d}"
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        Image.fromarray(colours).save(folder / "segments" / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.png", "height": height, "width": width})
        annotations.append(
            {"image_id": number, "file_name": f"{name}.png", "segments_info": segments}
        )
        captions += [
            {"image_id": number, "caption": f"picture {number}"},
            {"image_id": number, "caption": f"again picture {number}"},
        ]
        rectangles[f"{name}.png"] = found
    categories = [
        {"id": label * 2 + 1, "name": name, "isthing": int(label < len(THINGS))}
        for label, name in enumerate(NAMES)
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(content))
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return World(folder, rectangles)


class Reader:
    """An image tower that reads the class of every patch from its colour.

    A token holds, for each class, the share of its pixels in that colour.
    """

    unexplained = None

    def __init__(
        self, patch: int, *, blind: bool = False, shift: int = 0, whole: bool = False
    ) -> None:
        self.patch = patch
        self.whole = whole
        self.blind = blind
        self.shift = shift
        self.calls: list[int] = []

    def dense(self, images: Tensor) -> Tensor:
        how = Preprocessing()
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (how.mean, how.std))
        pixels = (images.float() * std + mean).permute(0, 2, 3, 1)  # (B, H, W, 3)
        levels = (pixels * 3).round()
        clear = (pixels - levels / 3).abs().amax(-1) < 0.08
        code = (levels @ torch.tensor([1.0, 4.0, 16.0])).where(clear, 0)  # inverse of colour_of
        share = torch.stack(
            [
                torch.nn.functional.avg_pool2d((code == 3 * label + 1).float(), self.patch)
                for label in range(len(NAMES))
            ],
            dim=-1,
        )
        if self.blind:
            generator = torch.Generator().manual_seed(int(images.shape[0]))
            return torch.randn(share.shape, generator=generator)
        return share.roll(self.shift, dims=2)

    def trace(self, images: Tensor) -> SimpleNamespace:
        self.calls.append(len(images))
        assert not torch.is_grad_enabled()
        return SimpleNamespace(dense=lambda: self.dense(images))

    def encode(self, images: Tensor) -> Tensor:
        """The mean colour at a coarse grid: every picture of the world has its own.

        With `whole` the share of each class in the picture.
        """
        self.calls.append(len(images))
        if self.whole:
            return self.dense(images).mean((1, 2))
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 8).flatten(1)


class Names:
    """A text tower that knows the class names: one axis each."""

    def __init__(self, width: int = len(NAMES), table: Tensor | None = None) -> None:
        self.table = torch.eye(width) if table is None else table
        self.rows = 0

    def encode(self, tokens: Tensor) -> Tensor:
        self.rows += len(tokens)
        return self.table[tokens[:, 1]]


class FakeClip(Clip):
    """A `Clip` with other towers; one layer is in training mode, one is not."""

    def __init__(self, image: Reader, text: Names) -> None:
        nn.Module.__init__(self)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.model.register_parameter("logit_scale", nn.Parameter(torch.zeros(())))
        self.model.train()
        self.model[0].eval()
        self.image = image  # type: ignore[assignment]
        self.text = text  # type: ignore[assignment]


def number_in(texts: list[str]) -> Tensor:
    """Ids [start, number of the class or picture, end]; things first, then stuff."""
    rows = []
    for text in texts:
        number = int(re.findall(r"[0-9]+", text)[-1])
        rows.append([98, number + (len(THINGS) if "stuff" in text else 0), 99, 0, 0, 0])
    return torch.tensor(rows)


Load = Callable[..., LoadedClip]


@pytest.fixture
def load() -> Load:
    """Build a model: `load(size=224, patch=16, blind=False, shift=0, whole=False, table=None)`."""

    def build(
        size: int = 224,
        patch: int = 16,
        *,
        blind: bool = False,
        shift: int = 0,
        whole: bool = False,
        table: Tensor | None = None,
    ) -> LoadedClip:
        reader = Reader(patch, blind=blind, shift=shift, whole=whole)
        return LoadedClip(
            clip=FakeClip(reader, Names(table=table)),
            tokenizer=Tokenizer(number_in, 6),
            preprocessing=Preprocessing(resize="squash"),
            image_size=(size, size),
            architecture=Architecture("fake", {}, {}),
        )

    return build


def modes(clip: nn.Module) -> Sequence[bool]:
    """Mode of every layer."""
    return [module.training for module in clip.modules()]
