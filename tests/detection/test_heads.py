"""Anchors, levels, pooling and losses of proposals against torchvision and against loops."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align
from torchvision.ops.poolers import LevelMapper

from gradeclip_ft.detection.heads import Proposals, level_anchors, pool_regions
from tests.detection.conftest import make_detection_batch, make_detector


@pytest.mark.parametrize("stride", [4.0, 3.5])
def test_anchors_equal_a_loop(stride: float) -> None:
    """Would catch rounded anchors, swapped sides, and another order of cells and ratios."""
    expected = []
    for row in range(3):
        for column in range(2):
            for ratio in (0.5, 1.0, 2.0):
                width = 8 * stride / math.sqrt(ratio)
                height = 8 * stride * math.sqrt(ratio)
                x, y = column * stride, row * stride
                expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    torch.testing.assert_close(level_anchors((3, 2), stride), torch.tensor(expected))


def boxes(count: int, seed: int, side: float) -> torch.Tensor:
    """Boxes of all sizes, inside the square."""
    draw = torch.Generator().manual_seed(seed)
    longest = torch.exp(torch.rand(count, 1, generator=draw) * math.log(side))
    extent = longest * (0.5 + 0.5 * torch.rand(count, 2, generator=draw))
    corner = torch.rand(count, 2, generator=draw) * (side - extent)
    return torch.cat([corner, corner + extent], 1)


def pyramid(side: int) -> list[torch.Tensor]:
    """Random levels of strides 4 to 32 of two images."""
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(2, 3, side // s, side // s, generator=draw) for s in (4, 8, 16, 32)]


def test_regions_come_from_torchvision_s_levels_and_places() -> None:
    """Would catch another level rule, and boxes that are shifted against the features.

    torchvision pools without aligned corners, which is the same as boxes half a cell further.
    """
    levels, found = pyramid(1024), [boxes(40, 0, 1024), boxes(30, 1, 1024)]
    ours = pool_regions(levels, [4.0, 8.0, 16.0, 32.0], found, region=224.0)
    level = LevelMapper(2, 5, 224, 4)(found)
    assert len(level.unique()) == 4
    owner = torch.tensor([0] * 40 + [1] * 30)
    for row, (box, number) in enumerate(zip(torch.cat(found), level, strict=True)):
        stride = 4 * 2 ** int(number)
        if (box[2:] - box[:2]).min() >= stride:  # unaligned pooling enlarges smaller boxes
            roi = torch.cat([owner[row : row + 1].float(), box - stride / 2])[None]
            expected = roi_align(levels[int(number)], roi, 7, 1 / stride, -1, aligned=False)
            torch.testing.assert_close(ours[row], expected[0], rtol=1e-4, atol=1e-4)


def test_regions_are_near_torchvision_s_own_pooler() -> None:
    """Would catch a wrong stride or a wrong image: on a smooth map, half a cell hardly matters."""
    ramp = torch.linspace(0, 1, 512)
    picture = torch.stack([ramp[None].expand(512, 512), ramp[:, None].expand(512, 512)])
    levels = [
        torch.nn.functional.avg_pool2d(torch.stack([picture, -picture]), s) for s in (4, 8, 16, 32)
    ]
    found = [boxes(20, 2, 512), boxes(20, 3, 512)]
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 0)(
        {str(k): level for k, level in enumerate(levels)}, found, [(512, 512)] * 2
    )
    ours = pool_regions(levels, [4.0, 8.0, 16.0, 32.0], found, region=224.0)
    wide = torch.cat(found)[:, 2:] - torch.cat(found)[:, :2] > 40
    rows = wide.all(1)
    assert rows.sum() > 5
    assert (ours - theirs)[rows].abs().max() < 32 / 512


def test_losses_of_proposals_equal_a_loop() -> None:
    """Would catch smooth L1, a mean over the batch's samples, and labels of -1 that count."""
    torch.manual_seed(0)
    head = Proposals(8, [4.0, 8.0, 16.0, 32.0, 64.0], candidates=10, kept=10, samples=10**6).train()
    images, anchors = 2, 200
    draw = torch.Generator().manual_seed(1)
    labels = [torch.randint(-1, 2, (anchors,), generator=draw).float() for _ in range(images)]
    labels[1][20:] = -1.0
    logits = torch.randn(images * anchors, 1, generator=draw)
    deltas = torch.randn(images * anchors, 4, generator=draw)
    goals = [torch.randn(anchors, 4, generator=draw) for _ in range(images)]
    classes, places = head.compute_loss(logits, deltas, labels, goals)
    sums = [[0.0, 0.0] for _ in range(images)]
    for row in range(images):
        known = [k for k in range(anchors) if labels[row][k] >= 0]
        for k in known:
            at = row * anchors + k
            loss = binary_cross_entropy_with_logits(logits[at, 0], labels[row][k])
            sums[row][0] += float(loss) / len(known)
            if labels[row][k] == 1:
                sums[row][1] += float((deltas[at] - goals[row][k]).abs().sum()) / len(known)
    assert float(classes) == pytest.approx(sum(s[0] for s in sums) / images, rel=1e-4)
    assert float(places) == pytest.approx(sum(s[1] for s in sums) / images, rel=1e-4)


def test_an_object_without_a_good_anchor_takes_its_best_one_from_an_overlap_of_three_tenths() -> (
    None
):
    """Would catch torchvision's forced matches, which take any overlap."""
    head = Proposals(8, [4.0, 8.0, 16.0, 32.0, 64.0], candidates=10, kept=10, samples=256)
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    weak = torch.tensor([[20.0, 20, 60, 22]])  # overlaps by less
    fair = torch.tensor([[0.0, 0, 10, 5]])  # by a half
    (first, second), _ = head.assign_targets_to_anchors(
        [anchors, anchors], [{"boxes": weak}, {"boxes": fair}]
    )
    assert 0 < float(box_iou(weak, anchors).max()) < 0.3
    assert first.tolist() == [0, 0, 0]
    assert second.tolist() == [1, 0, 0]


def test_images_without_objects_have_background_alone() -> None:
    """Would catch a crash, or a loss that is not a number."""
    detector = make_detector().train()
    batch = make_detection_batch(2)
    levels, _ = detector.features(batch.images)
    none = [{"boxes": torch.zeros(0, 4)}] * 2
    _, losses = detector.propose(batch.images, batch.sizes, levels, none)
    assert float(losses["loss_rpn_box_reg"]) == 0
    assert float(losses["loss_objectness"]) == pytest.approx(math.log(2), rel=0.05)
