"""Names and weights to models; wrong ones say what to do."""

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from gradeclip_ft.models.clip import ImageTransform, Preprocessing
from gradeclip_ft.models.load import load_clip
from tests.tiny import make_tiny_clip


def test_the_packaged_clip_loads_and_matches_its_texts() -> None:
    loaded = load_clip("shapes_tiny")
    assert loaded.image_size == (64, 64)
    with torch.no_grad():
        texts = loaded.clip.text.encode(loaded.tokenizer(["a red circle", "a blue star"]))
    assert texts.isfinite().all()
    assert loaded.weights_hash == load_clip("shapes_tiny").weights_hash
    assert loaded.weights_hash != load_clip("shapes_tiny", "random").weights_hash


def test_another_image_size_changes_the_grid() -> None:
    loaded = load_clip("shapes_tiny", image_size=96)
    with torch.no_grad():
        assert loaded.clip.image.trace(torch.zeros(1, 3, 96, 96)).grid == (12, 12)


def test_unknown_names_suggest_the_closest() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'ViT-B16'; did you mean .*ViT-B-16"):
        load_clip("ViT-B16")


def test_missing_weights_are_asked_for() -> None:
    with pytest.raises(ValueError, match="no weights given for ViT-B-16; choose a tag"):
        load_clip("ViT-B-16")


def test_an_unknown_tag_lists_the_tags() -> None:
    with pytest.raises(ValueError, match=r"no weights tag 'opena'; choose a tag \(openai"):
        load_clip("ViT-B-16", "opena")


@pytest.mark.parametrize("name", ["EVA02-B-16", "shapes_tiny"])
def test_an_image_size_that_the_patch_does_not_divide_is_refused(name: str) -> None:
    weights = None if name == "shapes_tiny" else "random"
    with pytest.raises(ValueError, match="225 is not a multiple of the patch size"):
        load_clip(name, weights, image_size=225)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    torch.save(make_tiny_clip("resnet").model.state_dict(), tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_clip("shapes_tiny", tmp_path / "resnet.pt")


@pytest.mark.parametrize("size", [(90, 70), (320, 240), (240, 320), (33, 47), (64, 64)])
def test_evaluation_transform_equals_open_clips(size: tuple[int, int]) -> None:
    """The same picture through both pipelines, also where the longer side is no whole number."""
    picture = Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 60).convert("RGB")
    expected = open_clip.image_transform(32, is_train=False)(picture)
    got = ImageTransform((32, 32), Preprocessing())(picture)
    # open_clip resizes the picture with PIL as well; crops agree to the pixel
    torch.testing.assert_close(got, expected)


def test_training_crops_at_random_and_never_flips() -> None:
    """Captions say left and right (traps: B12): brightness rises from left to right."""
    picture = Image.linear_gradient("L").rotate(90).convert("RGB").resize((64, 32))
    transform = ImageTransform((32, 32), Preprocessing(), train=True)
    crops = [transform(picture) for _ in range(20)]
    assert len({crop.sum().item() for crop in crops}) > 1
    assert all(crop[0, 16, -1] > crop[0, 16, 0] for crop in crops)
