"""Phrases: the papers' examples, the chunk rule against NLTK's parser, odd captions."""

import json
import random
import tarfile
from pathlib import Path

import nltk
import pytest

from gradeclip_ft.text.phrases import Phrases, Tagger, chunks, load_tagger

TAGS = ["JJ", "JJR", "JJS", "NN", "NNS", "NNP", "NNPS", "DT", "VBG", "IN", "CC", "NNX", "J", "N"]


def parsed_by_nltk(tagged: list[tuple[str, str]]) -> list[str]:
    tree = nltk.RegexpParser("NP: {<JJ.*>*<NN.*>+}").parse(tagged)
    nodes = tree.subtrees(lambda node: node.label() == "NP")
    return [" ".join(word for word, _ in node.leaves()) for node in nodes]


def test_chunks_equal_nltks_regexp_parser() -> None:
    """Our rule is a regular expression over word classes; NLTK's runs over bracketed tags."""
    generator = random.Random(0)
    for length in [1, 2, 3, 5, 8, 13] * 500:
        tagged = [(f"w{i}", generator.choice(TAGS)) for i in range(length)]
        assert chunks(tagged) == parsed_by_nltk(tagged)
    assert chunks([]) == []


def test_words_without_a_letter_end_a_phrase() -> None:
    tagged = [("<", "NN"), ("person", "NN"), (">", "JJ"), ("5", "NN"), ("*", "NN")]
    assert chunks(tagged) == ["person", "5"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "A dog in a black car waiting for traffic lights.",
            ["dog", "black car", "traffic lights"],
        ),
        (
            "Beer and bananas for dinner on a Tuesday",
            ["beer", "bananas", "dinner", "tuesday"],
        ),
    ],
)
def test_published_examples(real_tagger: Tagger, caption: str, expected: list[str]) -> None:
    assert Phrases(real_tagger, 5)(caption) == expected


def test_published_examples_without_nltk_data() -> None:
    phrases = Phrases(load_tagger("textblob"), 5)
    assert phrases("a dog in a black car waiting for traffic lights") == [
        "dog",
        "black car",
        "traffic lights",
    ]


def test_duplicates_go_before_the_cap() -> None:
    phrases = Phrases(load_tagger("textblob"), 2)
    assert phrases("a dog and a Dog and a cat and a bird") == ["dog", "cat"]


def test_a_full_stop_inside_a_caption_ends_a_phrase() -> None:
    """NLTK's word tokenizer takes one sentence and leaves "dog." whole in front of a second."""
    phrases = Phrases(load_tagger("textblob"), 5)
    assert phrases("There is a dog. The cat sleeps.")[:2] == ["dog", "cat"]


@pytest.mark.parametrize("caption", ["", "   ", "and of the", "!!! ???", "\u200b", "、。"])
def test_a_caption_without_phrases_gives_none(caption: str) -> None:
    assert Phrases(load_tagger("textblob"), 5)(caption) == []


def test_no_phrases_on_request_and_no_negative_cap() -> None:
    assert Phrases(load_tagger("textblob"), 0)("a dog") == []
    with pytest.raises(ValueError, match="max_phrases is -1; use 0"):
        Phrases(load_tagger("textblob"), -1)


def test_a_megabyte_of_caption_takes_no_time() -> None:
    assert Phrases(load_tagger("textblob"), 5)("a dog and a cat " * 100_000) == ["dog", "cat"]


def test_real_captions_equal_the_straight_pipeline(shared_dir: Path, real_tagger: Tagger) -> None:
    """500 human captions through NLTK's own functions, one after the other."""
    phrases = Phrases(real_tagger, 5)
    tokenizer = nltk.NLTKWordTokenizer()
    different = 0
    with tarfile.open(shared_dir / "data/flickr_photos/photos-0000.tar") as shard:
        samples = [json.load(shard.extractfile(m)) for m in shard if m.name.endswith(".json")]  # type: ignore[arg-type]
    captions = [caption for sample in samples for caption in sample["captions"]][::3]
    for caption in captions:
        found = parsed_by_nltk(nltk.pos_tag(tokenizer.tokenize(caption.lower())))
        different += list(dict.fromkeys(found))[:5] != phrases(caption)
    assert len(captions) == 500
    assert different <= 1  # a few captions hold quotation marks that NLTK's tagger takes for nouns
