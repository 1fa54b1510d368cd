"""ImageNet's 1,000 class names and 80 templates, as open_clip curates them."""

from __future__ import annotations

from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES


def imagenet_names() -> list[str]:
    """Class names in the order of the sorted WordNet ids, which name the folders of the images."""
    return list(IMAGENET_CLASSNAMES)


def imagenet_templates() -> tuple[str, ...]:
    """The 80 templates with `{}` for the class name."""
    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
