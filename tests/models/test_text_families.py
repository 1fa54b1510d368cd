"""Every family of text towers against its library's own forward and backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradeclip_ft.explain.grad_eclip import channel_weight
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.trace import UnsupportedTowerError
from tests.tiny import make_tiny_text, recorded_attention

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LONGEST = 9


def ids(clip: Clip, length: int = 24) -> torch.Tensor:
    """Four texts of 4, 6, 8 and 9 tokens: 2, then words, then 49, then padding."""
    result = torch.randint(3, 48, (4, length), generator=torch.Generator().manual_seed(3))
    result[:, 0] = 2
    pad = 1 if clip.text.pooling == "last position" else clip.text.pad
    for row, end in enumerate((3, 5, 7, LONGEST - 1)):
        result[row, end] = 1 if pad == 1 and clip.text.pad == 0 else 49
        result[row, end + 1 :] = pad
    return result


@torch.no_grad()
def test_the_tower_gives_the_librarys_embedding(text_clip: Clip) -> None:
    texts = ids(text_clip)
    expected = text_clip.model.encode_text(texts)
    torch.testing.assert_close(text_clip.text.encode(texts), expected, **CLOSE)
    if text_clip.text.unexplained is None:
        trace = text_clip.text.trace(texts)
        torch.testing.assert_close(trace.embedding, expected, **CLOSE)
        again = trace.replay(trace.tokens[[3, 1]], torch.tensor([3, 1]))
        torch.testing.assert_close(again, expected[[3, 1]], **CLOSE)


@torch.no_grad()
def test_cutting_the_padding_changes_nothing_where_the_tower_says_so(text_clip: Clip) -> None:
    """Exact by causal mask or attention mask; SigLIP and CoCa refuse."""
    texts = ids(text_clip)
    expected = text_clip.model.encode_text(texts)
    if text_clip.text.cuts_exactly:
        for length in (LONGEST, 16):
            got = text_clip.text.encode(texts[:, :length])
            torch.testing.assert_close(got, expected, **CLOSE)
    else:
        with pytest.raises(ValueError, match="expected all 24"):
            text_clip.text.encode(texts[:, :16])


def test_the_channel_weight_is_the_librarys_own_gradient(text_clip: Clip) -> None:
    if text_clip.text.unexplained is not None:
        pytest.skip("averages its tokens")
    texts, target = ids(text_clip), nn.functional.normalize(torch.randn(4, 16), dim=1)
    with recorded_attention() as outputs:
        embedding = text_clip.model.encode_text(texts)
    score = nn.functional.cosine_similarity(embedding, target).sum()
    (gradient,) = torch.autograd.grad(score, outputs[-1])  # (M, A, N, c)
    trace = text_clip.text.trace(texts).detach()
    rows = torch.arange(4)
    expected = gradient[rows, :, trace.query].flatten(1)
    weight = channel_weight(trace, target, rows, heads="all")
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    others = gradient.clone()
    others[rows, :, trace.query] = 0
    assert not others.any()  # no other row reaches the embedding


@torch.no_grad()
def test_words_alone_are_explained(text_clip: Clip) -> None:
    """Neither start nor end nor padding; CoCa's released mask also hides the last word."""
    if text_clip.text.unexplained is not None:
        pytest.skip("averages its tokens")
    trace = text_clip.text.trace(ids(text_clip))
    first = 0 if text_clip.text.pooling == "last position" else 1
    found = [row.nonzero().flatten().tolist() for row in trace.explained]
    assert found == [list(range(first, end)) for end in (3, 5, 7, LONGEST - 1)]
    assert trace.grid is None
    with pytest.raises(ValueError, match="dense features exist for images"):
        trace.dense()


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert_mean", "roberta_mean"])
def test_a_tower_that_averages_says_so(family: str) -> None:
    clip = make_tiny_text(family)
    assert clip.text.cuts_exactly
    with pytest.raises(UnsupportedTowerError, match=r"averages its tokens .*where one is pooled"):
        clip.text.trace(ids(clip))


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="texts have 25 tokens, expected at most 24"):
        make_tiny_text("causal").text.encode(torch.ones(1, 25, dtype=torch.long))
