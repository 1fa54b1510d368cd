"""Classifiers: the library's logits, weights files, class names."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from gradeclip_ft.models.other.classifier import LoadedClassifier, load_classifier
from gradeclip_ft.models.trace import UnsupportedTowerError
from tests.tiny_foreign import CLASSIFIERS, make_tiny_classifier, shake

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_logits_are_the_librarys(kind: str) -> None:
    """Catches a forgotten bias, norm, layer scale, rotation or position."""
    model, pixels = make_tiny_classifier(kind), torch.randn(3, 3, 32, 32)
    expected = model.model(pixels)
    torch.testing.assert_close(model.image.encode(pixels), expected, **CLOSE)
    trace = model.image.trace(pixels)
    torch.testing.assert_close(
        trace.score(trace.embedding, torch.eye(7)[[2, 0, 2]]),
        expected[[0, 1, 2], [2, 0, 2]],
        **CLOSE,
    )


@pytest.fixture(scope="module")
def loaded() -> LoadedClassifier:
    return load_classifier("timm:vit_tiny_patch16_224", "random")


def test_a_classifier_knows_its_pixels_and_classes(
    loaded: LoadedClassifier, tmp_path: Path
) -> None:
    """Statistics of timm's own configuration; ImageNet's names for a thousand classes."""
    assert loaded.preprocessing.mean == loaded.preprocessing.std == (0.5, 0.5, 0.5)
    assert (loaded.image_size, loaded.classifier.image.patch) == ((224, 224), 16)
    assert loaded.count == 1000
    assert loaded.targets(["goldfish", 7, "8", "Tench"]).argmax(1).tolist() == [1, 7, 8, 0]
    assert loaded.targets(["goldfish"]).sum() == 1


def test_torchvision_brings_its_own_statistics_and_names() -> None:
    loaded = load_classifier("torchvision:vit_b_32", "random", image_size=96)
    assert loaded.preprocessing.mean == (0.485, 0.456, 0.406)
    assert loaded.preprocessing.interpolation == "bilinear"
    assert loaded.image_size == (96, 96)
    assert loaded.targets(["great white shark"]).argmax() == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensh"], r"no class 'tensh' among 1000; did you mean tench"),
        (["crane"], r"'crane' names several classes; give a number: 134, 517"),
        ([1000], r"class 1000 of 1000; choose 0 to 999"),
        ([-1], r"class -1 of 1000"),
    ],
)
def test_a_class_that_is_none_is_refused(
    loaded: LoadedClassifier, names: list[str | int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loaded.targets(names)


@pytest.mark.parametrize(
    ("library", "suffix"), [("timm", ".safetensors"), ("timm", ".pt"), ("torchvision", ".pt")]
)
def test_weights_of_ones_own_are_read(library: str, suffix: str, tmp_path: Path) -> None:
    """Three classes with names from a file; the file says how many there are."""
    torch.manual_seed(0)
    if library == "timm":
        name, size = "vit_tiny_patch16_224", 224
        theirs = shake(timm.create_model(name, num_classes=3))
    else:
        name, size = "vit_b_32", 64
        theirs = torchvision.models.get_model(name, weights=None, num_classes=3, image_size=size)
        shake(theirs.heads)  # torchvision's start at zero
    state = {key: value.contiguous() for key, value in theirs.eval().state_dict().items()}
    file = tmp_path / f"mine{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save({"state_dict": state}, file)
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    loaded = load_classifier(f"{library}:{name}", file, classes=tmp_path / "names.txt")
    assert loaded.classes == ("cat", "dog", "bird")
    assert loaded.image_size == (size, size)
    pixels = torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(loaded.classifier.image.encode(pixels), theirs(pixels), **CLOSE)
    assert loaded.targets(["bird"]).tolist() == [[0.0, 0.0, 1.0]]


def test_names_are_as_many_as_classes(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "mine.pt")
    with pytest.raises(ValueError, match=r"2 class names, but .* has 3 classes"):
        load_classifier("timm:vit_tiny_patch16_224", tmp_path / "mine.pt", classes=["cat", "dog"])


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("timm:vit_tiny_patch16_24", "random", "did you mean vit_tiny_patch16_224"),
        ("torchvision:vit_b_61", "random", "did you mean vit_b_16"),
        ("vit_b_16", "random", "expected timm:NAME or torchvision:NAME"),
        (
            "timm:vit_tiny_patch16_224",
            None,
            "choose a tag .*augreg_in21k_ft_in1k.*, a file, or `random`",
        ),
        ("torchvision:vit_b_16", "V1", r"no weights tag 'V1'; choose a tag \(IMAGENET1K_V1"),
        ("timm:vit_small_patch14_dinov2", "random", "has no head of classes"),
    ],
)
def test_a_classifier_that_is_not_there_is_named(
    name: str, weights: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_classifier(name, weights)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "timm's ResNet"),
        ("eva02_tiny_patch14_336", "pools by 'avg'"),
        ("deit_tiny_distilled_patch16_224", "a second class token"),
    ],
)
def test_classifiers_without_one_query_say_why(name: str, reason: str) -> None:
    with pytest.raises(
        UnsupportedTowerError, match=rf"{reason}.* Choose a classifier with a class"
    ):
        load_classifier(f"timm:{name}", "random")


def test_published_weights_that_cannot_be_fetched_name_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tag alone reaches the network; without one the message says what to do."""

    def offline(*_: object, **__: object) -> nn.Module:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"cannot be fetched \(OSError: no route.* give the file"):
        load_classifier("timm:vit_tiny_patch16_224.augreg_in21k")
