"""The quick tagger and the quick way to words against NLTK's own."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import nltk
import numpy as np
import pytest

from gradeclip_ft.text.perceptron import Perceptron
from gradeclip_ft.text.phrases import Phrases, Tagger, load_tagger

TAGS = ["DT", "JJ", "NN", "NNS", "VBG", "IN"]
WORDS = ["a", "red", "traffic", "lights", "running", "1984", "7", "t-shirt", "-", "Dog", ""]


def trained_by_nltk(seed: int) -> nltk.PerceptronTagger:
    """NLTK's own training on random sentences; its features, rounding and tag dictionary."""
    generator = np.random.default_rng(seed)
    sentences = [
        [
            (str(generator.choice(WORDS[:-1])), str(generator.choice(TAGS)))
            for _ in range(generator.integers(1, 12))
        ]
        for _ in range(80)
    ]
    tagger = nltk.PerceptronTagger(load=False)
    tagger.train(sentences, nr_iter=3)
    return tagger


@pytest.mark.parametrize("seed", range(3))
def test_tags_are_those_of_nltk(seed: int) -> None:
    """Would catch a feature that is left out, misnamed, or taken from the wrong neighbour."""
    theirs = trained_by_nltk(seed)
    ours = Perceptron(theirs.model.weights, theirs.tagdict, sorted(theirs.model.classes))
    generator = np.random.default_rng(seed + 100)
    for _ in range(200):
        tokens = [str(word) for word in generator.choice(WORDS, generator.integers(0, 15))]
        assert ours.tag(tokens) == theirs.tag(tokens)


def test_weights_of_other_precision_are_refused() -> None:
    """Would catch rounding that nobody asked for."""
    with pytest.raises(ValueError, match="three decimals"):
        Perceptron({"bias": {"NN": 0.12345}}, {}, ["NN"])


def test_real_captions_are_tagged_as_by_nltk(shared_dir: Path, real_tagger: Tagger) -> None:
    """The published weights on 1,500 human captions, word by word."""
    theirs, tokenizer = nltk.PerceptronTagger(), nltk.NLTKWordTokenizer()
    captions = human_captions(shared_dir)
    assert len(captions) == 1500
    for caption in captions:
        tokens = tokenizer.tokenize(caption.lower())
        assert real_tagger.tag(tokens) == theirs.tag(tokens)


@pytest.mark.parametrize(
    "text",
    [
        "a dog, a cat and two birds.",
        "a dog , a cat .",
        "a 3-year-old in a t-shirt",
        "he cannot lemme go",
        "gonna wanna gotta",
        "1,000 birds",
        "a,b",
        "dog.",
        "the end. of it.",
        "a -- b",
        "u.s. army",
        "the dog's bowl",
        "don't",
        "",
        ".",
    ],
)
def test_words_are_those_of_the_treebank(text: str) -> None:
    """Would catch a caption that the quick way splits otherwise."""
    assert_same_words(text)


def test_words_of_real_captions_are_those_of_the_treebank(shared_dir: Path) -> None:
    for caption in human_captions(shared_dir):
        assert_same_words(" ".join(caption.lower().split()).replace(". ", " . "))


def assert_same_words(text: str) -> None:
    seen: list[list[str]] = []
    recorder = _Recorder(lambda tokens: seen.append(list(tokens)))
    Phrases(recorder, 5)(text)
    expected = nltk.NLTKWordTokenizer().tokenize(text.replace("end. of", "end . of"))
    assert seen == [expected]


class _Recorder:
    """A tagger that tells what it is given."""

    name = "recorder"

    def __init__(self, tell: Callable[[list[str]], None]) -> None:
        self._tell = tell

    def tag(self, tokens: list[str]) -> list[tuple[str, str]]:
        self._tell(tokens)
        return load_tagger("textblob").tag(tokens)


def human_captions(shared_dir: Path) -> list[str]:
    with tarfile.open(shared_dir / "data/flickr_photos/photos-0000.tar") as shard:
        names = [member for member in shard if member.name.endswith(".json")]
        samples = [json.load(shard.extractfile(m)) for m in names]  # type: ignore[arg-type]
    return [caption for sample in samples for caption in sample["captions"]][:1500]
