"""Relevance per token to relevance per word."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from gradeclip_ft.explain.base import explain_text
from gradeclip_ft.explain.driver import explain_sentences
from gradeclip_ft.explain.grad_eclip_deep import GradEclipDeep
from gradeclip_ft.explain.raw_attention import RawAttention
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.models.tokenizer import Tokenizer, Word

METHODS = {"grad_eclip": GradEclipDeep(8, relu_at="sum", minmax_over="visible")}


@pytest.fixture(scope="module")
def tiny() -> LoadedClip:
    return load_clip("shapes_tiny")


@pytest.fixture(scope="module")
def clip_words() -> Tokenizer:
    return Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 77)


@pytest.mark.parametrize(
    "text",
    [
        "A skateboard, naïve!",
        "ein Frühstück mit Brötchen",
        "日本 の 犬",
        "a 🙂🙂 dog",
        "   ",
    ],
)
def test_pieces_of_the_words_are_the_tokens(clip_words: Tokenizer, text: str) -> None:
    """Catches words that lose or gain a token, in any script."""
    words, cut = clip_words.words(text)
    ids = clip_words([text])
    assert sum(word.pieces for word in words) == int(clip_words.lengths(ids)[0]) - 2
    assert not cut


def test_words_are_whole_where_tokens_are_not(clip_words: Tokenizer) -> None:
    words, _ = clip_words.words("Skateboarders, naïve")
    assert words == [Word("skateboarders", 3), Word(",", 1), Word("naïve", 3)]


def test_what_is_beyond_the_context_is_said(clip_words: Tokenizer) -> None:
    words, cut = clip_words.words("dog " * 75 + "cat bird")
    assert len(words) == 75
    assert cut == "cat bird"


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["a", "skate", "##board"], [Word("a", 1), Word("skateboard", 2)]),
        (["Ġa", "Ġskate", "board"], [Word("a", 1), Word("skateboard", 2)]),
        (["▁a", "▁skate", "board", "s"], [Word("a", 1), Word("skateboards", 3)]),
        ([], []),
    ],
)
def test_marks_of_other_tokenizers(pieces: list[str], words: list[Word]) -> None:
    """Word pieces mark what goes on, byte-level and sentence pieces mark what begins."""

    class Inner:
        def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
            return {"input_ids": list(range(len(pieces)))}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [pieces[i] for i in ids]

        def convert_tokens_to_string(self, some: list[str]) -> str:
            return "".join(some).replace("##", "").replace("Ġ", " ").replace("▁", " ")

    class Wrapper:
        tokenizer = Inner()
        clean_fn = staticmethod(str.strip)

        def __call__(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[1, 0]])

    assert Tokenizer(Wrapper(), 16).words("a skateboard")[0] == words


def test_real_word_pieces(shared_dir: Path) -> None:
    pytest.importorskip("transformers")
    loaded = load_clip(str(shared_dir / "models" / "photo_encoder"))
    words, _ = loaded.tokenizer.words("An unbelievably fluffy dog")
    assert [word.text for word in words] == ["an", "unbelievably", "fluffy", "dog"]
    ids = loaded.tokenizer(["An unbelievably fluffy dog"])
    assert sum(word.pieces for word in words) == int(loaded.tokenizer.lengths(ids)[0]) - 2


def test_values_of_words_are_those_of_their_tokens(tiny: LoadedClip) -> None:
    """Two sentences of other lengths in one call, against one call of `explain_text` each."""
    texts = ["a red circle", "a large blue star above a green square"]
    target = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    found = explain_sentences(tiny, texts, target, METHODS)
    for row, text in enumerate(texts):
        assert list(found[row].words) == text.split()
        one = explain_text(
            METHODS["grad_eclip"], tiny.clip, tiny.tokenizer([text]), target[row, None], ZERO
        )
        values = torch.tensor(found[row].values["grad_eclip"])
        torch.testing.assert_close(values, one[0, 1 : 1 + len(values)], rtol=1e-4, atol=1e-6)
        assert values.sum().item() == pytest.approx(1, abs=1e-5) or not values.any()


ZERO = torch.tensor([0])


def test_texts_without_words_have_no_values(tiny: LoadedClip) -> None:
    (sentence,) = explain_sentences(tiny, ["🙂"], torch.randn(1, 96), METHODS)
    assert sentence.words == []
    assert sentence.values["grad_eclip"] == []


def test_counts_that_do_not_fit_are_refused(tiny: LoadedClip) -> None:
    with pytest.raises(ValueError, match="2 texts for 1 pictures; give one each"):
        explain_sentences(tiny, ["a", "b"], torch.randn(1, 96), METHODS)


def test_an_unknown_tokenizer_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="does not say which tokens make a word"):
        Tokenizer(lambda texts: torch.ones(len(texts), 4), 4).words("a")


def test_methods_that_read_no_words_are_refused_or_left_out(shared_dir: Path) -> None:
    """MiniLM averages its tokens, so no row of it can be explained."""
    pytest.importorskip("transformers")
    loaded = load_clip(str(shared_dir / "models" / "photo_encoder"))
    target = torch.randn(1, 384)
    with pytest.raises(ValueError, match="averages its tokens"):
        explain_sentences(loaded, ["a dog"], target, {"raw": RawAttention()})
    (sentence,) = explain_sentences(loaded, ["a dog"], target, {"raw": RawAttention()}, skip=True)
    assert sentence.words == ["a", "dog"]
    assert sentence.values == {}
