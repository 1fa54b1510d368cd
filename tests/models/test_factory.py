"""Names and weights to models; wrong ones say what to do."""

import open_clip
import pytest
import torch
from PIL import Image

from gradeclip_ft.models.clip import ImageTransform, Preprocessing
from gradeclip_ft.models.load import load_clip


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


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("ViT-B16", None, r"unknown model 'ViT-B16'; did you mean .*ViT-B-16"),
        ("ViT-B-16", None, "no weights given for ViT-B-16; choose a tag"),
        ("ViT-B-16", "opena", r"no weights tag 'opena'; choose a tag \(openai"),
        ("nowhere/here", None, "no folder nowhere/here"),
        ("EVA02-B-16", "random", "225 is not a multiple of the patch size"),
        ("shapes_tiny", None, "225 is not a multiple of the patch size"),
    ],
)
def test_what_is_not_there_is_named(name: str, weights: str | None, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_clip(name, weights, image_size=225)


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
