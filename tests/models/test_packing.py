"""Packed texts: few rows, equal beginnings once, the same embeddings."""

import numpy as np
import open_clip
import pytest
import torch

from gradeclip_ft.batch import PackedTexts
from gradeclip_ft.models.packing import pack_texts
from gradeclip_ft.models.tokenizer import Tokenizer
from tests.tiny import make_tiny_text

WORDS = ("a dog", "a dog in a black car", "", "a cat", "a dog", "traffic lights in the rain")
START, END = 1, 49


def texts(count: int, seed: int) -> list[list[int]]:
    """Random texts over three words, so that many begin alike."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 20, count)
    return [[START, *generator.integers(2, 5, length).tolist(), END] for length in lengths]


def padded(rows: list[list[int]]) -> torch.Tensor:
    ids = torch.zeros((len(rows), 24), dtype=torch.long)
    for row, text in enumerate(rows):
        ids[row, : len(text)] = torch.tensor(text)
    return ids


@pytest.mark.parametrize("family", ["causal", "eos", "layer_scale"])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_packed_texts_have_the_embeddings_and_gradients_of_single_ones(
    family: str, count: int
) -> None:
    """Would catch a token that sees another text, a wrong position, or a mixed-up order."""
    clip = make_tiny_text(family)
    rows = texts(count, seed=count)
    target = torch.randn(count, 16, generator=torch.Generator().manual_seed(3))
    found = []
    for embeddings in (clip.text.encode(padded(rows)), clip.text.encode_packed(pack_texts(rows))):
        parameters = [p for n, p in clip.model.text.named_parameters()]
        gradients = torch.autograd.grad((embeddings * target).sum(), parameters)
        found.append([embeddings.detach(), *gradients])
    for alone, packed in zip(*found, strict=True):
        # A gradient sums over about 1000 tokens, in another order when they are packed. Its
        # rounding error is relative to the largest entries, not to one that cancels to almost 0:
        # sqrt(1000) · 2^-24 = 2e-6 of them, and 1e-5 leaves room for the two layers between.
        largest = float(alone.abs().max())
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5 * max(largest, 1.0))


def test_every_token_sees_its_own_text_up_to_itself() -> None:
    """Would catch a hole in the mask: written out text by text from the packed ids alone."""
    rows = texts(40, seed=5)
    packed = pack_texts(rows)
    ids, places = packed.ids.flatten(), packed.position.flatten()
    length = packed.ids.shape[1]
    for text, end in zip(rows, packed.end.tolist(), strict=True):
        row, column = divmod(end, length)
        seen = (~packed.hidden[row, column]).nonzero().flatten() + row * length
        assert ids[seen].tolist() == text
        assert places[seen].tolist() == list(range(len(text)))


def test_a_common_beginning_is_computed_once() -> None:
    """The case by hand: start and two words are shared, the rest is not."""
    packed = pack_texts([[1, 5, 6, 7, 49], [1, 5, 6, 8, 9, 49], [1, 5, 6, 49]])
    assert packed.ids.shape == (1, 16)  # 3 shared + 1 + 3 + 2 = 9 tokens, filled up to 16
    assert packed.ids[0, :9].tolist() == [1, 5, 6, 7, 49, 8, 9, 49, 49]
    assert packed.end.tolist() == [4, 7, 8]


def test_rows_are_short_and_nearly_full() -> None:
    """Would catch one long row, whose attention grows with its square, and half-empty ones."""
    generator = np.random.default_rng(0)
    rows = [[START, *generator.integers(2, 45, 10).tolist(), END] for _ in range(100)]
    packed = pack_texts(rows)
    used = 1 + len(packed.ids)  # at least one start per row
    assert packed.ids.shape[1] <= 136
    assert used + (packed.ids != 0).sum() >= 0.9 * packed.ids.numel()


def test_the_tokenizer_packs_what_it_made() -> None:
    """Ends of texts are the first end-of-text ids, as the tower's arg-max finds them."""
    tokenizer = Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 77, packs=True)
    long = "word " * 100
    groups = [tokenizer([*WORDS, long], trim=True), tokenizer(["a <end_of_text> b"], trim=True)]
    packed = tokenizer.pack(*groups)
    assert isinstance(packed, PackedTexts)
    lengths = packed.position.flatten()[packed.end] + 1
    expected = torch.cat([ids.argmax(1) + 1 for ids in groups])
    assert lengths.tolist() == expected.tolist()
    assert lengths[-2] == 77


@pytest.mark.parametrize("family", ["siglip", "coca", "bert"])
def test_other_towers_refuse(family: str) -> None:
    """Would catch packed texts where every token sees all others."""
    clip = make_tiny_text(family)
    assert clip.text.encode_packed is None
    tokenizer = Tokenizer(open_clip.get_tokenizer("ViT-B-16"), 77)
    assert tokenizer.pack(torch.ones((1, 3), dtype=torch.long)) is None
