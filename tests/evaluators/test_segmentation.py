"""Segmentation: counts against loops, windows against one picture, an encoder that knows it all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from gradeclip_ft.data.segmentation import LabelFolder, PanopticLabels, Resize
from gradeclip_ft.evaluators.base import run_all
from gradeclip_ft.evaluators.segmentation import Cut, SegmentationEvaluator, Segmenter, segment
from gradeclip_ft.metrics import SegmentationMatrix
from gradeclip_ft.models.clip import LoadedClip
from tests.evaluators.conftest import NAMES, STUFF, THINGS, colour_of

Load = Callable[..., LoadedClip]
PROMPT = ("a photo of the {}.",)
PLAIN = Segmenter(templates=PROMPT)


def naive_miou(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int) -> list[float | None]:
    """Class by class and pixel by pixel, with Python's own numbers."""
    found: list[float | None] = []
    for label in range(classes):
        both = either = 0
        for truth, said in pairs:
            for true, predicted in zip(truth.ravel().tolist(), said.ravel().tolist(), strict=True):
                if true != 255:
                    both += true == label and predicted == label
                    either += true == label or predicted == label
        found.append(both / either if either else None)
    return found


def test_the_matrix_counts_as_a_loop_over_pixels_does() -> None:
    """Over the set, not by image; 255 counts nowhere; a class that is nowhere has no value."""
    random = np.random.default_rng(0)
    pairs = []
    for height, width in ((5, 7), (6, 3), (4, 4)):
        truth = random.integers(0, 3, (height, width)).astype(np.uint8)
        truth[random.random((height, width)) < 0.3] = 255
        pairs.append((truth, random.integers(0, 4, (height, width))))  # 3 is said, never true
    matrix, halves = SegmentationMatrix(6), [SegmentationMatrix(6) for _ in range(2)]
    for number, (truth, said) in enumerate(pairs):
        for one in (matrix, halves[number % 2]):
            one.update(torch.from_numpy(truth), torch.from_numpy(said))
    assert torch.equal(halves[0].pixels + halves[1].pixels, matrix.pixels)
    expected = naive_miou(pairs, 6)
    assert expected[3] == 0.0
    assert expected[4:] == [None, None]
    got = [None if math.isnan(value) else value for value in matrix.by_class[0].tolist()]
    assert got == pytest.approx(expected)
    known = [value for value in expected if value is not None]
    assert matrix.mean()["mIoU"] == pytest.approx(sum(known) / 4)
    kept = np.concatenate([(truth == said)[truth != 255] for truth, said in pairs])
    assert matrix.mean()["aAcc"] == pytest.approx(kept.mean())


def canvas(
    maps: list[Tensor], size: tuple[int, int], target: tuple[int, int], patch: int, stride: int
) -> Tensor:
    """As the published programs do it: every window enlarged and added, divided, enlarged again."""
    total, count = torch.zeros(len(maps[0]), *size), torch.zeros(size)
    side, rest = maps[0].shape[1] * patch, iter(maps)
    rows, columns = (max(length - side + stride - 1, 0) // stride + 1 for length in size)
    for row, column in product(range(rows), range(columns)):
        bottom = min(row * stride + side, size[0])
        right = min(column * stride + side, size[1])
        top, left = max(bottom - side, 0), max(right - side, 0)
        one = interpolate(next(rest)[None], (side, side), mode="bilinear", align_corners=False)
        total[:, top:bottom, left:right] += one[0]
        count[top:bottom, left:right] += 1
    return interpolate((total / count)[None], target, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize(
    "method",
    [
        Segmenter(window=32, stride=16),
        Segmenter(window=32, stride=16, scale=9.0, threshold=0.3),
        Segmenter(window=32, stride=16, scale=9.0, threshold=0.2, least_area=0.2),
        Segmenter(window=32, stride=16, scale=1.0, average="probabilities"),
    ],
    ids=["plain", "threshold", "area", "tips"],
)
@pytest.mark.parametrize("target", [(70, 61), (40, 33)])
def test_labels_are_those_of_the_published_programs(
    method: Segmenter, target: tuple[int, int]
) -> None:
    """One matrix for each axis against a canvas at every step, 5 classes of 1 to 20 queries."""
    generator = torch.Generator().manual_seed(0)
    words = [20, 1, 3, 1, 1]
    owner = torch.arange(5).repeat_interleave(torch.tensor(words))
    cut = Cut.of(torch.zeros(3, 50, 64), 32, 16, 8)
    maps = [torch.rand(len(owner), 4, 4, generator=generator) for _ in cut.windows]
    scale = method.scale
    if method.average == "probabilities":
        large = [interpolate(m[None], (32, 32), mode="bilinear")[0].softmax(0) for m in maps]
        prob = canvas(large, (50, 64), target, 1, 16)
    else:
        prob = (scale * canvas(maps, (50, 64), target, 8, 16)).softmax(0)
    scores = torch.stack([prob[owner == label].amax(0) for label in range(5)])
    if method.least_area:  # SCLIP's program
        area = torch.nn.functional.one_hot(scores.argmax(0), 5).float()[:, :, 1:].sum((0, 1))
        scores[1:] *= (area > method.least_area * area.sum()).float()[:, None, None]
    expected = scores.argmax(0)
    expected[scores.amax(0) < method.threshold] = 0
    got = segment(maps, cut, target, method, owner)
    margin = scores.topk(2, 0).values
    sure = (margin[0] - margin[1] > 1e-5) & ((scores.amax(0) - method.threshold).abs() > 1e-5)
    assert sure.float().mean() > 0.99
    assert torch.equal(got[sure], expected[sure])
    assert len(expected.unique()) >= 3


def test_one_window_over_everything_is_the_whole_picture() -> None:
    generator = torch.Generator().manual_seed(1)
    pixels, owner = torch.randn(3, 48, 48, generator=generator), torch.arange(7)
    maps = [torch.rand(7, 6, 6, generator=generator)]
    labels = [
        segment(maps, Cut.of(pixels, window, stride, 8), (57, 51), PLAIN, owner)
        for window, stride in ((48, 16), (None, None))
    ]
    assert torch.equal(*labels)


def test_a_whole_picture_that_the_patch_does_not_divide_is_padded_on_all_sides() -> None:
    """ClearCLIP's padding; pixels stay where they are."""
    cut = Cut.of(torch.ones(3, 21, 34), None, None, 8)
    assert cut.windows[0].shape == (3, 24, 40)
    assert torch.equal(cut.windows[0][:, 1:22, 3:37], torch.ones(3, 21, 34))
    assert cut.windows[0].sum() == 3 * 21 * 34
    steps = torch.arange(5.0).expand(1, 3, 5).clone()
    whole = interpolate(steps[None], (24, 40), mode="bilinear")[0, :, 1:22, 3:37]
    both = torch.cat([whole, 2.0 - whole])
    got = segment([torch.cat([steps, 2.0 - steps])], cut, (21, 34), PLAIN, torch.arange(2))
    assert torch.equal(got, both.argmax(0))


def test_the_short_side_is_resized_as_mmseg_does() -> None:
    """Sides rounded half up, as mmcv, and values as OpenCV's: without antialias."""
    image = Image.fromarray(
        np.arange(427 * 640 * 3, dtype=np.uint32).astype(np.uint8).reshape(427, 640, 3)
    )
    assert Resize(336)(image).shape == (3, 336, 504)
    assert Resize(336)(image.rotate(90, expand=True)).shape == (3, 504, 336)
    assert Resize(448, "bicubic")(image).shape == (3, 448, 671)
    ramp = Image.fromarray(
        np.repeat(np.arange(0, 240, 30, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2)
    )
    assert Resize(4)(ramp)[0, 0].tolist() == [15, 75, 135, 195]


@pytest.fixture(scope="module")
def quarters(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Pictures of four classes each, with label maps; `band` pixels at the edges do not count."""

    def make(sizes: list[tuple[int, int]], band: int = 0, first: int = 0) -> dict[str, Any]:
        root = tmp_path_factory.mktemp("quarters")
        for name in ("images", "labels"):
            (root / name).mkdir()
        for number, (height, width) in enumerate(sizes):
            labels = np.zeros((height, width), np.uint8)
            half = height // 2 // 16 * 16 or 1, width // 2 // 16 * 16 or 1
            for place, (y, x) in enumerate(product((0, 1), (0, 1))):
                rows = slice(half[0], None) if y else slice(half[0])
                columns = slice(half[1], None) if x else slice(half[1])
                labels[rows, columns] = (number * 4 + place) % 12
            pixels = np.array([colour_of(label) for label in range(12)], np.uint8)[labels]
            Image.fromarray(pixels).save(root / "images" / f"{number}.png")
            stored = labels + np.uint8(first)
            if band:
                stored[half[0] - band : half[0] + band] = 255
                stored[:, half[1] - band : half[1] + band] = 255
            Image.fromarray(stored).save(root / "labels" / f"{number}.png")
        return {
            "images": str(root / "images"),
            "labels": str(root / "labels"),
            "classes": dict.fromkeys(THINGS),
            "split": "quarters",
            "image_suffix": ".png",
            "first": first,
        }

    return make


@pytest.mark.parametrize(
    ("method", "sizes", "band"),
    [
        (Segmenter(side=224, templates=PROMPT), [(224, 224), (224, 448), (448, 224)], 0),
        (
            Segmenter(side=336, window=224, stride=112, templates=PROMPT),
            [(336, 336), (336, 560), (560, 336)],
            0,
        ),
        (
            Segmenter(side=336, window=224, stride=112, templates=PROMPT),
            [(427, 640), (333, 500), (375, 501), (640, 480), (224, 1001)],
            24,
        ),
        (Segmenter(side=225, templates=PROMPT), [(333, 500), (225, 225), (501, 375)], 24),
        (
            Segmenter(
                side=448,
                window=448,
                stride=336,
                interpolation="bicubic",
                templates=PROMPT,
                scale=1.0,
                average="probabilities",
            ),
            [(427, 640), (333, 500), (501, 375)],
            24,
        ),
    ],
    ids=["224", "336", "windows at odd sizes", "whole at odd sizes", "tips"],
)
def test_a_perfect_encoder_scores_one(
    quarters: Callable[..., dict[str, Any]],
    load: Load,
    method: Segmenter,
    sizes: list[tuple[int, int]],
    band: int,
) -> None:
    """A slip of a patch anywhere between resize, windows and enlargement would cost pixels.

    Where edges lie between patches, pixels closer than that to an edge do not count.
    """
    data = LabelFolder(**quarters(sizes, band))
    evaluator = SegmentationEvaluator("s", data, {"one": method}, batch_size=4, pictures=0)
    measured = evaluator(load(224, 16))
    assert measured.metrics == {"one/mIoU": 1.0, "one/mAcc": 1.0, "one/aAcc": 1.0}
    assert measured.protocol["image_size"] == method.side


def test_numbers_in_the_files_become_labels(
    quarters: Callable[..., dict[str, Any]], load: Load
) -> None:
    """Shifted by one with 0 ignored (ADE20K); some classes, all others background (COCO)."""
    paths = quarters([(224, 224)] * 3, first=1)
    shifted = LabelFolder(**paths)()
    plain = LabelFolder(**{**paths, "first": 0, "classes": dict.fromkeys([*THINGS, "more"])})()
    assert (shifted[1][1] + 1 == plain[1][1]).all()
    some = {"background": ["thing 3", "stuff 0"], "thing 7": None, "thing 1": ["thing 1"]}
    objects = LabelFolder(**{**paths, "classes": some, "ids": [None, 8, 2], "rest": 0})
    for number in range(3):
        expected = np.select([plain[number][1] == 8, plain[number][1] == 2], [1, 2], 0)
        assert (objects()[number][1] == expected).all()
    assert objects().labels == {0, 1, 2}
    assert objects().queries["background"] == ["thing 3", "stuff 0"]
    # A patch of another class is equally far from all four words, and has 1/4 for each of them; the
    # threshold is the probability of a word half way between its patch and such a one.
    half = math.exp(0.5) / (math.exp(0.5) + 3)
    only = Segmenter(side=224, templates=PROMPT, scale=1.0, threshold=half)
    measured = SegmentationEvaluator("s", objects, {"one": only}, pictures=0)(load(224, 16))
    assert measured.metrics["one/mIoU"] > 0.99  # but for corners


def test_the_protocol_tells_lists_of_classes_apart_before_the_data_are_read(
    quarters: Callable[..., dict[str, Any]], load: Load
) -> None:
    """Also by their order, which decides what a number in the files means."""
    paths = quarters([(224, 224)])
    names = list(paths["classes"])
    lists = [names, names[::-1], [*names[:-1], "other"]]
    evaluators = [
        SegmentationEvaluator(
            "s", LabelFolder(**{**paths, "classes": dict.fromkeys(each)}), {"a": PLAIN}, pictures=0
        )
        for each in lists
    ]
    stated = [json.dumps(evaluator.protocol) for evaluator in evaluators]
    assert len(set(stated)) == len(lists)
    assert evaluators[0].protocol.items() <= evaluators[0](load(224, 16)).protocol.items()


def test_a_threshold_without_background_is_refused(
    quarters: Callable[..., dict[str, Any]], load: Load
) -> None:
    """Class 0 is an ordinary class there: forgetting that gives 0.07 instead of 0.8 on VOC20."""
    data = LabelFolder(**quarters([(224, 224)]))
    evaluator = SegmentationEvaluator(
        "voc20", data, {"naclip": Segmenter(threshold=0.1, templates=PROMPT)}
    )
    with pytest.raises(ValueError, match=r"the first class of voc20 is 'thing 0'; set both to 0"):
        evaluator(load(224, 16))


def test_what_cannot_be_measured_is_named(
    quarters: Callable[..., dict[str, Any]], load: Load, tmp_path: Path
) -> None:
    paths = quarters([(224, 224)])
    with pytest.raises(ValueError, match="window=224 and stride=None: give both"):
        Segmenter(window=224)
    with pytest.raises(ValueError, match=r"methods=\['sclp'\]: choose from sclip"):
        SegmentationEvaluator("s", LabelFolder(**paths), {"sclip": PLAIN}, methods=["sclp"])
    odd = SegmentationEvaluator(
        "s", LabelFolder(**paths), {"a": Segmenter(window=224, stride=112, templates=PROMPT)}
    )
    with pytest.raises(ValueError, match=r"windows of 224 .* patch size 15; set window .* to 210"):
        odd(load(225, 15))
    with pytest.raises(ValueError, match=r"holds RGB pixels, expected one number"):
        LabelFolder(**{**paths, "labels": paths["images"]})()[0]
    with pytest.raises(ValueError, match="12 classes have 2 ids"):
        LabelFolder(**paths, ids=[0, 1])()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 annotated images are not in"):
        LabelFolder(**{**paths, "image_suffix": ".jpg"})()
    with pytest.raises(FileNotFoundError, match=r"no label map \*_x.png"):
        LabelFolder(**paths, label_suffix="_x.png")()
    Image.new("L", (10, 10)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"224 x 224 pixels .*, its label map 10 x 10"):
        LabelFolder(**{**paths, "labels": str(tmp_path)})()[0]


@pytest.mark.parametrize("stuff", ["classes", "background", "ignored"])
def test_panoptic_files_are_a_segmentation_set(
    world: Any, load: Load, tmp_path: Path, stuff: str
) -> None:
    """Things, stuff and both together; the page beside the result shows them."""
    data = PanopticLabels(**world.panoptic, split="world", stuff=stuff)
    images = data()
    expected = {"classes": NAMES, "background": ("background", *THINGS), "ignored": THINGS}
    assert tuple(images.classes) == expected[stuff]
    for number, (name, rectangles) in enumerate(world.rectangles.items()):
        assert images.names[number] == name
        truth = images[number][1]
        for label, x, y, width, height in rectangles:
            wanted = {"classes": label, "background": label + 1, "ignored": label}[stuff]
            if label >= len(THINGS):
                wanted = {"classes": label, "background": 0, "ignored": 255}[stuff]
            assert (truth[y : y + height, x : x + width] == wanted).all()
    if stuff == "background":
        assert images.queries["background"] == [*STUFF]
    two = {"whole": Segmenter(side=448, templates=PROMPT), "dense": PLAIN}
    evaluator = SegmentationEvaluator("seg", data, two, pictures=3, batch_size=5, workers=0)
    loaded = load(224, 16)
    (result,) = run_all({"seg": evaluator}, loaded, folder=tmp_path)
    assert result.metrics["whole/mIoU"] > 0.9  # edges between patches
    assert result.metrics["whole/mIoU"] > result.metrics["dense/mIoU"] > 0.75
    assert result.protocol["image_size"] == [448, 224]
    stored = json.loads((tmp_path / "seg@0.json").read_text())
    assert set(stored["details"]["by_class"]["whole"]) == set(images.classes)
    page = (tmp_path / "seg@0.html").read_text()
    assert page.count("<article") == 3
    assert "Worst confusions" in page
    assert page.count("<img") == 3 * 4  # picture, truth and two methods
