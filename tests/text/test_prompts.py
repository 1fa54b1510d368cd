"""Prompts: the templates and the rules for names."""

import doctest

import pytest

from gradeclip_ft.text import prompts
from gradeclip_ft.text.prompts import VILD, fill, phrase_prompt


def test_there_are_63_different_templates_with_one_name_each() -> None:
    assert len(set(VILD)) == len(VILD) == 63
    assert all(template.count("{}") == 1 for template in VILD)


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(prompts).failed == 0


@pytest.mark.parametrize(
    ("template", "name", "text"),
    [
        ("There is {a} {} in the scene.", "Umbrella", "There is an umbrella in the scene."),
        ("a photo of {a} {}.", "wall-other-merged", "This is a photo of a wall-other-merged."),
        ("the toy {}.", "teddy_bear", "This is the toy teddy bear."),
        ("an embroidered {}.", "dog/cat.", "This is an embroidered dog or cat."),
        ("itap of my {}.", "hour_glass", "itap of my hour glass."),
    ],
)
def test_names_follow_vild(template: str, name: str, text: str) -> None:
    assert fill(template, name) == text


def test_a_phrase_is_put_in_as_it_stands() -> None:
    assert phrase_prompt("a photo of {}", "{a} and/or") == "a photo of {a} and/or"


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_prompt_without_one_place_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"write \{\} once"):
        phrase_prompt(template, "dog")


@pytest.mark.parametrize(
    ("template", "phrase", "prompt"),
    [
        ("a photo of a {}", "a bear", "a photo of a bear"),
        ("a photo of a {}", "The bear", "a photo of The bear"),
        ("This is a photo of the {}", "an  apple", "This is a photo of an  apple"),
        ("The {} in a photo of the sea", "a bear", "a bear in a photo of the sea"),
        ("a photo of a {}", "apple", "a photo of a apple"),
        ("a photo of a {}", "another bear", "a photo of a another bear"),
        ("pasta {}", "a bear", "pasta a bear"),
    ],
)
def test_an_article_of_the_phrase_replaces_that_of_the_prompt(
    template: str, phrase: str, prompt: str
) -> None:
    """Catches "a photo of a a bear"; the prompt itself is as published."""
    assert phrase_prompt(template, phrase) == prompt
