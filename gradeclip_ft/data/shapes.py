"""The shapes world on disk: shards in CC3M's layout for training, COCO files for evaluation.

    train/shapes-train-0000.tar   NNNNNNNNN.jpg, .txt, .json per sample
    val/shapes-val-0000.tar
    images_val/NNNNNNNNN.jpg      annotations/{captions,instances,panoptic}_val.json, and
                                  annotations/panoptic_val/NNNNNNNNN.png

Every sample depends on (seed, split, index) alone, so the files are the same for any number of
workers.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gradeclip_ft.data.coco_write import Picture, write_coco
from gradeclip_ft.data.processes import in_foreign_worker
from gradeclip_ft.data.shapes_captions import caption_scene
from gradeclip_ft.data.shapes_draw import Drawing, boxes_of, draw_scene, to_jpeg
from gradeclip_ft.data.shapes_scene import (
    COUNTS,
    TEXTURES,
    Scene,
    sample_scene,
    stuff_names,
    thing_names,
)

Split = Literal["train", "val", "pretrain"]
STREAMS: dict[Split, int] = {"train": 0, "val": 1, "pretrain": 2}
"""Each split has random numbers of its own; `pretrain` is what the packaged model saw."""

EASY = (0.55, 0.25, 0.12, 0.08)
"""Shares of 1 to 4 objects in `pretrain`: a small model learns shapes where one stands alone."""

SHARD_SIZE = 1000
LEAST_SHARDS = 8
CAPTIONS: dict[Split, int] = {"train": 1, "val": 5, "pretrain": 4}
LEAST_VISIBLE = 0.6
"""Share of every object's own area that must stay uncovered, else the scene is drawn anew."""

STAMP = "stamp.json"


@dataclass(frozen=True)
class Sample:
    """One scene, drawn and described; `CAPTIONS` says how many sentences each split has."""

    key: str
    seed: int
    scene: Scene
    drawing: Drawing
    captions: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """What the sample's .json holds; boxes are xywh in pixels around the visible part."""
        boxes = boxes_of(self.drawing.owner, len(self.scene.things))
        objects = [
            {"colour": thing.colour, "shape": thing.shape, "size": thing.size, "box": list(box)}
            for thing, box in zip(self.scene.things, boxes, strict=True)
        ]
        return {
            "key": self.key,
            "caption": self.captions[0],
            "objects": objects,
            "background": self.scene.background.texture,
            "seed": self.seed,
        }


def make_shapes(
    folder: str | Path, *, train: int, val: int, seed: int, workers: int = 2, image_size: int = 64
) -> None:
    """Writes the shapes world below `folder`, or does nothing when it already stands there.

    A stamp file holds the parameters and a hash of the generator. Other parameters mean a new
    build, which takes the place of the old one at the end; an interrupted build leaves nothing
    behind in `folder`.

    Args:
        folder: Ours alone; its old content is deleted on a rebuild.
        train: Number of training scenes.
        val: Number of evaluation scenes.
        seed: Names one world.
        workers: Processes that draw.
        image_size: Pixels per side.

    Raises:
        ValueError: A count, the size or the number of workers makes no sense.
        FileExistsError: The folder holds files that are not from here.
    """
    least = {"train": 1, "val": 1, "workers": 1, "image_size": 32}
    given = {"train": train, "val": val, "workers": workers, "image_size": image_size}
    for name, got in given.items():
        if got < least[name]:
            raise ValueError(f"{name} is {got}; it must be at least {least[name]}")
    target = Path(folder)
    stamp = _stamp(train=train, val=val, seed=seed, image_size=image_size)
    if _is_current(target, stamp):
        return
    if target.exists() and any(target.iterdir()) and not (target / STAMP).is_file():
        raise FileExistsError(
            f"{target} is not empty and has no {STAMP}, so it was not written by make_shapes; "
            "name another folder, or empty this one yourself"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as aside:
        fresh = Path(aside) / "fresh"
        _write_shards(fresh, {"train": train, "val": val}, seed, image_size, workers)
        _write_annotations(fresh, val, seed, image_size)
        (fresh / STAMP).write_text(json.dumps(stamp, indent=1))
        _replace(target, fresh, Path(aside) / "old", stamp)


def make_sample(seed: int, split: Split, index: int, image_size: int = 64) -> Sample:
    """Sample number `index` of a split, the same on every machine and in any order of calls."""
    random = np.random.default_rng((seed, STREAMS[split], index))
    while True:
        scene = sample_scene(random, EASY if split == "pretrain" else COUNTS)
        drawing = draw_scene(scene, image_size)
        if min(drawing.visible) >= LEAST_VISIBLE:
            break
    captions = tuple(
        caption_scene(scene, random, held_out=split == "val") for _ in range(CAPTIONS[split])
    )
    return Sample(f"{index + 1:09d}", seed, scene, drawing, captions)


def shard_ranges(count: int) -> list[range]:
    """Sample numbers of each shard: at least 8 shards of nearly equal size, at most 1,000 each."""
    shards = max(min(LEAST_SHARDS, count), -(-count // SHARD_SIZE))
    edges = [count * k // shards for k in range(shards + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]


def _write_shards(
    folder: Path, counts: dict[Split, int], seed: int, size: int, workers: int
) -> None:
    jobs: list[tuple[Path, Split, range]] = []
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        for number, indices in enumerate(shard_ranges(count)):
            jobs.append((folder / split / f"shapes-{split}-{number:04d}.tar", split, indices))
    write = partial(_write_shard, seed=seed, image_size=size)
    if workers == 1 or in_foreign_worker():
        list(map(write, *zip(*jobs, strict=True)))
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(write, *zip(*jobs, strict=True)))


def _write_shard(path: Path, split: Split, indices: range, *, seed: int, image_size: int) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for index in indices:
            sample = make_sample(seed, split, index, image_size)
            _add(shard, f"{sample.key}.jpg", to_jpeg(sample.drawing.image))
            _add(shard, f"{sample.key}.txt", sample.captions[0].encode())
            _add(shard, f"{sample.key}.json", json.dumps(sample.record()).encode())


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    """No time and no user in the header, so equal samples give equal bytes."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))


def _write_annotations(folder: Path, count: int, seed: int, image_size: int) -> None:
    images = folder / "images_val"
    images.mkdir(parents=True)
    pictures = _pictures(images, count, seed, image_size)
    write_coco(folder / "annotations", "val", pictures, things=thing_names(), stuff=stuff_names())


def _pictures(images: Path, count: int, seed: int, image_size: int) -> Iterator[Picture]:
    """Saves each image and yields its annotations; the background is segment 0."""
    things = thing_names()
    for index in range(count):
        sample = make_sample(seed, "val", index, image_size)
        name = f"{sample.key}.jpg"
        (images / name).write_bytes(to_jpeg(sample.drawing.image))
        background = len(things) + TEXTURES.index(sample.scene.background.texture)
        classes = (background, *(things.index(thing.name) for thing in sample.scene.things))
        yield Picture(index + 1, name, sample.captions, sample.drawing.owner, classes)


def _stamp(**parameters: int) -> dict[str, Any]:
    sources = sorted(
        [*Path(__file__).parent.glob("shapes*.py"), Path(__file__).parent / "coco_write.py"]
    )
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {**parameters, "generator": digest}


def _is_current(folder: Path, stamp: dict[str, Any]) -> bool:
    path = folder / STAMP
    return path.is_file() and json.loads(path.read_text()) == stamp


def _replace(target: Path, fresh: Path, old: Path, stamp: dict[str, Any]) -> None:
    """Two renames; a second process that built the same world meanwhile is no error."""
    if _is_current(target, stamp):
        return
    if target.exists():
        target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        if not _is_current(target, stamp):
            raise
    shutil.rmtree(old, ignore_errors=True)
