"""Sentences around a name: the prompt of a phrase, and the 63 templates of ViLD for class names.

The templates are those of ViLD (Apache-2.0), in its order; so are the rules for names, articles
and "This is".
"""

from __future__ import annotations

import re

SCENE = (
    "There is {a} {} in the scene.",
    "There is the {} in the scene.",
    "a photo of {a} {} in the scene.",
    "a photo of the {} in the scene.",
    "a photo of one {} in the scene.",
)
PHOTO = (
    "itap of {a} {}.",
    "itap of my {}.",
    "itap of the {}.",
    "a photo of {a} {}.",
    "a photo of my {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a photo of many {}.",
    "a good photo of {a} {}.",
    "a good photo of the {}.",
    "a bad photo of {a} {}.",
    "a bad photo of the {}.",
)
OBJECT = (
    "a photo of a nice {}.",
    "a photo of the nice {}.",
    "a photo of a cool {}.",
    "a photo of the cool {}.",
    "a photo of a weird {}.",
    "a photo of the weird {}.",
    "a photo of a small {}.",
    "a photo of the small {}.",
    "a photo of a large {}.",
    "a photo of the large {}.",
    "a photo of a clean {}.",
    "a photo of the clean {}.",
    "a photo of a dirty {}.",
    "a photo of the dirty {}.",
)
QUALITY = (
    "a bright photo of {a} {}.",
    "a bright photo of the {}.",
    "a dark photo of {a} {}.",
    "a dark photo of the {}.",
    "a photo of a hard to see {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of {a} {}.",
    "a low resolution photo of the {}.",
    "a cropped photo of {a} {}.",
    "a cropped photo of the {}.",
    "a close-up photo of {a} {}.",
    "a close-up photo of the {}.",
    "a jpeg corrupted photo of {a} {}.",
    "a jpeg corrupted photo of the {}.",
    "a blurry photo of {a} {}.",
    "a blurry photo of the {}.",
    "a pixelated photo of {a} {}.",
    "a pixelated photo of the {}.",
    "a black and white photo of the {}.",
    "a black and white photo of {a} {}.",
)
MEDIUM = (
    "a plastic {}.",
    "the plastic {}.",
    "a toy {}.",
    "the toy {}.",
    "a plushie {}.",
    "the plushie {}.",
    "a cartoon {}.",
    "the cartoon {}.",
    "an embroidered {}.",
    "the embroidered {}.",
    "a painting of the {}.",
    "a painting of a {}.",
)
VILD = SCENE + PHOTO + OBJECT + QUALITY + MEDIUM


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
