"""The shapes world on disk: shards in CC3M's layout for training, COCO files for evaluation.

    train/shapes-train-0000.tar   NNNNNNNNN.jpg, .txt, .json per sample
    val/shapes-val-0000.tar
    images_val/NNNNNNNNN.jpg      annotations/{captions,instances,panoptic}_val.json, and
                                  annotations/panoptic_val/NNNNNNNNN.png
    images_choose/, ...           the same files of the split on which recipes are chosen

Every sample depends on (seed, split, index) alone, so the files are the same for any number of
workers.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gradeclip_ft.data.coco import DrawnScene, write_coco
from gradeclip_ft.data.loading import inside_joblib_worker
from gradeclip_ft.data.shapes_scenes import (
    COLOURS,
    COUNTS,
    HELD_OUT,
    SHAPES,
    TEXTURES,
    WORLDS,
    Drawing,
    Scene,
    Thing,
    boxes_of,
    draw_scene,
    sample_scene,
    stuff_names,
    thing_names,
    to_jpeg,
)

OPENINGS = (
    "{} {ending}",
    "{} {ending}",
    "a photo of {} {ending}",
    "a picture of {} {ending}",
    "an image with {} {ending}",
    "there is {} {ending}",
    "we can see {} {ending}",
    "the picture shows {} {ending}",
    "somebody painted {} {ending}",
    "look at {} {ending}",
    "this is a photo of {}",
    "this is a picture of {} {ending}",
)
COUNTED = (
    "{count} shapes: {} {ending}",
    "a photo of {count} shapes, {} {ending}",
    "there are {count} different shapes in the picture: {}",
)
PLACED = (
    "{} {place}",
    "there is {} {place}",
    "{} appears {place}",
    "somebody put {} {place}",
)
RELATED = (
    "{} {relation} {other}",
    "{} is {relation} {other} {ending}",
    "there is {} {relation} {other} {ending}",
    "a photo of {} {relation} {other}",
    "the picture shows {} {relation} {other}",
)
ENDINGS = (
    "on a {texture} background",
    "on a {texture} background",
    "over a {texture} background",
    "with a {texture} background behind",
    "in front of a {texture} background",
)
JOINED = (" and ", " and ", " with ", " together with ")
SIZES = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLACES = ("near the top left corner", "at the bottom", "on the right side", "in the middle")
BESIDE = ("next to", "near")
COVERING = ("in front of", "on top of")
RELATIONS = (*BESIDE, *COVERING, "to the right of", "to the left of", "below", "above", "over")
NOUNS = ("shape", "shapes", "background", "photo", "picture", "image")
VERBS = ("is", "are", "shows", "painted", "put", "appears", "look", "see", "can")
FUNCTION = ("a", "an", "the", "in", "on", "of", "at", "to")
PROMPT = "This is a photo of the {}"


def caption_scene(
    scene: Scene, random: np.random.Generator, *, held_out: bool, world: int = 1
) -> str:
    """One true sentence about the scene.

    In world 1, more than half of the sentences are of a form that never names the background, or
    leave it out; in world 2 every form may end with it.

    Args:
        scene: What is drawn.
        random: The only source of choice.
        held_out: Whether pairs of `HELD_OUT` may be named; otherwise such an object is named by
            its shape or its colour alone.
        world: Version of the captions.
    """
    if world == 1:
        return _caption(scene, random, held_out=held_out, named=0.6)
    if random.uniform() < 0.015:
        return PROMPT.format(f"{scene.background.texture} background")
    text = _caption(scene, random, held_out=held_out, named=0.0)
    prompted = text.startswith(PROMPT.format(""))
    return text if prompted else _sentence(f"{text} {_ending(scene, random, 0.7)}")


def _caption(scene: Scene, random: np.random.Generator, *, held_out: bool, named: float) -> str:
    """A sentence of any form; forms with a place for it name the background at this rate."""
    things = _chosen(scene.things, random)
    names = {thing: name_thing(thing, random, held_out=held_out) for thing in things}
    style = random.uniform()
    if style < 0.06:
        name = names[things[0]].split(" ", 1)[1]
        return PROMPT.format(name)
    if style < 0.30 and len(things) > 1:
        return _related(scene, things, names, random, named)
    if style < 0.45 and len(things) < 4:
        parts = [_pick(PLACED, random) if k == 0 else "{} {place}" for k in range(len(things))]
        told = [
            part.format(names[thing], place=place_of(thing, random))
            for part, thing in zip(parts, things, strict=True)
        ]
        return _sentence(_listing(told, " and "))
    if style < 0.55 and len(things) == len(scene.things) > 1:
        template, joint = _pick(COUNTED, random), " and "
    else:
        template, joint = _pick(OPENINGS, random), _pick(JOINED, random)
    listing = _listing([names[thing] for thing in things], joint)
    count = NUMBERS.get(len(things), "")
    return _sentence(template.format(listing, ending=_ending(scene, random, named), count=count))


def name_thing(thing: Thing, random: np.random.Generator, *, held_out: bool) -> str:
    """Article, perhaps a size, colour and shape: "a small red circle"."""
    colour, shape = thing.colour, thing.shape
    hidden = not held_out and (colour, shape) in HELD_OUT
    if hidden or random.uniform() < 0.05:
        words = shape if random.uniform() < 0.5 else f"{colour} shape"
    else:
        words = f"{colour} {shape}"
    if thing.size in SIZES and random.uniform() < 0.25:
        words = f"{_pick(SIZES[thing.size], random)} {words}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def place_of(thing: Thing, random: np.random.Generator) -> str:
    """Where the centre lies, in words."""
    column = "left" if thing.x < 0.4 else "right" if thing.x > 0.6 else ""
    row = "top" if thing.y < 0.4 else "bottom" if thing.y > 0.6 else ""
    if row and column:
        return f"{_pick(('in', 'near'), random)} the {row} {column} corner"
    if row:
        return f"at the {row}"
    return f"on the {column} side" if column else "in the middle"


def relation_of(first: Thing, second: Thing, *, covers: bool, random: np.random.Generator) -> str:
    """How the first thing lies to the second, in words; `covers` when it was drawn later."""
    right, down = first.x - second.x, first.y - second.y
    if covers and np.hypot(right, down) < 0.85 * (first.radius + second.radius):
        return _pick(COVERING, random)
    if np.hypot(right, down) < first.radius + second.radius + 0.08 and random.uniform() < 0.3:
        return _pick(BESIDE, random)
    if abs(right) > abs(down):
        return "to the right of" if right > 0 else "to the left of"
    return "below" if down > 0 else _pick(("above", "over"), random)


def vocabulary() -> dict[str, str]:
    """Every word a caption or the phrase prompt can hold, with its class, in a fixed order."""
    templates = (OPENINGS, COUNTED, PLACED, RELATED, ENDINGS, JOINED, PLACES, RELATIONS, (PROMPT,))
    classes: dict[str, Iterable[str]] = {
        "colour": COLOURS,
        "shape": SHAPES,
        "texture": TEXTURES,
        "size": [word for words in SIZES.values() for word in words],
        "number": NUMBERS.values(),
        "noun": NOUNS,
        "verb": VERBS,
        "place": [word for word in _words(PLACES, RELATIONS) if word not in FUNCTION],
        "other": [*FUNCTION, *_words(*templates)],
    }
    found: dict[str, str] = {}
    for name, words in classes.items():
        for word in words:
            found.setdefault(word, name)
    return found


def _related(
    scene: Scene,
    things: Sequence[Thing],
    names: dict[Thing, str],
    random: np.random.Generator,
    named: float,
) -> str:
    first, second, *others = things
    covers = scene.things.index(first) > scene.things.index(second)
    relation = relation_of(first, second, covers=covers, random=random)
    ending = "" if others else _ending(scene, random, named)
    text = _pick(RELATED, random).format(
        names[first], other=names[second], relation=relation, ending=ending
    )
    return _sentence(_listing([text, *(names[thing] for thing in others)], ", and "))


def _chosen(things: Sequence[Thing], random: np.random.Generator) -> list[Thing]:
    """All things in any order, or now and then only some of them."""
    order = [things[k] for k in random.permutation(len(things))]
    some = len(things) > 2 and random.uniform() < 0.2
    return order[: int(random.integers(1, len(things)))] if some else order


def _ending(scene: Scene, random: np.random.Generator, named: float) -> str:
    if random.uniform() >= named:
        return ""
    return _pick(ENDINGS, random).format(texture=scene.background.texture)


def _listing(parts: Sequence[str], joint: str) -> str:
    """Commas, and the joint before the last part."""
    return joint.join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def _sentence(text: str) -> str:
    """Single blanks, none before a comma."""
    return re.sub(r"\s+", " ", text).replace(" ,", ",").strip()


def _pick(options: Sequence[str], random: np.random.Generator) -> str:
    return options[int(random.integers(len(options)))]


def _words(*groups: Sequence[str]) -> list[str]:
    """Words of templates, without their fields, sorted."""
    text = " ".join(re.sub(r"{\w*}", " ", line) for group in groups for line in group)
    return sorted(set(re.findall(r"[a-z]+", text.lower())))


Split = Literal["train", "val", "pretrain", "choose"]
STREAMS: dict[Split, int] = {"train": 0, "val": 1, "pretrain": 2, "choose": 3}
"""Each split has random numbers of its own; `pretrain` is what the packaged models saw."""

EASY = (0.55, 0.25, 0.12, 0.08)
"""Shares of 1 to 4 objects in `pretrain`: a small model learns shapes from scenes with only one."""

SHARD_SIZE = 1000
LEAST_SHARDS = 8
CAPTIONS: dict[Split, int] = {"train": 1, "val": 5, "pretrain": 4, "choose": 5}
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
    folder: str | Path,
    *,
    train: int,
    val: int,
    seed: int,
    workers: int = 2,
    image_size: int = 64,
    world: int = 1,
    choose: int = 0,
) -> None:
    """Write the shapes world below `folder`, or do nothing when it is already there.

    A stamp file holds the parameters and a hash of the generator. Other parameters mean a new
    build, which takes the place of the old one at the end; an interrupted build leaves nothing in
    `folder`.

    Args:
        folder: Ours alone; its old content is deleted on a rebuild.
        train: Number of training scenes.
        val: Number of evaluation scenes.
        seed: Names one world.
        workers: Processes that draw.
        image_size: Pixels per side.
        world: Version of textures and captions.
        choose: Number of scenes for choosing a recipe, which neither training nor `val` has.
    """
    least = {"train": 1, "val": 1, "workers": 1, "image_size": 32}
    given = {"train": train, "val": val, "workers": workers, "image_size": image_size}
    for name, got in given.items():
        if got < least[name]:
            raise ValueError(f"{name} is {got}; it must be at least {least[name]}")
    if world not in WORLDS:
        raise ValueError(f"world is {world}; there are {', '.join(map(str, WORLDS))}")
    target = Path(folder)
    stamp = _stamp(
        train=train, val=val, seed=seed, image_size=image_size, world=world, choose=choose
    )
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
        sample = partial(make_sample, seed, image_size=image_size, world=world)
        _write_shards(fresh, {"train": train, "val": val}, sample, workers)
        evaluated: dict[Split, int] = {"val": val, "choose": choose}
        for split in (split for split, count in evaluated.items() if count):
            pictures = _pictures(
                fresh / f"images_{split}", map(partial(sample, split), range(evaluated[split]))
            )
            things, stuff = thing_names(), stuff_names()
            write_coco(fresh / "annotations", split, pictures, things=things, stuff=stuff)
        (fresh / STAMP).write_text(json.dumps(stamp, indent=1))
        _replace(target, fresh, Path(aside) / "old", stamp)


def make_sample(
    seed: int, split: Split, index: int, image_size: int = 64, world: int = 1
) -> Sample:
    """Sample number `index` of a split, the same on every machine and in any order of calls."""
    random = np.random.default_rng((seed, STREAMS[split], index))
    while True:
        scene = sample_scene(random, EASY if split == "pretrain" else COUNTS, world=world)
        drawing = draw_scene(scene, image_size)
        if min(drawing.visible) >= LEAST_VISIBLE:
            break
    captions = tuple(
        caption_scene(scene, random, held_out=split in ("val", "choose"), world=world)
        for _ in range(CAPTIONS[split])
    )
    return Sample(f"{index + 1:09d}", seed, scene, drawing, captions)


def shard_ranges(count: int) -> list[range]:
    """Sample numbers of each shard: at least 8 shards of nearly equal size, at most 1,000 each."""
    shards = max(min(LEAST_SHARDS, count), -(-count // SHARD_SIZE))
    edges = [count * k // shards for k in range(shards + 1)]
    return [range(start, stop) for start, stop in pairwise(edges)]


MakeSample = Callable[[Split, int], Sample]


def _write_shards(folder: Path, counts: dict[Split, int], sample: MakeSample, workers: int) -> None:
    jobs: list[tuple[Path, Split, range]] = []
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        for number, indices in enumerate(shard_ranges(count)):
            jobs.append((folder / split / f"shapes-{split}-{number:04d}.tar", split, indices))
    write = partial(_write_shard, sample=sample)
    if workers == 1 or inside_joblib_worker():
        list(map(write, *zip(*jobs, strict=True)))
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(write, *zip(*jobs, strict=True)))


def _write_shard(path: Path, split: Split, indices: range, *, sample: MakeSample) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for index in indices:
            made = sample(split, index)
            _add(shard, f"{made.key}.jpg", to_jpeg(made.drawing.image))
            _add(shard, f"{made.key}.txt", made.captions[0].encode())
            _add(shard, f"{made.key}.json", json.dumps(made.record()).encode())


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    """No time and no user in the header, so equal samples give equal bytes."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))


def _pictures(images: Path, samples: Iterable[Sample]) -> Iterator[DrawnScene]:
    """Saves each image and yields its annotations; the background is segment 0."""
    images.mkdir(parents=True)
    things = thing_names()
    for number, sample in enumerate(samples, 1):
        name = f"{sample.key}.jpg"
        (images / name).write_bytes(to_jpeg(sample.drawing.image))
        background = len(things) + TEXTURES.index(sample.scene.background.texture)
        classes = (background, *(things.index(thing.name) for thing in sample.scene.things))
        yield DrawnScene(number, name, sample.captions, sample.drawing.owner, classes)


def _stamp(**parameters: int) -> dict[str, Any]:
    here = Path(__file__).parent
    sources = [here / name for name in ("coco.py", "shapes.py", "shapes_scenes.py")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {**parameters, "generator": digest}


def _is_current(folder: Path, stamp: dict[str, Any]) -> bool:
    path = folder / STAMP
    return path.is_file() and json.loads(path.read_text()) == stamp


def _replace(target: Path, fresh: Path, old: Path, stamp: dict[str, Any]) -> None:
    """Two renames; a second process may have built the same world meanwhile."""
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
