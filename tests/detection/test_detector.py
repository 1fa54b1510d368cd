"""Scores, gradients and what may not matter, of a detector with random weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.ops import box_iou

from gradeclip_ft.detection.detector import (
    Detector,
    Vocabulary,
    best_boxes,
    fuse,
    load_detector,
)
from gradeclip_ft.detection.objective import DetectionObjective
from gradeclip_ft.detection.pyramid import inner_maps
from gradeclip_ft.models.trace import UnsupportedTowerError
from gradeclip_ft.ops.similarity import unit
from tests.detection.conftest import (
    BASE,
    NAMES,
    make_detection_batch,
    make_detector,
    settings,
)
from tests.tiny import FAMILIES, images, make_tiny_clip

BLOCKS = [family for family in FAMILIES if family != "resnet"]


def test_score_is_the_geometric_mean_of_the_formula() -> None:
    """Would catch exponents that are swapped, and background that is treated as novel."""
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.rand(5, 4, generator=draw).softmax(1) for _ in range(2))
    found = fuse(p, q, torch.tensor([True, False, True]), settings())
    for row in range(5):
        for column, share in enumerate([0.1, 0.8, 0.1, 0.1]):
            expected = float(p[row, column]) ** (1 - share) * float(q[row, column]) ** share
            assert float(found[row, column]) == pytest.approx(expected, rel=1e-5)


def test_boxes_are_kept_as_a_loop_keeps_them() -> None:
    """Would catch suppression across classes, and a limit before it."""
    draw = torch.Generator().manual_seed(0)
    corner = torch.rand(30, 2, generator=draw) * 10
    boxes = torch.cat([corner, corner + 8], 1)
    scores = torch.rand(30, 3, generator=draw) * 0.05
    how = settings(boxes=20)
    kept: list[tuple[float, int, int]] = []
    order = sorted(((float(scores[r, c]), r, c) for r in range(30) for c in range(3)), reverse=True)
    for score, row, label in order:
        if score > 0.01 and all(
            label != other or float(box_iou(boxes[row][None], boxes[r][None])) <= 0.4
            for _, r, other in kept
        ):
            kept.append((score, row, label))
    found = best_boxes(boxes, scores, how)
    assert found.labels.tolist() == [label for _, _, label in kept[:20]]
    torch.testing.assert_close(found.boxes, boxes[[row for _, row, _ in kept[:20]]])


@pytest.mark.parametrize("family", BLOCKS)
def test_inner_maps_are_the_library_s_tokens_and_the_dense_features(family: str) -> None:
    """Would catch a block too few, a class token among the patches, and another value path."""
    clip = make_tiny_clip(family)
    if clip.image.unexplained is not None:
        pytest.skip(f"no pass: {clip.image.unexplained}")
    pixels = images(clip, 2)
    maps, dense = inner_maps(clip.image, pixels, [0])
    torch.testing.assert_close(dense, clip.image.trace(pixels).dense(), rtol=1e-4, atol=1e-5)
    seen: list[torch.Tensor] = []
    trunk = getattr(clip.model.visual, "trunk", None)
    blocks = clip.model.visual.transformer.resblocks if trunk is None else trunk.blocks
    handle = blocks[0].register_forward_hook(lambda module, given, out: seen.append(out))
    clip.model.visual(pixels)
    handle.remove()
    tokens = seen[0] if seen[0].shape[0] == 2 else seen[0].transpose(0, 1)
    expected = tokens[:, -16:].transpose(1, 2).reshape(2, -1, 4, 4)
    torch.testing.assert_close(maps[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", BLOCKS)
def test_every_tower_with_inner_tokens_can_be_the_backbone(family: str) -> None:
    """Would catch a tower whose width or token order the pyramid does not expect."""
    clip = make_tiny_clip(family)
    if clip.image.unexplained is not None:
        with pytest.raises(UnsupportedTowerError, match="no detector can be built"):
            make_detector(clip=clip)
        return
    detector = make_detector(clip=clip, side=4 * clip.image.patch, templates=("a {}",))
    batch = make_detection_batch(2, side=4 * clip.image.patch)
    found = detector.detect(batch.images, batch.sizes, detector.vocabulary(NAMES, BASE))
    assert len(found) == 2


def test_a_tower_without_inner_tokens_is_refused() -> None:
    """Would catch a detector on a ResNet that trains on something else."""
    with pytest.raises(UnsupportedTowerError, match="no tokens of inner layers"):
        make_detector("resnet", side=256)


def test_settings_that_cannot_be_are_refused(detector: Detector) -> None:
    """Would catch a silent change of the size, of the blocks or of the names."""
    with pytest.raises(ValueError, match="use 64"):
        make_detector(side=60)
    with pytest.raises(UnsupportedTowerError, match="give blocks from 0 to 0"):
        make_detector(inner=(0, 1, 1))
    with pytest.raises(ValueError, match="three blocks"):
        make_detector(inner=(0, 0))
    with pytest.raises(ValueError, match="write vild"):
        make_detector(templates="coco").vocabulary(NAMES, BASE)
    with pytest.raises(ValueError, match="given twice: cat"):
        detector.vocabulary(["cat", "cat"], [])
    with pytest.raises(ValueError, match="without background"):
        detector.vocabulary(["cat", "background"], [])


def test_novel_columns_get_no_gradient_and_base_columns_do(
    detector: Detector, vocabulary: Vocabulary
) -> None:
    """Would catch novel classes that compete, and so are pushed away, in training."""
    embeddings = vocabulary.embeddings.clone().requires_grad_()
    batch = make_detection_batch()
    objective = DetectionObjective(samples=16)
    torch.manual_seed(0)
    detector.train()
    objective(detector, batch, replace(vocabulary, embeddings=embeddings)).total.backward()
    assert embeddings.grad is not None
    moved = embeddings.grad.abs().sum(1) > 0
    assert moved.tolist() == [True, False, True, False, True]


def test_class_loss_equals_cross_entropy_over_base_classes_alone(
    detector: Detector, vocabulary: Vocabulary
) -> None:
    """Would catch a background weight that also divides, and wrong places of labels."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=draw)
    label = torch.tensor([0, 2, 4, 4, 0, 2])
    found = DetectionObjective()._class_loss(logits, label, vocabulary)
    for row in range(6):
        known = logits[row, [0, 2, 4]].log_softmax(0)
        weight = 0.6 if label[row] == 4 else 1.0
        expected = -weight * known[[0, 2, 4].index(int(label[row]))]
        torch.testing.assert_close(found[row], expected)


def test_the_frozen_model_gets_no_gradient_and_stays_in_evaluation_mode(
    vocabulary: Vocabulary, detector: Detector
) -> None:
    """Would catch a backbone that learns, and one that every parameter of the rest waits for."""
    detector.train()
    assert not any(part.training for part in detector.clip.modules())
    before = {name: x.clone() for name, x in detector.clip.state_dict().items()}
    DetectionObjective(samples=16)(detector, make_detection_batch(), vocabulary).total.backward()
    assert all(p.grad is None for p in detector.clip.parameters())
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)
    assert all(torch.equal(x, detector.clip.state_dict()[name]) for name, x in before.items())


def test_one_image_at_a_time_gives_what_a_batch_gives(
    detector: Detector, vocabulary: Vocabulary
) -> None:
    """Would catch boxes of one image among those of another."""
    batch = make_detection_batch()
    together = detector.detect(batch.images, batch.sizes, vocabulary)
    for row, expected in enumerate(together):
        (alone,) = detector.detect(
            batch.images[row : row + 1], batch.sizes[row : row + 1], vocabulary
        )
        assert len(alone.boxes)
        assert torch.equal(alone.labels, expected.labels)
        torch.testing.assert_close(alone.scores, expected.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(alone.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
        assert (alone.boxes[:, 2] <= batch.sizes[row, 1]).all()
        assert (alone.boxes[:, 3] <= batch.sizes[row, 0]).all()


def test_boxes_keep_their_digits_in_mixed_precision(
    detector: Detector, vocabulary: Vocabulary
) -> None:
    """Would catch boxes decoded in bf16, whose 8 bits place them on a coarse grid."""
    batch = make_detection_batch(2)
    # Fused attention in bf16 asks the processor for AVX-512, whatever ATEN_CPU_CAPABILITY allows.
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        levels, _ = detector.features(batch.images)
        (proposals, *_), _ = detector.propose(batch.images, batch.sizes, levels)
        (found, *_) = detector.detect(batch.images, batch.sizes, vocabulary)
        detector.train()
        loss = DetectionObjective(samples=16)(detector, batch, vocabulary).total
    assert loss.isfinite()
    for boxes in (proposals, found.boxes):
        assert boxes.dtype == torch.float32
        assert (boxes.bfloat16().float() != boxes).float().mean() > 0.3


def test_permuted_names_permute_scores(detector: Detector) -> None:
    """Would catch labels by place where names are meant."""
    batch, order = make_detection_batch(2), [2, 0, 3, 1]
    plain = detector.detect(batch.images, batch.sizes, detector.vocabulary(NAMES, BASE))
    names = [NAMES[k] for k in order]
    mixed = detector.detect(batch.images, batch.sizes, detector.vocabulary(names, BASE))
    for one, other in zip(plain, mixed, strict=True):
        assert [NAMES[k] for k in one.labels] == [names[k] for k in other.labels]
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-7)


def test_frozen_scores_are_cosines_of_the_dense_map_at_the_place(
    detector: Detector, vocabulary: Vocabulary
) -> None:
    """Would catch boxes that are scaled or shifted against the grid: one cell gives one token."""
    dense = torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    # A box of one cell samples its centre, where aligned pooling finds the cell's own value.
    rois = torch.tensor([[0, 16.0, 24, 24, 32], [1, 0, 8, 8, 16]])
    found = detector.frozen_logits(dense, rois, 64, vocabulary)
    expected = 75 * unit(torch.stack([dense[0, 3, 2], dense[1, 1, 0]])) @ vocabulary.embeddings.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_weights_of_a_detector_and_of_its_clip_are_told_apart(tmp_path: Path) -> None:
    """Would catch a detector that is evaluated with heads at random."""
    how = settings(inner=(0, 1, 1), templates=("this is a photo of the {}",))
    torch.manual_seed(1)
    first = load_detector("shapes_tiny", settings=how)
    path = tmp_path / "weights.safetensors"
    save_file(first.clip.model.state_dict(), path)
    again = load_detector("shapes_tiny", path, settings=how)
    assert again.weights_hash == first.weights_hash
    torch.manual_seed(2)
    assert load_detector("shapes_tiny", settings=how).weights_hash != first.weights_hash
    inner = tmp_path / "clip.safetensors"
    assert isinstance(first.clip, Detector)
    save_file({k: v + 1 for k, v in first.clip.clip.model.state_dict().items()}, inner)
    other = load_detector("shapes_tiny", inner, settings=how)
    assert isinstance(other.clip, Detector)
    got, was = (x.clip.model.state_dict()["visual.proj"] for x in (other.clip, first.clip))
    torch.testing.assert_close(got, was + 1)
    with pytest.raises(ValueError, match="does not fit"):
        load_detector("shapes_tiny", path, settings=replace(how, channels=24))
