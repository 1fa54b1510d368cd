"""Pooling of dense features against naive loops."""

import math

import pytest
import torch

from gradeclip_ft.ops.heatmap import owned_products, pool_boxes, pool_heatmap, pool_masks

OWNER = torch.tensor([1, 0, 1])


@pytest.fixture
def dense() -> torch.Tensor:
    """Two images on a 3 x 4 grid, five channels."""
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("images", [1, 2])
def test_heatmap_pooling_is_the_weighted_sum_of_tokens(
    dense: torch.Tensor, normalize: bool, images: int
) -> None:
    """Of several images, and of an only one, whose phrases share its tokens without a copy."""
    dense, owners, heat = dense[:images], OWNER.clamp(max=images - 1), torch.rand(3, 3, 4)
    got = pool_heatmap(dense, heat, owners, normalize_tokens=normalize)
    vectors = torch.rand(3, 5)
    products = owned_products(dense.flatten(1, 2), vectors, owners)
    for row, owner in enumerate(owners.tolist()):
        torch.testing.assert_close(products[row], dense[owner].flatten(0, 1) @ vectors[row])
        expected = torch.zeros(5)
        for y in range(3):
            for x in range(4):
                token = dense[owner, y, x]
                expected += heat[row, y, x] * (unit(token) if normalize else token)
        torch.testing.assert_close(got[row], expected)


@pytest.mark.parametrize("known", [True, False])
def test_phrases_varying_by_image_equal_a_copy_of_the_image_for_each(known: bool) -> None:
    """Values and gradients; an image without phrases, one with most, owners out of order."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.tensor([4, 0, 2, 0, 4, 4, 2, 4, 0, 5])
    dense = torch.randn(6, 3, 4, 5, generator=generator).requires_grad_()
    heat = torch.rand(10, 3, 4, generator=generator).requires_grad_()
    vectors = torch.randn(10, 5, generator=generator).requires_grad_()
    rows, most = dense.flatten(1, 2), 4 if known else None
    got = (
        pool_heatmap(dense, heat, owner, normalize_tokens=False, most=most),
        owned_products(rows, vectors, owner, most=most),
    )
    expected = (
        torch.einsum("pn,pnd->pd", heat.flatten(1), rows[owner]),
        torch.einsum("pnd,pd->pn", rows[owner], vectors),
    )
    torch.testing.assert_close(got, expected)
    inputs = (dense, heat, vectors)
    gradients = [
        torch.autograd.grad(sum(found.sin().sum() for found in pair), inputs)
        for pair in (got, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_no_phrase_at_all_pools_to_no_row(dense: torch.Tensor) -> None:
    nothing = torch.zeros(0, dtype=torch.long)
    assert pool_heatmap(dense, torch.zeros(0, 3, 4), nothing, most=0).shape == (0, 5)
    assert owned_products(dense.flatten(1, 2), torch.zeros(0, 5), nothing).shape == (0, 12)


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


@pytest.mark.parametrize("seed", range(4))
def test_box_pooling_equals_a_naive_loop(seed: int) -> None:
    """Any box: as many samples as it spans cells, each between the four cells around it."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(2, 5, 7, 3, generator=generator)
    corners = torch.rand(6, 2, 2, generator=generator).sort(1).values
    boxes = corners.flatten(1).clamp(0, 1)  # (6, 4) x1 y1 x2 y2
    owner = torch.tensor([0, 1, 1, 0, 1, 0])
    tokens = torch.nn.functional.normalize(dense, dim=-1)
    found = pool_boxes(dense, boxes, owner)
    for row, (box, number) in enumerate(zip(boxes.tolist(), owner.tolist(), strict=True)):
        x1, x2 = box[0] * 7 - 0.5, box[2] * 7 - 0.5
        y1, y2 = box[1] * 5 - 0.5, box[3] * 5 - 0.5
        across, down = math.ceil(x2 - x1), math.ceil(y2 - y1)
        total = torch.zeros(3)
        for i in range(down):
            for j in range(across):
                y = min(max(y1 + (i + 0.5) * (y2 - y1) / down, 0.0), 4.0)
                x = min(max(x1 + (j + 0.5) * (x2 - x1) / across, 0.0), 6.0)
                top, left = min(int(y), 3), min(int(x), 5)
                low, right = y - top, x - left
                cell = tokens[number]
                above = cell[top, left] * (1 - right) + cell[top, left + 1] * right
                below = cell[top + 1, left] * (1 - right) + cell[top + 1, left + 1] * right
                total += above * (1 - low) + below * low
        expected = torch.nn.functional.normalize(total, dim=0)
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=0)
