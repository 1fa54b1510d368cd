"""The trace against open_clip's own forward pass, for every tower family."""

import pytest
import torch

from gradeclip_ft.models.clip import Clip

RELATIVE = 1e-5  # other order of sums in fp32


def ids(rows: int, length: int, end: int) -> torch.Tensor:
    """Random texts that end at position `end`."""
    result = torch.randint(1, 48, (rows, length), generator=torch.Generator().manual_seed(3))
    result[:, end] = 49
    result[:, end + 1 :] = 0
    return result


@torch.no_grad()
def test_image_trace_gives_the_librarys_embedding(tiny_clip: Clip) -> None:
    """Catches a forgotten bias, norm, layer scale, rotation or projection."""
    images = torch.randn(3, 3, 32, 32)
    expected = tiny_clip.model.encode_image(images)
    torch.testing.assert_close(tiny_clip.image.encode(images), expected, rtol=RELATIVE, atol=1e-5)


@torch.no_grad()
def test_replay_of_the_same_tokens_gives_the_same_embedding(tiny_clip: Clip) -> None:
    """Catches a replay that forgets positions or takes another row."""
    trace = tiny_clip.image.trace(torch.randn(3, 3, 32, 32))
    owner = torch.tensor([2, 0])
    torch.testing.assert_close(
        trace.replay(trace.tokens[owner], owner), trace.embedding[owner], rtol=RELATIVE, atol=1e-5
    )


@torch.no_grad()
def test_dense_features_are_the_last_block_with_identity_attention(tiny_clip: Clip) -> None:
    """An additive mask that leaves only the diagonal turns the library's block into F_d."""
    images = torch.randn(2, 3, 32, 32)
    trace = tiny_clip.image.trace(images)
    alone = torch.full((17, 17), -torch.inf).fill_diagonal_(0.0)
    visual = tiny_clip.model.visual
    if hasattr(visual, "transformer"):
        rows = visual.transformer.resblocks[-1](trace.tokens, attn_mask=alone)
        expected = visual.ln_post(rows) @ visual.proj
    else:
        rope = visual.trunk.rope.get_embed()
        rows = visual.trunk.blocks[-1](trace.tokens, rope=rope, attn_mask=alone)
        expected = visual.trunk.head(visual.trunk.norm(rows))
    torch.testing.assert_close(
        trace.dense(), expected[:, 1:].reshape(2, 4, 4, 16), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("length", [8, 16, 24])
def test_a_cut_context_gives_the_librarys_text_embedding(tiny_clip: Clip, length: int) -> None:
    """Catches a mask or position table that is not cut with the ids."""
    full = ids(4, 24, end=6)
    expected = tiny_clip.model.encode_text(full)
    got = tiny_clip.text.encode(full[:, :length])
    torch.testing.assert_close(got, expected, rtol=RELATIVE, atol=1e-5)


@torch.no_grad()
def test_text_trace_explains_the_words_between_start_and_end(tiny_vit: Clip) -> None:
    """Catches maps that give weight to markers or to hidden positions."""
    trace = tiny_vit.text.trace(ids(2, 16, end=5))
    assert trace.explained[0].nonzero().flatten().tolist() == [1, 2, 3, 4]
    assert trace.grid is None
    with pytest.raises(ValueError, match="dense features exist for images"):
        trace.dense()
