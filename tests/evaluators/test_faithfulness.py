"""Deletion and insertion of pixels against loops over whole galleries, and how a run resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gradeclip_ft.data.files import ImageSet
from gradeclip_ft.evaluators import faithfulness
from gradeclip_ft.evaluators.curves import area
from gradeclip_ft.evaluators.faithfulness import FaithfulnessEvaluator, perturb
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.explain.maskclip import MaskClip
from gradeclip_ft.explain.raw_attention import RawAttention
from gradeclip_ft.metrics import search
from gradeclip_ft.models.clip import ImageTransform, LoadedClip, Preprocessing
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.ops.similarity import cosine
from tests.evaluators.conftest import Load

SIDE, IMAGES = 16, 6


@dataclass(frozen=True)
class Photos:
    """A source of images that are there."""

    images: ImageSet
    protocol: ClassVar[dict[str, Any]] = {"split": "drawn"}

    def prepare(self) -> None: ...

    def __call__(self) -> ImageSet:
        return self.images


@dataclass(frozen=True)
class Drawn:
    """A method whose maps are random, one for each answer; it counts the pictures it may see."""

    seed: int
    _left: list[int] = field(default_factory=lambda: [1000])
    images_only: ClassVar[bool] = True

    def from_input(self, tower: Any, x: Tensor, target: Tensor, owner: Tensor) -> Tensor:
        self._left[0] -= len(x)
        if self._left[0] < 0:
            raise KeyboardInterrupt
        keys = (target.sum(1) * 1000).round().long() + self.seed
        seeds = [torch.Generator().manual_seed(int(key) % 2**31) for key in keys]
        return torch.stack([torch.rand(4, 4, generator=each) for each in seeds])


@pytest.fixture
def drawn(tmp_path: Path) -> ImageSet:
    """Noise of 16 pixels, so that nothing is resized; two captions each, and a label."""
    random = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(IMAGES)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
    return ImageSet(
        images=paths,
        names=[path.name for path in paths],
        listed=paths,
        captions=[(f"picture {n}", f"again {n + IMAGES}") for n in range(IMAGES)],
        labels=[0, 1, 2, 3, 0, 1],
        classes=[f"thing {n}" for n in range(8)],
    )


@pytest.fixture
def loaded(load: Load) -> LoadedClip:
    table = torch.randn(100, 192, generator=torch.Generator().manual_seed(1))
    model = load(SIDE, 4, table=table)
    # Its embedding is no token of its layers, so nothing may take it from a trace.
    vars(model.clip.image).update(score=cosine, unexplained="its layers")
    return model


def naive(
    loaded: LoadedClip, images: ImageSet, evaluator: FaithfulnessEvaluator, method: Drawn
) -> dict[str, float]:
    """Every changed photo as a PNG's pixels, every score by a search of the whole gallery."""
    transform = loaded.transform()
    photos = [np.asarray(Image.open(path)) for path in images.images]

    def embed(pixels: np.ndarray) -> Tensor:
        picture = transform(Image.fromarray(pixels.astype(np.uint8)))
        return torch.nn.functional.normalize(loaded.clip.image.encode(picture[None])[0], dim=0)

    said = images.captions or [("none 0", "none 1")] * IMAGES
    texts = loaded.encode_texts([text for some in said for text in some])
    classes = loaded.encode_texts([f"the {name}" for name in images.classes])
    original = torch.stack([embed(photo) for photo in photos])
    owner, number = torch.arange(IMAGES).repeat_interleave(2), torch.arange(IMAGES)
    curves: dict[str, list[list[float]]] = {}
    for n, photo in enumerate(photos):
        generator = torch.Generator().manual_seed((evaluator.seed << 32) + n)
        noise = torch.randint(0, 256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        predicted = int((original[n] @ classes.T).argmax())
        asked = {"": texts[2 * n]}
        if evaluator.score == "classification":
            asked = {"_true": classes[images.labels[n]], "_predicted": classes[predicted]}
        for group, target in asked.items():
            heat = method.from_input(None, torch.zeros(1, 3, 1, 1), target[None], torch.zeros(1))
            large = torch.nn.functional.interpolate(heat[None], (SIDE, SIDE), mode="bilinear")
            order = sorted(
                ((y, x) for y in range(SIDE) for x in range(SIDE)),
                key=lambda place: -float(large[0, 0][place]),
            )
            for kind in ("deletion", "insertion"):
                told: dict[str, list[float]] = {}
                for k in range(0 if kind == "deletion" else 1, evaluator.points + 1):
                    changed = photo.copy() if kind == "deletion" else np.zeros_like(photo)
                    for y, x in order[: SIDE * SIDE * k // (2 * evaluator.points)]:
                        put = noise[:, y, x].numpy() if kind == "deletion" else photo[y, x]
                        changed[y, x] = put
                    gallery = original.clone()
                    gallery[n] = embed(changed)
                    found: dict[str, float] = {}
                    if evaluator.score == "cosine":
                        found = {"": float(gallery[n] @ target)}
                    elif evaluator.score == "retrieval":
                        image, _ = search(texts[[2 * n]], gallery, owner[[2 * n]], number)
                        text, _ = search(gallery[[n]], texts, number[[n]], owner)
                        found = {f"_image@{top}": float(image[0] < top) for top in (1, 5)}
                        found |= {f"_text@{top}": float(text[0] < top) for top in (1, 5)}
                    else:
                        best = (gallery[n] @ classes.T).argsort(descending=True).tolist()
                        found = {f"@{top}": float(images.labels[n] in best[:top]) for top in (1, 5)}
                    for way, value in found.items():
                        told.setdefault(f"{kind}{group}{way}", []).append(value)
                for column, values in told.items():
                    curves.setdefault(column, []).append(values)
    areas = {column: float(np.mean(values)) for column, values in curves.items()}
    differences = {
        column.replace("insertion", "imd"): value - areas[column.replace("insertion", "deletion")]
        for column, value in areas.items()
        if column.startswith("insertion")
    }
    return areas | differences


@pytest.mark.parametrize("score", ["classification", "retrieval", "cosine"])
def test_areas_are_those_of_a_search_of_the_whole_changed_gallery(
    drawn: ImageSet, loaded: LoadedClip, score: Any
) -> None:
    """Would catch a slip of ranks, pixels, groups or points; the batch cuts stacks in two."""
    method = Drawn(5)
    drawn = replace(drawn, captions=()) if score == "classification" else drawn
    evaluator = FaithfulnessEvaluator(
        "f",
        Photos(drawn),
        {"first": Drawn(9), "drawn": method},
        score,
        class_names="data",
        templates=["the {}"],
        points=3,
        batch_size=7,
    )
    measured = evaluator(loaded)
    found = {k.split("/")[1]: v for k, v in measured.metrics.items() if k.startswith("drawn")}
    assert found == pytest.approx(naive(loaded, drawn, evaluator, method), abs=2e-5)
    assert measured.details["images"] == list(drawn.names)
    assert measured.details["fractions"] == [0.0, 0.1667, 0.3333, 0.5]
    areas = measured.details["areas"][
        "drawn/deletion"
        + {  # type: ignore[index,call-overload]
            "classification": "_true@5",
            "retrieval": "_text@5",
            "cosine": "",
        }[score]
    ]
    assert len(areas.split()) == IMAGES


def test_a_perfect_order_of_a_sum_of_pixels_has_the_analytic_areas() -> None:
    """Pixels 1 to 64: the k hottest of n weigh the sum of the k largest numbers."""
    values = torch.arange(1, 65).view(8, 8).flip(0)
    photo = values.byte().expand(3, 8, 8)
    counts = list(range(1, 65))
    changed = perturb(photo, torch.zeros_like(photo), values.float(), counts)
    share = changed[:, 0].flatten(1).sum(1).double() / 2080
    deletion, insertion = share.numpy()[:64], share.numpy()[64:]
    expected = np.array([sum(range(65 - k, 65)) / 2080 for k in counts])
    assert np.allclose(insertion, expected)
    assert np.allclose(deletion, 1 - expected)
    assert area(insertion[None], "mean") == pytest.approx(expected.mean())
    assert area(insertion[None], "trapezoid") == pytest.approx(np.trapezoid(expected) / 63)
    worst = perturb(photo, torch.zeros_like(photo), -values.float(), counts)
    assert worst[64:, 0].double().sum() < changed[64:, 0].double().sum()


def test_what_no_method_sees_comes_last_and_equal_heat_in_reading_order() -> None:
    heat = torch.tensor([[torch.nan, 1.0, 1.0], [-2.0, 3.0, torch.nan]])
    photo = torch.full((3, 2, 3), 7, dtype=torch.uint8)
    inserted = perturb(photo, torch.zeros_like(photo), heat, range(1, 7))[6:, 0] > 0
    first = [next(k for k in range(6) if inserted[k, y, x]) for y in range(2) for x in range(3)]
    assert first == [4, 1, 2, 3, 0, 5]


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [(90, 61), (40, 57), (32, 32)])
def test_bytes_on_a_device_become_the_pixels_of_the_transform(
    resize: Any, size: tuple[int, int]
) -> None:
    """PIL and torch round a resize differently, by one grey level."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    transform = ImageTransform((32, 32), Preprocessing(resize=resize))
    planes = torch.from_numpy(pixels).permute(2, 0, 1)
    one = transform(Image.fromarray(pixels))
    many = transform.of_bytes(torch.stack([planes, planes]))
    std = torch.tensor(Preprocessing().std).view(3, 1, 1)
    assert many.shape == (2, 3, 32, 32)
    assert ((many - one) * std * 255).abs().max() < (0.01 if size == (32, 32) else 1.01)


def test_an_interrupted_evaluation_goes_on_where_it_was(
    drawn: ImageSet, loaded: LoadedClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last line was cut off."""
    monkeypatch.setattr(faithfulness, "PHOTOS", 2)

    def evaluator(may_see: int) -> FaithfulnessEvaluator:
        method, folder = Drawn(5, [may_see]), str(tmp_path / "progress")
        return FaithfulnessEvaluator(
            "f", Photos(drawn), {"drawn": method}, "retrieval", points=2, progress=folder
        )

    whole = evaluator(IMAGES)(loaded)
    assert not list((tmp_path / "progress").iterdir())
    with pytest.raises(KeyboardInterrupt):
        evaluator(4)(loaded)
    (file,) = (tmp_path / "progress").iterdir()
    assert [json.loads(line)[0] for line in file.read_text().splitlines()] == [0, 1, 2, 3]
    file.write_text(file.read_text()[:-20])
    resumed = evaluator(3)(loaded)  # those that were not finished, and no more
    assert resumed.metrics == whole.metrics
    assert resumed.details == whole.details


def test_other_class_names_do_not_go_on_from_what_is_there(
    drawn: ImageSet, loaded: LoadedClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lists of names are both "own" in the protocol; only their hash tells them apart.

    It is there before the data are read, so that `again=false` does not keep the other's numbers.
    """
    monkeypatch.setattr(faithfulness, "PHOTOS", 2)
    photos = Photos(replace(drawn, captions=()))

    def evaluator(names: Sequence[str], may_see: int, folder: Path | None) -> FaithfulnessEvaluator:
        return FaithfulnessEvaluator(
            "f",
            photos,
            {"d": Drawn(5, [may_see])},
            "classification",
            class_names=names,
            templates=["the {}"],
            points=2,
            progress=None if folder is None else str(folder),
        )

    names = drawn.classes
    with pytest.raises(KeyboardInterrupt):
        evaluator(names, 4, tmp_path / "progress")(loaded)
    found = evaluator(names[::-1], IMAGES, tmp_path / "progress")(loaded)
    assert found.details == evaluator(names[::-1], IMAGES, None)(loaded).details
    stated = [evaluator(each, 0, None).protocol for each in (names, names[::-1])]
    assert stated[0] != stated[1]
    assert stated[1].items() <= found.protocol.items()


def test_one_pass_explains_and_changed_photos_share_the_others(shared_scenes: ImageSet) -> None:
    """The cost: each changed photo once, and two passes over the photos as they are."""
    loaded, passes = load_clip("shapes_tiny"), []
    loaded.clip.model.visual.conv1.register_forward_hook(lambda *call: passes.append(len(call[2])))
    methods = {"grad_eclip": GradEclip(), "maskclip": MaskClip(), "raw": RawAttention()}
    evaluator = FaithfulnessEvaluator(
        "f", Photos(shared_scenes), methods, "cosine", points=5, batch_size=50
    )
    measured = evaluator(loaded)
    photos, changed = len(shared_scenes), len(shared_scenes) * (1 + 3 * 10)
    assert sum(passes) == 2 * photos + changed
    assert len(passes) <= 2 + -(-changed // 40)
    assert {key.split("/")[0] for key in measured.metrics} == set(methods)


@pytest.fixture
def shared_scenes(tmp_path: Path) -> ImageSet:
    random = np.random.default_rng(3)
    paths = [tmp_path / f"scene {number}.png" for number in range(4)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (80, 64, 3), np.uint8)).save(path)
    names: Sequence[str] = [path.name for path in paths]
    return ImageSet(paths, names, paths, captions=[("a red circle",)] * 4)


def test_bad_requests_say_what_to_change(drawn: ImageSet, loaded: LoadedClip) -> None:
    def evaluate(images: ImageSet, **options: Any) -> Any:
        settings = {"score": "retrieval", **options}
        return FaithfulnessEvaluator("f", Photos(images), {"d": Drawn(0)}, **settings)(loaded)

    bare = ImageSet(drawn.images, drawn.names, drawn.listed, labels=drawn.labels, classes=["a"])
    with pytest.raises(ValueError, match="no captions; set score=classification"):
        evaluate(bare)
    plain = ImageSet(drawn.images, drawn.names, drawn.listed, captions=drawn.captions)
    with pytest.raises(ValueError, match="no classes; set score=retrieval"):
        evaluate(plain, score="classification")
    with pytest.raises(ValueError, match=r"points=0 and share=0.5; give at least 1 point"):
        evaluate(plain, points=0)
    with pytest.raises(ValueError, match="nobody; choose from d"):
        evaluate(plain, methods=["nobody"])
    one = ImageSet(drawn.images[:1], drawn.names[:1], drawn.listed[:1], captions=[("picture 1",)])
    assert evaluate(one).metrics["d/deletion_image@1"] == 1.0
