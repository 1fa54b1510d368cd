"""Token ids: cutting the context, empty calls, and the word tokenizer of the shapes world."""

import pickle
from pathlib import Path

import open_clip
import pytest
import torch

from gradeclip_ft.models.load import load_clip
from gradeclip_ft.models.tokenizer import Tokenizer, Word, WordTokenizer, split_words


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """CLIP's own byte pairs."""
    return Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 77)


def test_trimming_keeps_every_end_and_cuts_to_a_multiple_of_8(tokenizer: Tokenizer) -> None:
    texts = ["a dog", "This is a photo of the black car"]
    full, cut = tokenizer(texts), tokenizer(texts, trim=True)
    assert full.shape == (2, 77)
    assert cut.shape == (2, 16)
    assert cut.equal(full[:, :16])
    assert (cut.max(dim=1).values == 49407).all()


def test_a_text_that_is_too_long_keeps_its_end(tokenizer: Tokenizer) -> None:
    cut = tokenizer(["dog " * 200], trim=True)
    assert cut.shape == (1, 77)
    assert cut[0, -1] == 49407


def test_a_tower_that_needs_the_full_context_gets_it() -> None:
    """SigLIP and CoCa pool elsewhere; a cut would change their result (traps: E10)."""
    whole = Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 77, exact_cut=False)
    assert whole(["a dog"], trim=True).shape == (1, 77)


def test_no_text_gives_no_row(tokenizer: Tokenizer) -> None:
    assert tokenizer([], trim=True).shape == (0, 8)
    assert tokenizer([]).shape == (0, 77)


def test_tokenizers_cross_process_boundaries(tokenizer: Tokenizer) -> None:
    """Loader workers may be spawned (traps: B13)."""
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again(["a red circle"]).equal(tokenizer(["a red circle"]))


def test_word_tokenizer_ends_with_the_largest_id() -> None:
    words = WordTokenizer(("a", "red", "circle"), context_length=6)
    ids = words(["A red circle.", "a purple circle", "a red circle a red circle"])
    assert ids.tolist() == [[5, 2, 3, 4, 6, 0], [5, 2, 1, 4, 6, 0], [5, 2, 3, 4, 2, 6]]
    assert ids.argmax(1).tolist() == [4, 4, 5]


def test_words_are_lower_case_letters_and_numbers() -> None:
    assert split_words("A red-ish circle, 2 stars & Ünder") == [
        "a", "red", "ish", "circle", "2", "stars", "nder",
    ]  # fmt: skip


def test_texts_that_come_again_have_the_same_ids(monkeypatch) -> None:
    """Would catch a mix-up of remembered rows, also when the memory is full and starts anew."""
    monkeypatch.setattr("gradeclip_ft.models.tokenizer.KEPT", 3)
    words = Tokenizer(WordTokenizer(("a", "red", "circle"), 24), 24)
    texts = ["a circle", "a", "red", "a circle", "circle red", ""]
    for some in (texts[:2], texts[1:4], texts, texts[::-1], texts):
        torch.testing.assert_close(words(some), words.tokenize(some))
    ids = words(["a"])
    ids.zero_()
    assert words(["a"]).any()


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
def test_pieces_of_the_words_are_the_tokens(tokenizer: Tokenizer, text: str) -> None:
    """Catches words that lose or gain a token, in any script."""
    words, cut = tokenizer.words(text)
    ids = tokenizer([text])
    assert sum(word.pieces for word in words) == int(tokenizer.lengths(ids)[0]) - 2
    assert not cut


def test_words_are_whole_where_tokens_are_not(tokenizer: Tokenizer) -> None:
    words, _ = tokenizer.words("Skateboarders, naïve")
    assert words == [Word("skateboarders", 3), Word(",", 1), Word("naïve", 3)]


def test_what_is_beyond_the_context_is_said(tokenizer: Tokenizer) -> None:
    words, cut = tokenizer.words("dog " * 75 + "cat bird")
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


def test_an_unknown_tokenizer_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="does not say which tokens make a word"):
        Tokenizer(lambda texts: torch.ones(len(texts), 4), 4).words("a")


def test_words_outside_a_closed_vocabulary_are_told(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """A dog and a cat become one id, so that every text of either has the same embedding."""
    texts = ["a red dog", "a cat"]
    Tokenizer(WordTokenizer(("a", "red"), 8), 8).warn_of_unknown(texts)
    assert "knows 2 words; 40 % of those here (dog, cat) are others" in caplog.text
    assert "model=ViT-B-32" in caplog.text
    caplog.clear()
    tokenizer.warn_of_unknown(texts)  # byte pairs spell any word
    Tokenizer(WordTokenizer(("a", "red"), 8), 8).warn_of_unknown(["a red"])
    assert not caplog.text
