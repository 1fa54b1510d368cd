"""Normalisation and shapes of heat maps."""

import torch

from gradeclip_ft.ops.heatmap import above, min_max, sparse, to_grid


def test_min_max_looks_only_at_the_chosen_positions() -> None:
    row = torch.tensor([[100.0, 1.0, 3.0, 2.0]])
    among = torch.tensor([[False, True, True, True]])
    assert min_max(row, among).tolist() == [[0.0, 0.0, 1.0, 0.5]]


def test_a_constant_row_is_one_where_it_is_looked_at() -> None:
    """λ = 1, never 0/0 (traps: D8)."""
    row, among = torch.full((1, 3), 7.0), torch.tensor([[False, True, True]])
    assert min_max(row, among).tolist() == [[0.0, 1.0, 1.0]]


def test_the_last_tokens_form_the_grid_row_by_row() -> None:
    relevance = torch.arange(7.0)[None]
    assert to_grid(relevance, (2, 3)).tolist() == [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]


def test_sparse_maps_are_cut_at_one_over_the_number_of_patches() -> None:
    """SPARC: 0-1 normalised, below 1/n to 0, divided by the sum; zeros stay zeros."""
    heat = torch.tensor([[[1.0, 1.2], [3.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]]])
    expected = torch.tensor([[[0.0, 0.0], [1 / 3, 2 / 3]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(sparse(heat), expected)


def test_maps_are_cut_at_a_share_of_their_maximum() -> None:
    heat = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert above(heat, 0.5).tolist() == [[[0, 2], [3, 4]], [[0, 0], [0, 0]]]
