"""Sentences about scenes of the shapes world, from a small grammar.

Captions are true, name all or some of the objects, and hold many words that are no objects
(openings, verbs, places, sizes, counts, backgrounds), so that a tagger has real work, as on web
captions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from gradeclip_ft.data.shapes_scene import COLOURS, HELD_OUT, SHAPES, TEXTURES, Scene, Thing

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


def caption_scene(scene: Scene, random: np.random.Generator, *, held_out: bool) -> str:
    """One true sentence about the scene.

    Args:
        scene: What is drawn.
        random: The only source of choice.
        held_out: Whether pairs of `HELD_OUT` may be named; otherwise such an object is named by
            its shape or its colour alone.
    """
    things = _chosen(scene.things, random)
    names = {thing: name_thing(thing, random, held_out=held_out) for thing in things}
    style = random.uniform()
    if style < 0.06:
        name = names[things[0]].split(" ", 1)[1]
        return PROMPT.format(name)
    if style < 0.30 and len(things) > 1:
        return _related(scene, things, names, random)
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
    return _sentence(template.format(listing, ending=_ending(scene, random), count=count))


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
    scene: Scene, things: Sequence[Thing], names: dict[Thing, str], random: np.random.Generator
) -> str:
    first, second, *others = things
    covers = scene.things.index(first) > scene.things.index(second)
    relation = relation_of(first, second, covers=covers, random=random)
    ending = "" if others else _ending(scene, random)
    text = _pick(RELATED, random).format(
        names[first], other=names[second], relation=relation, ending=ending
    )
    return _sentence(_listing([text, *(names[thing] for thing in others)], ", and "))


def _chosen(things: Sequence[Thing], random: np.random.Generator) -> list[Thing]:
    """All things in any order, or now and then only some of them."""
    order = [things[k] for k in random.permutation(len(things))]
    some = len(things) > 2 and random.uniform() < 0.2
    return order[: int(random.integers(1, len(things)))] if some else order


def _ending(scene: Scene, random: np.random.Generator) -> str:
    named = random.uniform() < 0.6
    return _pick(ENDINGS, random).format(texture=scene.background.texture) if named else ""


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
