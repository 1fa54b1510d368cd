"""Pooling of dense features against naive loops."""

import pytest
import torch

from gradeclip_ft.ops.pooling import pool_boxes, pool_heatmap, pool_masks

OWNER = torch.tensor([1, 0, 1])


@pytest.fixture
def dense() -> torch.Tensor:
    """Two images on a 3 x 4 grid, five channels."""
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


@pytest.mark.parametrize("normalize", [True, False])
def test_heatmap_pooling_is_the_weighted_sum_of_tokens(
    dense: torch.Tensor, normalize: bool
) -> None:
    heat = torch.rand(3, 3, 4)
    got = pool_heatmap(dense, heat, OWNER, normalize_tokens=normalize)
    for row, owner in enumerate(OWNER.tolist()):
        expected = torch.zeros(5)
        for y in range(3):
            for x in range(4):
                token = dense[owner, y, x]
                expected += heat[row, y, x] * (unit(token) if normalize else token)
        torch.testing.assert_close(got[row], expected)


def test_a_map_of_zeros_pools_to_zeros(dense: torch.Tensor) -> None:
    assert pool_heatmap(dense, torch.zeros(3, 3, 4), OWNER).eq(0).all()


def test_the_scale_of_a_map_does_not_turn_its_region(dense: torch.Tensor) -> None:
    heat = torch.rand(3, 3, 4)
    once, often = (pool_heatmap(dense, scale * heat, OWNER) for scale in (1.0, 1e-3))
    cosines = torch.nn.functional.cosine_similarity(once, often)
    torch.testing.assert_close(cosines, torch.ones(3))


def test_mask_pooling_is_the_mean_of_masked_tokens(dense: torch.Tensor) -> None:
    masks = torch.zeros(3, 3, 4, dtype=torch.bool)
    masks[0, 1, 2] = masks[0, 0, 0] = masks[1, 2, 3] = True
    got = pool_masks(dense, masks, OWNER)
    mean = (unit(dense[1, 1, 2]) + unit(dense[1, 0, 0])) / 2
    torch.testing.assert_close(got[0], unit(mean))
    torch.testing.assert_close(got[1], unit(dense[0, 2, 3]))
    assert got[2].eq(0).all()  # an empty mask


def test_a_box_on_whole_cells_is_the_mean_of_their_bilinear_samples(dense: torch.Tensor) -> None:
    """A box of one cell is sampled at its centre (aligned); a box of four at four centres."""
    boxes = torch.tensor(
        [[1 / 4, 1 / 3, 2 / 4, 2 / 3], [2 / 4, 0.0, 1.0, 2 / 3], [0.0, 0.0, 1 / 4, 1 / 3]]
    )
    got = pool_boxes(dense, boxes, OWNER)
    torch.testing.assert_close(got[0], unit(dense[1, 1, 1]), atol=1e-5, rtol=1e-4)
    tokens = torch.nn.functional.normalize(dense[0, 0:2, 2:4].reshape(4, 5), dim=1)
    torch.testing.assert_close(got[1], unit(tokens.mean(0)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[2], unit(dense[1, 0, 0]), atol=1e-5, rtol=1e-4)
