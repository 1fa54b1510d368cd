"""Recall@k against hand matrices and torchmetrics' hit rate."""

import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

from gradeclip_ft.metrics import first_hits, recall, search


def test_hand_matrix_with_uneven_captions() -> None:
    """Three images with 2, 1 and 3 captions; both directions read off the matrix by eye."""
    image_by_text = torch.tensor(
        [  # 0    0    1    2    2    2   owner of the caption
            [0.9, 0.1, 0.2, 0.3, 0.0, 0.4],
            [0.8, 0.2, 0.7, 0.6, 0.5, 0.4],
            [0.1, 0.9, 0.8, 0.2, 0.3, 0.7],
        ]
    )
    owner, images = torch.tensor([0, 0, 1, 2, 2, 2]), torch.arange(3)
    to_text, _ = first_hits(image_by_text, images.unsqueeze(1) == owner)
    assert to_text.tolist() == [0, 1, 2]
    to_image, _ = first_hits(image_by_text.T, owner.unsqueeze(1) == images)
    assert to_image.tolist() == [0, 2, 1, 2, 1, 0]
    assert recall(to_image, (1, 2, 3)) == {1: 2 / 6, 2: 4 / 6, 3: 1.0}


@pytest.mark.parametrize("k", [1, 5, 10])
def test_equals_torchmetrics_hit_rate_on_random_data(k: int) -> None:
    """RetrievalRecall is another quantity as soon as a query has several right answers."""
    generator = torch.Generator().manual_seed(k)
    images = torch.randn(40, 8, generator=generator)
    owner = torch.arange(40).repeat_interleave(torch.arange(40) % 4 + 1)
    texts = images[owner] + 2 * torch.randn(len(owner), 8, generator=generator)
    number = torch.arange(40)
    for queries, gallery, query_key, gallery_key in (
        (texts, images, owner, number),
        (images, texts, number, owner),
    ):
        ranks, _ = search(queries, gallery, query_key, gallery_key, chunk=7)
        unit = torch.nn.functional.normalize
        scores = unit(queries, dim=1) @ unit(gallery, dim=1).T
        relevant = query_key.unsqueeze(1) == gallery_key
        index = torch.arange(len(queries)).unsqueeze(1).expand_as(scores)
        arguments = (scores.flatten(), relevant.flatten(), index.flatten())
        expected = RetrievalHitRate(top_k=k)(*arguments)
        assert recall(ranks, (k,))[k] == pytest.approx(float(expected), abs=1e-6)
    assert float(RetrievalRecall(top_k=k)(*arguments)) < float(expected)


def test_first_index_wins_ties() -> None:
    """Four equal items: the right one is found only if none stands before it."""
    scores = torch.ones(4, 4)
    ranks, ties = first_hits(scores, torch.eye(4, dtype=torch.bool))
    assert ranks.tolist() == [0, 1, 2, 3]
    assert ties.all()


def test_equal_right_answers_are_no_tie() -> None:
    ranks, ties = first_hits(torch.tensor([[0.5, 0.9, 0.9]]), torch.tensor([[False, True, True]]))
    assert (ranks.tolist(), ties.tolist()) == ([0], [False])


def test_chunks_do_not_change_the_result() -> None:
    images, texts = torch.randn(30, 6), torch.randn(30, 6)
    key = torch.arange(30)
    whole = search(images, texts, key, key, chunk=1000)
    for chunk in (1, 7, 30):
        assert torch.equal(search(images, texts, key, key, chunk=chunk)[0], whole[0])


def test_nan_embeddings_are_refused() -> None:
    broken, key = torch.full((2, 3), torch.nan), torch.arange(2)
    with pytest.raises(ValueError, match="not finite"):
        search(broken, broken, key, key)
