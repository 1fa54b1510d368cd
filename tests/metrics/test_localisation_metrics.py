"""Pointing games on maps made by hand."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_average_precision

from gradeclip_ft.metrics import (
    average_precision,
    chance,
    confusion,
    energy_pointing_game,
    is_constant,
    overlap,
    pointing_game,
    scaled,
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


def test_average_precision_is_that_of_torchmetrics_also_with_ties() -> None:
    """Coarse scores: most of them are equal to others. A constant map scores chance."""
    random = torch.Generator().manual_seed(0)
    score = torch.randint(0, 7, (5, 90), generator=random) / 7
    right = torch.rand(5, 90, generator=random) < 0.3
    expected = [
        binary_average_precision(one, two.long()).item()
        for one, two in zip(score, right, strict=True)
    ]
    assert average_precision(score, right).tolist() == pytest.approx(expected, abs=1e-6)
    flat = average_precision(torch.zeros(5, 90), right)
    assert flat.tolist() == pytest.approx(right.float().mean(1).tolist())


def test_a_map_equal_to_the_mask_is_perfect_and_its_inverse_is_not() -> None:
    """Void pixels do not count, whatever they hold."""
    counted = torch.ones_like(MASK)
    counted[0, 1, 2] = False
    for heat, sign in ((MASK.float(), 1), (1 - MASK.float(), 0)):
        heat[0, 1, 2] = 99.0
        values = scaled(heat, counted)
        found = overlap(confusion(values, MASK, counted))
        assert {name: value.item() for name, value in found.items()} == dict.fromkeys(found, sign)
        precision = average_precision(values.masked_fill(~counted, -1).flatten(1), MASK.flatten(1))
        assert precision.item() == (1.0 if sign else pytest.approx(2 / 5))
        assert (
            pointing_game(values, MASK).item() == energy_pointing_game(values, MASK).item() == sign
        )


@pytest.mark.parametrize("threshold", [0.5, "mean", "otsu"])
def test_pixels_are_counted_as_in_a_loop(threshold: float | str) -> None:
    random = torch.Generator().manual_seed(1)
    heat = scaled(torch.randint(0, 256, (4, 9, 7), generator=random).float() ** 2)
    mask, counted = (torch.rand(4, 9, 7, generator=random) < share for share in (0.3, 0.9))
    found = overlap(confusion(heat, mask, counted, threshold))
    for p in range(4):
        pixels = [
            (float(heat[p, y, x]), bool(mask[p, y, x]))
            for y in range(9) for x in range(7) if counted[p, y, x]
        ]  # fmt: skip
        values = np.array([value for value, _ in pixels])
        limit = {"mean": values.mean(), "otsu": best_split(values)}.get(threshold, 0.5)
        hit = sum(value > limit and right for value, right in pixels)
        above, inside = (values > limit).sum(), sum(right for _, right in pixels)
        assert found["pixel_precision"][p].item() == pytest.approx(hit / above)
        assert found["pixel_recall"][p].item() == pytest.approx(hit / inside)
        assert found["iou"][p].item() == pytest.approx(hit / (above + inside - hit))
        clear = len(pixels) - above - inside + hit
        assert found["pixel_accuracy"][p].item() == pytest.approx((hit + clear) / len(pixels))


def best_split(values: np.ndarray) -> float:
    """Of 255 levels the one after which two groups differ most, by their variance."""
    levels = np.rint(values * 255)

    def between(level: int) -> float:
        low, high = levels[levels <= level], levels[levels > level]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(high) else 0.0

    return (max(range(255), key=between) + 0.5) / 255


def test_random_maps_score_chance_within_three_standard_errors() -> None:
    """Precision, energy and pointing of maps that know nothing are the share of the object."""
    heat = torch.rand(800, 16, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(800, 16, 16, dtype=torch.bool)
    mask[:, 3:11, 2:12] = True
    values = scaled(heat)
    pixels = overlap(confusion(values, mask, torch.ones_like(mask)))
    found = [
        pixels["pixel_precision"],
        energy_pointing_game(values, mask),
        pointing_game(heat, mask),
    ]
    for each in found:
        error = each.std().item() / 800**0.5
        assert each.mean().item() == pytest.approx(80 / 256, abs=3 * error)
