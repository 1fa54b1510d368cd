"""BLIP for retrieval: the library's embeddings, and a folder of `save_pretrained`."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from gradeclip_ft.models.clip import LoadedClip, image_sentence, text_sentence
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.models.other.blip import Blip
from tests.tiny_foreign import library_embedding, make_tiny_blip, save_tiny_blip

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TEXTS = ["two red stars", "a circle left of a star"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("blip")
    save_tiny_blip(made)
    return made


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedClip:
    return load_clip(f"blip:{folder}")


@torch.no_grad()
def test_embeddings_are_the_librarys() -> None:
    blip, pixels = make_tiny_blip(), torch.randn(3, 3, 32, 32)
    expected = library_embedding(blip.model, pixels)
    torch.testing.assert_close(blip.image.encode(pixels), expected, **CLOSE)
    larger = torch.randn(1, 3, 48, 48)
    theirs = blip.model.vision_model(pixel_values=larger, interpolate_pos_encoding=True)
    expected = blip.model.vision_proj(theirs.last_hidden_state[:, 0])
    torch.testing.assert_close(blip.image.encode(larger), expected, **CLOSE)


@torch.no_grad()
def test_a_folder_gives_the_librarys_scores(loaded: LoadedClip, folder: Path) -> None:
    """Model, tokenizer and pixels of `transformers`, end to end."""
    from transformers import BlipForImageTextRetrieval, BlipProcessor

    picture = Image.effect_noise((50, 70), 80).convert("RGB")
    theirs = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    inputs = BlipProcessor.from_pretrained(folder)(
        images=picture, text=TEXTS, padding=True, return_tensors="pt"
    )
    pixels = loaded.pixels([picture])
    assert (pixels - inputs.pixel_values).abs().mean() < 0.01  # Pillow's resize, and torch's
    expected = theirs(
        inputs.input_ids, pixels, attention_mask=inputs.attention_mask, use_itm_head=False
    ).itm_score
    unit = nn.functional.normalize
    image = unit(loaded.clip.image.encode(pixels))
    torch.testing.assert_close(image @ loaded.encode_texts(TEXTS).T, expected, **CLOSE)
    padded = loaded.clip.text.encode(loaded.tokenizer(TEXTS))  # 24 tokens instead of 8
    torch.testing.assert_close(image @ unit(padded).T, expected, **CLOSE)


def test_what_a_blip_is(loaded: LoadedClip, folder: Path) -> None:
    assert loaded.name == f"blip:{folder}"
    assert loaded.image_size == (32, 32)
    assert loaded.preprocessing.resize == "squash"
    assert "2 blocks of width 32" in image_sentence(loaded)
    assert "context 24" in text_sentence(loaded)
    ids = loaded.tokenizer(TEXTS, trim=True)
    assert ids[0, :6].tolist() == [2, 10, 6, 11, 12, 3]  # [CLS] two red star ##s [SEP]
    assert loaded.clip.log_scale.exp() == 1
    with pytest.raises(ValueError, match=r"is a Blip, which can be explained .* not trained"):
        loaded.require_clip("trained")
    assert load_clip(f"blip:{folder}", "random", image_size=48).image_size == (48, 48)


def test_a_blip_without_transformers_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'gradeclip_ft\[huggingface\]'"):
        load_clip(f"blip:{folder}")


def test_a_folder_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; save model, tokenizer"):
        load_clip(f"blip:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"no folder \./nothing"):
        load_clip("blip:./nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="type 'clip', expected 'blip'"):
        load_clip(f"blip:{tmp_path}")


def test_weights_of_another_blip_are_named(folder: Path, tmp_path: Path) -> None:
    state = dict(Blip(save_tiny_blip(tmp_path)).model.state_dict())
    state.pop("text_proj.bias")
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"1 missing: text_proj\.bias"):
        load_clip(f"blip:{folder}", tmp_path / "less.pt")
