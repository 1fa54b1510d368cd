"""Normalisation and shapes of heat maps."""

import torch

from gradeclip_ft.ops.heatmap import min_max, to_grid, to_pixels


def test_min_max_looks_only_at_the_chosen_positions() -> None:
    row = torch.tensor([[100.0, 1.0, 3.0, 2.0]])
    among = torch.tensor([[False, True, True, True]])
    assert min_max(row, among).tolist() == [[0.0, 0.0, 1.0, 0.5]]


def test_a_constant_row_is_one_for_weights_and_zero_for_pictures() -> None:
    row = torch.full((1, 3), 7.0)
    assert min_max(row).tolist() == [[1.0, 1.0, 1.0]]
    assert to_pixels(row.view(1, 1, 3), (2, 6)).eq(0).all()


def test_the_last_tokens_form_the_grid_row_by_row() -> None:
    relevance = torch.arange(7.0)[None]
    assert to_grid(relevance, (2, 3)).tolist() == [[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]


def test_pixels_keep_height_and_width_apart() -> None:
    """One bright corner of a picture that is not square (traps: E9)."""
    heat = torch.zeros(1, 2, 4)
    heat[0, 0, 3] = 1.0
    pixels = to_pixels(heat, (20, 80))[0]
    assert pixels.shape == (20, 80)
    assert divmod(int(pixels.argmax()), 80)[0] < 10
    assert divmod(int(pixels.argmax()), 80)[1] >= 60
    assert pixels.max() == 1.0
