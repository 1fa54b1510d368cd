"""Pointing games on maps made by hand."""

import pytest
import torch

from gradeclip_ft.metrics import (
    chance,
    energy_pointing_game,
    is_constant,
    pointing_game,
    share_inside,
)

# The object is the upper left pixel and its right neighbour.
MASK = torch.tensor([[[True, True, False], [False, False, False]]])


def one(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


@pytest.mark.parametrize(
    ("values", "peak", "energy"),
    [
        ([[5, 0, 0], [0, 0, 0]], 1.0, 1.0),
        ([[0, 0, 0], [0, 0, 5]], 0.0, 0.0),
        ([[3, 2, 4], [1, 0, 0]], 0.0, 0.5),  # the energy sees what the peak misses
        ([[4, 0, 4], [0, 0, 0]], 0.5, 0.5),  # two peaks, one of them on the object
        ([[4, 4, 4], [4, 0, 0]], 0.5, 0.5),
        ([[-1, -5, -5], [-5, -5, -5]], 1.0, 1.0),  # shifted to a minimum of 0
        ([[-1, -1, -5], [-5, -3, -5]], 1.0, 0.8),
    ],
)
def test_a_map_made_by_hand(values: list[list[float]], peak: float, energy: float) -> None:
    heat = one(values)
    assert pointing_game(heat, MASK).item() == pytest.approx(peak)
    assert energy_pointing_game(heat, MASK).item() == pytest.approx(energy)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-30])
def test_a_constant_map_misses(value: float) -> None:
    """A method that says nothing must not score the area of the object, or its first pixel."""
    heat = torch.full((1, 2, 3), value)
    assert is_constant(heat).item()
    assert pointing_game(heat, MASK).item() == 0.0
    assert energy_pointing_game(heat, MASK).item() == 0.0


def test_a_map_that_is_constant_up_to_rounding_misses() -> None:
    heat = torch.full((1, 2, 3), 0.1)
    heat[0, 0, 0] += 1e-8
    assert pointing_game(heat, MASK).item() == 0.0
    assert energy_pointing_game(heat, MASK).item() == 0.0


def test_small_maps_are_no_constant_maps() -> None:
    """Would catch a threshold in units of the map."""
    heat = 1e-12 * one([[5, 0, 0], [0, 0, 1]])
    assert pointing_game(heat, MASK).item() == 1.0
    assert energy_pointing_game(heat, MASK).item() == pytest.approx(5 / 6)


def test_maps_do_not_mix_and_scale_does_not_count() -> None:
    heat = torch.cat([one([[5, 0, 0], [0, 0, 1]]), 100 * one([[0, 0, 0], [0, 0, 5]])])
    masks = MASK.expand(2, -1, -1)
    assert pointing_game(heat, masks).tolist() == [1.0, 0.0]
    assert energy_pointing_game(heat, masks).tolist() == pytest.approx([5 / 6, 0.0])


def test_chance_is_the_share_of_the_picture() -> None:
    assert chance(MASK).item() == pytest.approx(2 / 6)


def test_a_random_peak_scores_chance() -> None:
    """The oracle of `chance`, and of ties: each of the equal peaks counts for its share."""
    heat = torch.rand(20_000, 2, 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    found = pointing_game(heat, MASK.expand(len(heat), -1, -1)).mean()
    assert found.item() == pytest.approx(2 / 6, abs=0.01)


def test_broken_maps_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        pointing_game(one([[float("nan"), 0, 0], [0, 0, 0]]), MASK)


@pytest.mark.parametrize(
    ("values", "share"),
    [
        ([[5, 0, 0], [0, 0, 0]], 1.0),
        ([[3, 2, 4], [1, 0, 0]], 0.5),
        ([[2, 2, 2], [2, 2, 2]], 1 / 3),  # not shifted: a flat map pools the picture
        ([[3, -9, 1], [-9, -9, -9]], 0.75),  # what is below 0 is not pooled
        ([[-1, -1, -2], [-3, -3, -3]], 0.0),
    ],
)
def test_share_of_what_is_pooled(values: list[list[float]], share: float) -> None:
    """Computed by hand: the positive part on the object over the positive part."""
    assert share_inside(one(values), MASK).item() == pytest.approx(share)
