"""Geometry of the padded square, against published numbers and pixel loops."""

import numpy as np
import pytest
import torch
from PIL import Image

from gradeclip_ft.data.regions import (
    letterbox_boxes,
    letterbox_image,
    letterbox_masks,
    letterbox_size,
    tight_boxes,
)


@pytest.mark.parametrize(("antialias", "cells"), [(True, 20), (False, 6)])
def test_antialias_decides_how_many_cells_an_object_covers(antialias: bool, cells: int) -> None:
    """The measured example of the protocol: 100 x 110 px in a 640 px image, grid 14."""
    mask = torch.zeros(1, 480, 640)
    mask[:, 200:300, 200:310] = 1
    assert int(letterbox_masks(mask, 14, antialias=antialias).sum()) == cells
    fine = {True: 160, False: 110}[antialias]
    assert int(letterbox_masks(mask, 64, antialias=antialias).sum()) == fine


def test_without_antialias_small_objects_vanish_and_with_it_they_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 600, (200, 2), generator=generator).tolist()
    masks = torch.zeros(200, 640, 640, dtype=torch.uint8)
    for mask, (top, left) in zip(masks, corners, strict=True):
        mask[top : top + 16, left : left + 16] = 1
    share = [
        float((letterbox_masks(masks, 14, antialias=flag).flatten(1).sum(1) == 0).float().mean())
        for flag in (True, False)
    ]
    assert share[0] == 0.0
    assert share[1] == pytest.approx(0.83, abs=0.06)  # published share for 16 px objects


@pytest.mark.parametrize(("height", "width"), [(200, 300), (300, 200), (250, 250), (20, 640)])
def test_image_is_resized_right_below_padded_with_black(height: int, width: int) -> None:
    pixels = np.full((height, width, 3), 200, np.uint8)
    square = np.asarray(letterbox_image(Image.fromarray(pixels), 64))
    inner = letterbox_size(height, width, 64)
    assert square.shape == (64, 64, 3)
    assert (square[: inner[0], : inner[1]] == 200).all()
    assert square[inner[0] :].sum() == 0
    assert square[:, inner[1] :].sum() == 0


def test_axes_are_not_swapped() -> None:
    """One bright corner in a non-square image: PIL counts width first, tensors height first."""
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:50, 240:] = 255
    square = np.asarray(letterbox_image(Image.fromarray(pixels), 96))[..., 0]
    boxes = letterbox_boxes(torch.tensor([[240.0, 0.0, 60.0, 50.0]]), height=100, width=300)
    x0, y0, x1, y1 = (boxes[0] * 96).round().int().tolist()
    assert (x0, y0, x1, y1) == (77, 0, 96, 16)
    assert square[y0 : y1 - 1, x0 + 1 : x1].min() > 200
    assert square[y1 + 2 :].max() < 10
    assert square[:, : x0 - 2].max() < 10
    mask = torch.from_numpy(pixels[None, ..., 0] > 0)
    cells = letterbox_masks(mask, 12, antialias=True)[0]
    rows, columns = cells.nonzero().T  # true extent: 0 to 2 and 9.6 to 12, bicubic adds up to two
    assert (int(rows.min()), int(columns.max())) == (0, 11)
    assert int(rows.max()) <= 3
    assert int(columns.min()) >= 7


def test_boxes_and_masks_name_the_same_place() -> None:
    """A full-grid mask in a non-square image: the box around its cells is the letterboxed box."""
    mask = torch.zeros(1, 320, 480)
    mask[:, 80:240, 120:360] = 1
    box = letterbox_boxes(tight_boxes(mask), height=320, width=480)[0] * 12
    assert box.tolist() == [3.0, 2.0, 9.0, 6.0]
    cells = letterbox_masks(mask, 12, antialias=False)[0].nonzero()
    assert [*cells.amin(0).tolist(), *cells.amax(0).tolist()] == [2, 3, 5, 8]


def test_tight_boxes_equal_a_pixel_loop() -> None:
    masks = torch.rand(6, 20, 31, generator=torch.Generator().manual_seed(1)) > 0.97
    masks[5] = False
    for mask, box in zip(masks.numpy(), tight_boxes(masks).tolist(), strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows) == 0:
            assert box == [0, 0, 0, 0]
        else:
            size = [np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert box == [columns.min(), rows.min(), *size]


def test_no_region_gives_no_mask() -> None:
    assert letterbox_masks(torch.zeros(0, 30, 40), 7, antialias=True).shape == (0, 7, 7)
