"""Class embeddings against the written rule, name by name."""

import pytest
import torch

from gradeclip_ft.models.clip import Clip, class_embeddings
from gradeclip_ft.models.tokenizer import Tokenizer, WordTokenizer

WORDS = ("this", "is", "a", "an", "photo", "of", "the", "cat", "orange", "or", "dog", "itap", "my")
TEMPLATES = ("a photo of {a} {}.", "itap of my {}.", "the {}.")
TOKENIZER = Tokenizer(WordTokenizer(WORDS, 24), 24)


def test_embeddings_equal_the_rule_applied_by_hand(tiny_vit: Clip) -> None:
    """Embed, normalise, mean, normalise; "This is" and the article by the written rule."""
    sentences = {
        "Cat.": ("This is a photo of a cat.", "itap of my cat.", "This is the cat."),
        "orange/dog": (
            "This is a photo of an orange or dog.",
            "itap of my orange or dog.",
            "This is the orange or dog.",
        ),
    }
    found = class_embeddings(tiny_vit, TOKENIZER, list(sentences), TEMPLATES)
    for row, texts in zip(found, sentences.values(), strict=True):
        total = torch.zeros(16)
        for text in texts:
            embedded = tiny_vit.model.encode_text(TOKENIZER([text]))[0]
            total += embedded.detach() / embedded.detach().norm()
        mean = total / 3
        torch.testing.assert_close(row, mean / mean.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_cut_anywhere_give_the_same(tiny_vit: Clip, batch_size: int) -> None:
    """Batches cross the borders of classes, and have contexts of different length."""
    names = ["cat", "dog", "orange/dog"]
    whole = class_embeddings(tiny_vit, TOKENIZER, names, TEMPLATES)
    parts = class_embeddings(tiny_vit, TOKENIZER, names, TEMPLATES, batch_size=batch_size)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


def test_nothing_to_embed_is_refused(tiny_vit: Clip) -> None:
    with pytest.raises(ValueError, match="got 0 names"):
        class_embeddings(tiny_vit, TOKENIZER, [], TEMPLATES)
