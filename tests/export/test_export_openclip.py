"""What we write, open_clip loads, and it is the same model."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch

from gradeclip_ft.export.openclip import save_state, write_openclip
from gradeclip_ft.export.verify import (
    ExportError,
    largest_difference,
    pictures,
    verify_openclip,
)
from gradeclip_ft.models.factory import load_clip
from gradeclip_ft.models.openclip import open_folder

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A small architecture that open_clip knows by name, with random weights."""
    path = tmp_path_factory.mktemp("architecture") / "tiny-test-export.json"
    path.write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    return load_clip("tiny-test-export", "random")


@pytest.fixture(scope="module")
def packaged():
    """The packaged CLIP, which open_clip knows no name for."""
    return load_clip("shapes_tiny")


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_the_file_loads_by_name_with_equal_embeddings(registered, tmp_path, form) -> None:
    """G4: prefixes or a wrapping key make open_clip refuse, or ignore, the file."""
    file = write_openclip(registered, tmp_path, form=form)
    assert file.suffix == f".{form}"
    model = open_clip.create_model("tiny-test-export", pretrained=str(file)).eval()
    images, texts = torch.randn(2, 3, 32, 32), registered.tokenizer(["a dog", "two red cars"])
    own = registered.clip.model
    assert torch.equal(model.encode_image(images), own.encode_image(images))
    assert torch.equal(model.encode_text(texts), own.encode_text(texts))
    assert verify_openclip(registered, file) == 0


@pytest.mark.parametrize("which", ["registered", "packaged"])
def test_the_folder_loads_without_a_name_with_its_preprocessing(which, request, tmp_path) -> None:
    """G5: open_clip's own writer stops before the description."""
    loaded = request.getfixturevalue(which)
    write_openclip(loaded, tmp_path)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    for picture in pictures():
        pixels = preprocess(picture)
        torch.testing.assert_close(pixels, loaded.transform()(picture), rtol=0, atol=1e-6)
    assert largest_difference(loaded, model) == 0


def test_another_image_size_by_name(registered, tmp_path) -> None:
    file = tmp_path / "weights.pt"
    save_state(registered.clip.model.state_dict(), file)
    larger = load_clip("tiny-test-export", file, image_size=48)
    assert verify_openclip(larger, write_openclip(larger, tmp_path)) == 0


def test_other_weights_in_the_file_are_noticed(registered, tmp_path) -> None:
    """A check that compares nothing would let this pass."""
    file = write_openclip(registered, tmp_path)
    state = dict(registered.clip.model.state_dict())
    state["visual.proj"] = state["visual.proj"].roll(1, 0)
    save_state(state, file)
    with pytest.raises(ExportError, match="differ by"):
        verify_openclip(registered, file)


def test_one_changed_text_weight_is_noticed(packaged, tmp_path) -> None:
    write_openclip(packaged, tmp_path)
    model = open_folder(tmp_path)
    with torch.no_grad():
        model.ln_final.bias.add_(0.1)
    assert largest_difference(packaged, model) > 1e-3


def test_a_failing_write_leaves_the_previous_export(registered, tmp_path, monkeypatch) -> None:
    file = write_openclip(registered, tmp_path)
    before = file.read_bytes()

    def half(tensors: dict, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("gradeclip_ft.export.openclip.save_file", half)
    with pytest.raises(OSError, match="no space"):
        write_openclip(registered, tmp_path)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


def test_a_single_file_of_an_unregistered_architecture_is_refused(packaged, tmp_path) -> None:
    with pytest.raises(ValueError, match="use format=safetensors"):
        write_openclip(packaged, tmp_path, form="pt")


def test_an_unknown_form_names_the_known_ones(registered, tmp_path) -> None:
    with pytest.raises(ValueError, match="use safetensors or pt"):
        write_openclip(registered, tmp_path, form="onnx")


def test_a_name_taken_for_another_architecture_is_an_error(packaged, registered, tmp_path) -> None:
    """Wrong weights under a right name must not load silently."""
    file = write_openclip(packaged, tmp_path)
    with pytest.raises((RuntimeError, AssertionError)):  # open_clip asserts some shapes
        verify_openclip(replace(registered, clip=packaged.clip), file)
