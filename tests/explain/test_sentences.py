"""Relevance per token to relevance per word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradeclip_ft.explain.base import explain_text
from gradeclip_ft.explain.driver import explain_sentences
from gradeclip_ft.explain.grad_eclip_deep import GradEclipDeep
from gradeclip_ft.explain.raw_attention import RawAttention
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip

METHODS = {"grad_eclip": GradEclipDeep(8, relu_at="sum", minmax_over="visible")}


@pytest.fixture(scope="module")
def tiny() -> LoadedClip:
    return load_clip("shapes_tiny")


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
