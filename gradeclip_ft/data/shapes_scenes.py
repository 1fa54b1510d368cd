"""Scenes of the shapes world: what is where, in which colour, on which background, and pictures.

A scene is a plain description in units of the image side; `draw_scene` turns it into pixels. A
colour and a shape together are a class ("red circle"): 8 x 8 thing classes, plus one stuff class
per texture.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (246, 136, 24),
    "yellow": (245, 226, 40),
    "green": (34, 152, 52),
    "cyan": (40, 206, 218),
    "blue": (38, 66, 206),
    "purple": (146, 42, 176),
    "black": (22, 22, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "arrow", "crescent")
TEXTURES = ("plain", "striped", "spotty", "plaid", "zigzag")

HELD_OUT = frozenset(
    {
        ("red", "heart"),
        ("orange", "triangle"),
        ("green", "arrow"),
        ("blue", "star"),
        ("purple", "square"),
        ("black", "crescent"),
    }
)
"""Pairs that training scenes show but no training caption names together."""

SMALL, LARGE = 0.16, 0.2
"""Radii in image sides below and above which an object may be called small or large."""

RADII = (0.13, 0.23)
COUNTS = (0.12, 0.30, 0.33, 0.25)
"""Share of scenes with 1, 2, 3 and 4 objects."""

WORLDS = (1, 2)
"""Versions; 2 has stronger, finer textures, and two of three captions name the background."""

MAX_TRIES = 200


@dataclass(frozen=True)
class Thing:
    """One coloured shape.

    Attributes:
        colour: A key of `COLOURS`.
        shape: One of `SHAPES`.
        x: Centre from the left, in image sides.
        y: Centre from the top, in image sides.
        radius: In image sides.
        angle: Rotation in radians.
        tint: What is added to the named colour, in grey levels.
    """

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    angle: float
    tint: tuple[float, float, float]

    @property
    def name(self) -> str:
        """Class name, "red circle"."""
        return f"{self.colour} {self.shape}"

    @property
    def size(self) -> str:
        """The word a caption may use: small, medium or large."""
        return "small" if self.radius < SMALL else "large" if self.radius > LARGE else "medium"


@dataclass(frozen=True)
class Background:
    """A texture of two muted tones.

    Attributes:
        texture: One of `TEXTURES`.
        tones: Two RGB colours in grey levels.
        period: Length of the pattern in image sides.
        angle: Direction in radians.
        phase: Shift of the pattern, in periods.
    """

    texture: str
    tones: tuple[tuple[float, float, float], tuple[float, float, float]]
    period: float
    angle: float
    phase: tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """Things from back to front on a background."""

    background: Background
    things: tuple[Thing, ...]


def thing_names() -> list[str]:
    """The 64 thing classes, in the order of their ids."""
    return [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def stuff_names() -> list[str]:
    """The stuff classes, in the order of their ids, which follow the things'."""
    return [f"{texture} background" for texture in TEXTURES]


def sample_scene(
    random: np.random.Generator, shares: tuple[float, ...] = COUNTS, *, world: int = 1
) -> Scene:
    """One scene with different classes, whose objects may overlap at their rims.

    Centres are at least 0.72 times the sum of both radii apart, so most of each object stays
    visible as a rule.

    Args:
        random: The only source of choice.
        shares: Share of scenes with 1, 2, ... objects.
        world: Version of the backgrounds.
    """
    count = 1 + int(random.choice(len(shares), p=shares))
    for _ in range(MAX_TRIES):
        places = _places(random, count)
        if places is not None:
            break
    else:
        raise RuntimeError(
            f"no room for {count} objects after {MAX_TRIES} tries; use smaller RADII"
        )
    colours, kinds = list(COLOURS), list(SHAPES)
    pairs = random.choice(len(colours) * len(kinds), size=count, replace=False)
    things = tuple(
        Thing(
            colours[pair // len(kinds)],
            kinds[pair % len(kinds)],
            *place,
            angle=float(random.uniform(-0.2, 0.2)),
            tint=_triple(random.uniform(-16, 16, 3)),
        )
        for pair, place in zip(pairs, places, strict=True)
    )
    return Scene(_background(random) if world == 1 else _strong_background(random), things)


def _places(random: np.random.Generator, count: int) -> list[tuple[float, float, float]] | None:
    """Centres and radii (x, y, radius), or None when the last objects found no room."""
    places: list[tuple[float, float, float]] = []
    for _ in range(count):
        for _ in range(20):
            radius = float(random.uniform(*RADII))
            x, y = (float(value) for value in random.uniform(radius, 1 - radius, 2))
            if all(np.hypot(x - a, y - b) > 0.72 * (radius + r) for a, b, r in places):
                places.append((x, y, radius))
                break
        else:
            return None
    return places


def _background(random: np.random.Generator) -> Background:
    base = random.uniform(150, 225) + random.uniform(-14, 14, 3)
    other = base + random.choice((-1, 1)) * random.uniform(22, 34) + random.uniform(-6, 6, 3)
    return Background(
        texture=str(random.choice(TEXTURES)),
        tones=(_triple(base), _triple(other)),
        period=float(random.uniform(0.14, 0.26)),
        angle=float(random.uniform(0, np.pi)),
        phase=(float(random.uniform()), float(random.uniform())),
    )


def _strong_background(random: np.random.Generator) -> Background:
    """Two tones far apart on both sides of a middle one, and a pattern of one to two patches."""
    middle = random.uniform(150, 190) + random.uniform(-14, 14, 3)
    apart = random.choice((-1, 1)) * random.uniform(27, 40) + random.uniform(-6, 6, 3)
    return Background(
        texture=str(random.choice(TEXTURES)),
        tones=(_triple(middle - apart), _triple(middle + apart)),
        period=float(random.uniform(0.09, 0.15)),
        angle=float(random.uniform(0, np.pi)),
        phase=(float(random.uniform()), float(random.uniform())),
    )


def _triple(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    first, second, third = (float(np.clip(value, -255, 255)) for value in values)
    return first, second, third


FINER = 2


@dataclass(frozen=True)
class Drawing:
    """Pixels and what they show.

    Attributes:
        image: RGB picture, square.
        owner: (size, size) array; 0 is background, k is the k-th thing of the scene. A pixel
            belongs to whatever covers most of it.
        visible: Share of each thing's own area that nothing covers.
    """

    image: Image.Image
    owner: NDArray[np.uint8]
    visible: tuple[float, ...]


def draw_scene(scene: Scene, size: int) -> Drawing:
    """The things over the background, each covering those before it."""
    fine = size * FINER
    canvas = draw_background(scene.background, fine)
    owner = np.zeros((fine, fine), np.uint8)
    areas = []
    for number, thing in enumerate(scene.things, start=1):
        mask = _mask(thing, fine)
        areas.append(max(int(mask.sum()), 1))
        canvas[mask] = np.clip(np.add(COLOURS[thing.colour], thing.tint), 0, 255)
        owner[mask] = number
    blocks = canvas.reshape(size, FINER, size, FINER, 3).mean((1, 3))
    image = Image.fromarray(np.rint(blocks).clip(0, 255).astype(np.uint8), "RGB")
    seen = np.bincount(owner.ravel(), minlength=len(areas) + 1)[1:]
    visible = tuple(float(count / area) for count, area in zip(seen, areas, strict=True))
    return Drawing(image, _coarse(owner, size, len(areas)), visible)


def draw_background(background: Background, size: int) -> NDArray[np.float32]:
    """The texture alone, (size, size, 3) in grey levels."""
    across, along = _waves(background, size)
    share: NDArray[np.floating]
    match background.texture:
        case "plain":
            share = np.zeros_like(across)
        case "striped":
            share = (across % 1 < 0.5).astype(np.float32)
        case "spotty":
            share = ((across % 1 - 0.5) ** 2 + (along % 1 - 0.5) ** 2 < 0.3**2).astype(np.float32)
        case "plaid":
            share = ((across % 1 < 0.5).astype(np.float32) + (along % 1 < 0.5)) / 2
        case "zigzag":
            share = ((across + np.abs(along % 1 - 0.5)) % 1 < 0.5).astype(np.float32)
        case unknown:
            raise ValueError(f"texture {unknown!r} cannot be drawn; add it to draw_background")
    first, second = (np.asarray(tone, np.float32) for tone in background.tones)
    return (first + share[..., None] * (second - first)).astype(np.float32)


def boxes_of(owner: NDArray[np.uint8], count: int) -> list[tuple[int, int, int, int]]:
    """Tight xywh boxes in pixels around the visible part of things 1 to `count`."""
    boxes = []
    for number in range(1, count + 1):
        rows, columns = np.nonzero(owner == number)
        left, top = int(columns.min()), int(rows.min())
        boxes.append((left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1))
    return boxes


def to_jpeg(image: Image.Image) -> bytes:
    """JPEG without chroma subsampling: colours are the subject here."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _mask(thing: Thing, fine: int) -> NDArray[np.bool_]:
    cosine, sine = np.cos(thing.angle), np.sin(thing.angle)
    turned = outline(thing.shape) @ np.array([[cosine, sine], [-sine, cosine]])
    points = (turned * thing.radius + (thing.x, thing.y)) * fine
    picture = Image.new("1", (fine, fine))
    ImageDraw.Draw(picture).polygon([(x, y) for x, y in points.tolist()], fill=1)
    return np.asarray(picture)


@lru_cache(maxsize=16)
def outline(shape: str) -> NDArray[np.float64]:
    """Corners (x right, y down) of a shape of radius about 1, (K, 2)."""
    match shape:
        case "circle":
            return _arc(0.0, 2 * np.pi, 32)
        case "square":
            return 0.84 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
        case "triangle":
            return np.array([(0, -1), (1.06, 0.86), (-1.06, 0.86)])
        case "star":
            corners = _arc(-np.pi / 2, 1.5 * np.pi, 11)[:10]
            corners[1::2] *= 0.42
            return 1.1 * corners
        case "heart":
            t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            height = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
            return np.stack([16 * np.sin(t) ** 3, -height - 2], 1) / 16
        case "diamond":
            return np.array([(0, -1.12), (0.7, 0), (0, 1.12), (-0.7, 0)])
        case "arrow":
            upper = np.array([(-1.05, -0.32), (0.1, -0.32), (0.1, -0.85), (1.1, 0)])
            return np.concatenate([upper, upper[2::-1] * (1, -1)])
        case "crescent":
            outer, inner = (
                _arc(0.25 * np.pi, 1.75 * np.pi, 28),
                _arc(1.67 * np.pi, 0.33 * np.pi, 20),
            )
            return 1.1 * np.concatenate([outer, 0.82 * inner + (0.3, 0)])
        case unknown:
            raise ValueError(f"shape {unknown!r} has no outline; add it to outline()")


def _arc(start: float, stop: float, count: int) -> NDArray[np.float64]:
    t = np.linspace(start, stop, count)
    return np.stack([np.cos(t), np.sin(t)], 1)


def _waves(background: Background, size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Pattern coordinates, in periods, across and along the direction of the texture."""
    steps = ((np.arange(size, dtype=np.float32) + 0.5) / size) / background.period
    x, y = steps[None, :], steps[:, None]
    cosine, sine = np.float32(np.cos(background.angle)), np.float32(np.sin(background.angle))
    across = x * cosine + y * sine + np.float32(background.phase[0]) + 16
    along = y * cosine - x * sine + np.float32(background.phase[1]) + 16
    return across.astype(np.float32), along.astype(np.float32)


def _coarse(owner: NDArray[np.uint8], size: int, count: int) -> NDArray[np.uint8]:
    """Majority of every block of fine pixels; a tie goes to the lower number."""
    blocks = owner.reshape(size, FINER, size, FINER)
    votes = [(blocks == number).sum((1, 3)) for number in range(count + 1)]
    winner: NDArray[np.uint8] = np.argmax(votes, axis=0).astype(np.uint8)
    return winner
