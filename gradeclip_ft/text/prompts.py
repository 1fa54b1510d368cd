"""Sentences around a name: the prompt of a phrase, and the 63 templates of ViLD for class names.

The templates are those of ViLD (Apache-2.0), in its order; so are the rules for names, articles
and "This is".
"""

from __future__ import annotations

import re

SCENE = (
    "There is {a} {}",
    "There is the {}",
    *(f"a photo of {x} {{}}" for x in ("{a}", "the", "one")),
)
PHOTO = (
    *(f"itap of {x} {{}}." for x in ("{a}", "my", "the")),
    *(f"a photo of {x} {{}}." for x in ("{a}", "my", "the", "one", "many")),
    *(f"a {kind} photo of {x} {{}}." for kind in ("good", "bad") for x in ("{a}", "the")),
)
LOOKS = ("nice", "cool", "weird", "small", "large", "clean", "dirty")
OBJECT = tuple(f"a photo of {x} {look} {{}}." for look in LOOKS for x in ("a", "the"))
KINDS = ("low resolution", "cropped", "close-up", "jpeg corrupted", "blurry", "pixelated")
QUALITY = (
    *(f"a {kind} photo of {x} {{}}." for kind in ("bright", "dark") for x in ("{a}", "the")),
    *(f"a photo of {x} hard to see {{}}." for x in ("a", "the")),
    *(f"a {kind} photo of {x} {{}}." for kind in KINDS for x in ("{a}", "the")),
    *(f"a black and white photo of {x} {{}}." for x in ("the", "{a}")),
)
MEDIUM = (
    *(
        f"{x} {kind} {{}}."
        for kind in ("plastic", "toy", "plushie", "cartoon")
        for x in ("a", "the")
    ),
    *("an embroidered {}.", "the embroidered {}."),
    *("a painting of the {}.", "a painting of a {}."),
)
VILD = (*(f"{scene} in the scene." for scene in SCENE), *PHOTO, *OBJECT, *QUALITY, *MEDIUM)

TCL = (
    *("itap of a {}.", "a bad photo of a {}.", "a origami {}.", "a photo of the large {}."),
    *("a {} in a video game.", "art of the {}.", "a photo of the small {}."),
    *("a photo of many {}.", "a photo of {}s."),
)
"""The nine sentences of TCL (Cha et al., 2023), which TIPS measures segmentation with."""


def fill(template: str, name: str) -> str:
    """A class name in a template, by the rules of ViLD.

    >>> fill("a photo of {a} {}.", "Orange/mandarin_orange")
    'This is a photo of an orange or mandarin orange.'
    """
    name = readable_name(name)
    text = template.replace("{a}", article(name)).replace("{}", name)
    return f"This is {text}" if text.startswith(("a", "the")) else text


def readable_name(name: str) -> str:
    """A class name as one would say it; "-merged", "-stuff" and "-other" stay.

    >>> readable_name("Door-stuff."), readable_name("traffic_light")
    ('door-stuff', 'traffic light')
    """
    return name.replace("_", " ").replace("/", " or ").lower().rstrip(".")


def article(name: str) -> str:
    """The indefinite article, by the first letter alone."""
    return "an" if name.startswith(tuple("aeiou")) else "a"


def phrase_prompt(template: str, phrase: str) -> str:
    """A phrase in its prompt; its own article replaces that of the prompt.

    >>> phrase_prompt("This is a photo of the {}", "black car")
    'This is a photo of the black car'
    >>> phrase_prompt("a photo of a {}", "the bear")
    'a photo of the bear'

    Raises:
        ValueError: The template does not have exactly one place for the phrase.
    """
    if template.count("{}") != 1:
        raise ValueError(
            f"prompt {template!r} has {template.count('{}')} places for the phrase; write {{}} once"
        )
    if re.match(r"(an?|the)\s", phrase, re.IGNORECASE):
        template = re.sub(r"\b(an?|the)\s+(?=\{\})", "", template, flags=re.IGNORECASE)
    return template.replace("{}", phrase)
