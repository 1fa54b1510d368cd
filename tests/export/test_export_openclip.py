"""What we write, open_clip loads, and it is the same model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from gradeclip_ft.export.export import NOTE, write_export
from gradeclip_ft.export.job import save_state
from gradeclip_ft.export.openclip import open_folder
from gradeclip_ft.export.verify import (
    HALF_TOLERANCE,
    ExportError,
    Inputs,
    largest_difference,
    pictures,
)
from gradeclip_ft.models.load import load_clip
from tests.export.small import ORIGIN, names_in

TWO = ["a dog", "a cat"]


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_the_file_loads_by_name_with_equal_embeddings(vit, tmp_path, form) -> None:
    """G4: prefixes or a wrapping key make open_clip refuse, or ignore, the file."""
    write_export(vit, "openclip", tmp_path / "out", ORIGIN, form=form)
    file = tmp_path / "out" / f"open_clip_model.{form}"
    model, _, _ = open_clip.create_model_and_transforms("tiny-test-export", pretrained=str(file))
    images, texts = torch.randn(2, 3, 32, 32), vit.tokenizer(["a dog", "two red cars"])
    own, model = vit.clip.model, model.eval()
    assert torch.equal(model.encode_image(images), own.encode_image(images))
    assert torch.equal(model.encode_text(texts), own.encode_text(texts))


@pytest.mark.parametrize("which", ["vit", "nested", "eva02", "packaged"])
def test_the_folder_loads_without_a_name_with_its_preprocessing(which, request, tmp_path) -> None:
    """G5: open_clip's own writer stops before the description."""
    loaded = request.getfixturevalue(which)
    write_export(loaded, "openclip", tmp_path / "out", ORIGIN)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    for picture in pictures():
        pixels = preprocess(picture)
        torch.testing.assert_close(pixels, loaded.transform()(picture), rtol=0, atol=1e-6)
    assert largest_difference(loaded, model, Inputs.of(loaded)) == 0
    # And our own reader; without the vocabulary it would give byte pairs beyond a table of words.
    again = load_clip(str(tmp_path / "out"))
    texts = ["a red circle above two dogs"]
    assert torch.equal(again.tokenizer(texts), loaded.tokenizer(texts))
    assert again.weights_hash == loaded.weights_hash


@pytest.mark.parametrize("which", ["tiny-test-export", "tiny-test-eva02"])
def test_another_image_size_by_name(small, tmp_path, which) -> None:
    """open_clip builds its own ViT at any size, trunks of timm at their own alone."""
    save_state(small[which].clip.model.state_dict(), tmp_path / "weights.pt")
    larger = load_clip(which, tmp_path / "weights.pt", image_size=48)
    written = write_export(larger, "openclip", tmp_path / "out", ORIGIN)
    assert "by name: loads again, embeddings equal to 0e+00" in written.checks[1]


def test_half_precision_is_the_rounded_state_and_close(vit, tmp_path) -> None:
    """Without rounding the file is no smaller; rounding something else would be far away."""
    write_export(vit, "openclip", tmp_path / "out", ORIGIN, half=True)
    stored = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    state = vit.clip.model.state_dict()
    assert all(torch.equal(stored[key], value.half()) for key, value in state.items())
    difference = largest_difference(vit, open_folder(tmp_path / "out")[0], Inputs.of(vit))
    assert 0 < difference < HALF_TOLERANCE


def test_the_header_says_where_the_weights_come_from(vit, tmp_path) -> None:
    origin = replace(ORIGIN, run="mine", step=7, alpha=0.5, config_hash="abc")
    write_export(vit, "openclip", tmp_path / "out", origin)
    with safe_open(tmp_path / "out" / "open_clip_model.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    assert (header["run"], header["step"], header["alpha"]) == ("mine", "7", "0.5")
    note = json.loads((tmp_path / "out" / NOTE).read_text())
    assert note["weights_hash"] == header["weights_hash"] == vit.weights_hash
    assert note["files"] == ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]


def test_other_weights_in_the_file_are_noticed(vit, tmp_path, monkeypatch) -> None:
    """A check that compares nothing would let this pass; nothing may be left behind."""

    def spoiled(state: dict, path: Path, facts: object = None) -> None:
        changed = {**state, "visual.proj": state["visual.proj"].roll(1, 0)}
        save_state(changed, path)

    monkeypatch.setattr("gradeclip_ft.export.openclip.save_state", spoiled)
    with pytest.raises(ExportError, match=r"1 changed: visual\.proj"):
        write_export(vit, "openclip", tmp_path / "out", ORIGIN)
    assert names_in(tmp_path) == []


def test_a_library_that_computes_something_else_is_noticed(vit, tmp_path, monkeypatch) -> None:
    """Equal tensors in a differently built model: only embeddings tell."""

    def other(folder: Path) -> tuple:
        model, preprocess = open_folder(folder)
        with torch.no_grad():
            model.ln_final.bias.add_(0.1)
        return model, preprocess

    monkeypatch.setattr("gradeclip_ft.export.openclip.open_folder", other)
    with pytest.raises(ExportError, match="they differ by"):
        write_export(vit, "openclip", tmp_path / "out", ORIGIN)
    assert names_in(tmp_path) == []


def test_photos_of_a_folder_are_what_is_compared(vit, tmp_path) -> None:
    for index, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{index}.png")
    shown = Inputs.of(vit, tmp_path)
    assert torch.equal(shown.pixels, Inputs.of(vit).pixels)
    with pytest.raises(FileNotFoundError, match="no photo in pixels="):
        Inputs.of(vit, tmp_path / "none")


@pytest.mark.parametrize("which", ["vit", "packaged"])
@pytest.mark.parametrize("target", ["openclip", "huggingface"])
def test_the_lines_that_are_printed_give_our_similarities(
    request, tmp_path, monkeypatch, capsys, which, target
) -> None:
    """Would catch lines for a tokenizer that open_clip has not, or for other pixels than ours."""
    loaded = request.getfixturevalue(which)
    monkeypatch.chdir(tmp_path)
    photo = Image.effect_noise((61, 97), 90).convert("RGB")
    photo.save("photo.jpg", quality=95)
    written = write_export(loaded, target, Path("out"), ORIGIN)
    ours = loaded.encode_images([Image.open("photo.jpg")]) @ loaded.encode_texts(TWO).T
    blocks = [
        b for b in re.findall(r"```python\n(.*?)```", written.usage, re.DOTALL) if "print" in b
    ]
    assert len(blocks) == (2 if (target, which) == ("huggingface", "vit") else 1)
    for block in blocks:
        exec(block, {})
        shown = [float(number) for number in re.findall(r"-?\d\.\d+", capsys.readouterr().out)]
        assert shown == pytest.approx(ours[0].tolist(), abs=1e-3), block


def test_a_model_that_pads_its_pictures_comes_back(vit, tmp_path) -> None:
    """Our own reader refused what we had written; transformers' processor would crop instead."""
    padding = replace(vit, preprocessing=replace(vit.preprocessing, resize="longest"))
    written = write_export(padding, "huggingface", tmp_path / "out", ORIGIN)
    assert "open_clip's pixels of a photo: equal" in written.checks
    assert "its CLIPModel has no padding of pictures" in written.checks[-1]
    photo = Image.effect_noise((61, 97), 90).convert("RGB")
    again = load_clip(str(tmp_path / "out"))
    assert torch.equal(again.transform()(photo), padding.transform()(photo))
    assert not torch.equal(again.transform()(photo), vit.transform()(photo))


def test_a_single_file_of_an_unregistered_architecture_is_refused(packaged, tmp_path) -> None:
    with pytest.raises(ValueError, match="use format=safetensors"):
        write_export(packaged, "openclip", tmp_path / "out", ORIGIN, form="pt")


def test_weights_that_are_not_finite_are_refused(small, tmp_path) -> None:
    """A diverged run must not become a file that others load."""
    loaded = load_clip("tiny-test-export", "random")
    weight = loaded.clip.model.ln_final.weight
    with torch.no_grad():
        weight[0] = 1e5
    with pytest.raises(ValueError, match=r"fp16 cannot hold, in ln_final\.weight.*half=false"):
        write_export(loaded, "openclip", tmp_path / "out", ORIGIN, half=True)
    with torch.no_grad():
        weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite in 1 tensors \(ln_final\.weight\)"):
        write_export(loaded, "openclip", tmp_path / "out", ORIGIN)
    assert names_in(tmp_path) == []


def test_a_name_taken_for_another_architecture_is_an_error(packaged, vit, tmp_path) -> None:
    """Wrong weights under a right name must not load silently."""
    with pytest.raises((RuntimeError, AssertionError)):  # open_clip asserts some shapes
        write_export(replace(vit, clip=packaged.clip), "openclip", tmp_path / "out", ORIGIN)
    assert names_in(tmp_path) == []
