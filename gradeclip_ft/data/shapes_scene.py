"""Scenes of the shapes world: what stands where, in which colour, on which background.

A scene is a plain description in units of the image side; `shapes_draw` turns it into pixels and
`shapes_captions` into sentences. A colour and a shape together are a class ("red circle"): 8 x 8
thing classes, plus one stuff class per texture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    """The stuff classes, in the order of their ids (behind the things)."""
    return [f"{texture} background" for texture in TEXTURES]


def sample_scene(random: np.random.Generator, shares: tuple[float, ...] = COUNTS) -> Scene:
    """One scene with different classes, whose objects may overlap at their rims.

    Centres are at least 0.72 times the sum of both radii apart, so most of each object stays
    visible as a rule.

    Args:
        random: The only source of choice.
        shares: Share of scenes with 1, 2, ... objects.

    Raises:
        RuntimeError: No room was found, which the default radii and counts exclude.
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
    return Scene(_background(random), things)


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


def _triple(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    first, second, third = (float(np.clip(value, -255, 255)) for value in values)
    return first, second, third
