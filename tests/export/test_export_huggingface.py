"""The hub's folder: open_clip and transformers each find their own file, and the same model."""

import json
from dataclasses import replace

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from gradeclip_ft.export.export import write_export
from gradeclip_ft.export.huggingface import AsEncoders
from gradeclip_ft.export.job import save_state
from gradeclip_ft.export.verify import ExportError, Inputs, largest_difference, pictures
from gradeclip_ft.models.load import load_clip
from tests.export.small import ORIGIN, VISION, names_in

transformers = pytest.importorskip("transformers")
SENTENCES = ["A photo of two DOGS,  running!", "it's 12 o'clock in the caf\u00e9", ""]


@pytest.fixture(params=["vit", "nested", "packaged"])
def written(request, tmp_path):
    """A model that fits transformers, and its folder."""
    loaded = request.getfixturevalue(request.param)
    write_export(loaded, "huggingface", tmp_path / "out", ORIGIN)
    return loaded, tmp_path / "out"


def test_both_libraries_load_the_same_folder(written) -> None:
    """open_clip must take its own file, though model.safetensors is next to it."""
    loaded, folder = written
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert largest_difference(loaded, model, Inputs.of(loaded)) == 0
    other = transformers.CLIPModel.from_pretrained(folder)
    # 1e-5: the libraries add in another order. A wrong projection or GELU changes much more.
    assert largest_difference(loaded, AsEncoders(other), Inputs.of(loaded)) < 1e-5
    assert torch.equal(other.logit_scale, loaded.clip.model.logit_scale)
    assert sorted(load_file(folder / "model.safetensors")) == sorted(other.state_dict())


@torch.no_grad()
def test_pixels_and_tokens_of_transformers_give_the_same_embeddings(vit, tmp_path) -> None:
    """From a picture and a sentence to the embedding without any of our code.

    1e-3: resampling of pictures rounds to 1/255 in one library and not in the other. Token ids are
    equal up to the end of the text; after it each library pads as it likes.
    """
    write_export(vit, "huggingface", tmp_path / "out", ORIGIN)
    model = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    pixels = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    shown = pixels(list(pictures()), return_tensors="pt")
    for sentence in SENTENCES:
        expected = vit.tokenizer([sentence])[0]
        assert tokenizer(sentence)["input_ids"] == expected[: int(expected.argmax()) + 1].tolist()
    ids = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    image = model.get_image_features(**shown).pooler_output
    text = model.get_text_features(**ids).pooler_output
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(image), vit.encode_images(list(pictures())), rtol=0, atol=1e-3)
    torch.testing.assert_close(unit(text), vit.encode_texts(SENTENCES), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_left_out_and_said(eva02, tmp_path) -> None:
    """A config.json of the wrong architecture would load as a random CLIPModel."""
    written = write_export(eva02, "huggingface", tmp_path / "out", ORIGIN)
    assert "no files for transformers" in written.checks[-1]
    assert "timm_model_name='eva02_test_patch8_clip_32'" in written.checks[-1]
    assert names_in(tmp_path / "out") == [
        "README.md",
        "gradeclip_ft.json",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


def test_a_text_tower_of_transformers_travels_with_its_parts(tmp_path, monkeypatch) -> None:
    """The folder is moved and loaded from inside; nothing outside of it is named."""
    source = tmp_path / "source"
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32}
    bert = transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    bert.save_pretrained(source / "words")
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.BertTokenizer(vocab={word: row for row, word in enumerate(letters)})
    tokenizer.save_pretrained(source / "words")
    tokenizer.save_pretrained(source)
    text = {"hf_model_name": "words", "hf_tokenizer_name": "words", "hf_proj_type": "linear"}
    text |= {"hf_pooler_type": "mean_pooler", "hf_model_pretrained": False, "context_length": 12}
    model = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}
    (source / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    loaded = load_clip(str(source), "random")
    write_export(loaded, "huggingface", tmp_path / "out", ORIGIN)
    (tmp_path / "out").rename(tmp_path / "moved")
    source.rename(tmp_path / "gone")
    again = load_clip(str(tmp_path / "moved"))
    assert again.weights_hash == loaded.weights_hash
    assert torch.equal(again.encode_texts(["a b", "x"]), loaded.encode_texts(["a b", "x"]))
    monkeypatch.chdir(tmp_path / "moved")
    by_name = open_clip.create_model("local-dir:.")
    assert largest_difference(loaded, by_name, Inputs.of(loaded)) == 0


def test_a_tensor_that_transformers_lacks_stops_the_export(vit, tmp_path, monkeypatch) -> None:
    """CLIPModel warns about missing tensors, draws them at random and continues."""

    def lossy(state, path, facts=None) -> None:
        key = "vision_model.encoder.layers.1.mlp.fc2.bias"
        save_state({name: value for name, value in state.items() if name != key}, path, facts)

    monkeypatch.setattr("gradeclip_ft.export.huggingface.save_state", lossy)
    with pytest.raises(ExportError, match=r"1 missing: vision_model.*\.1\.mlp\.fc2\.bias"):
        write_export(vit, "huggingface", tmp_path / "out", ORIGIN)
    assert names_in(tmp_path) == []


def test_a_configuration_that_computes_something_else_stops_the_export(
    nested, tmp_path, monkeypatch
) -> None:
    """Quick GELU taken for GELU: every tensor is right, the embeddings are not."""
    from gradeclip_ft.export import huggingface

    config = huggingface.clip_config

    def plain(model, **settings):
        return config({**model, "quick_gelu": False}, **settings)

    monkeypatch.setattr("gradeclip_ft.export.huggingface.clip_config", plain)
    with pytest.raises(ExportError, match="they differ by"):
        write_export(nested, "huggingface", tmp_path / "out", ORIGIN)


def test_without_transformers_the_export_says_what_was_not_tried(
    vit, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    written = write_export(vit, "huggingface", tmp_path / "out", replace(ORIGIN, run="a"))
    assert "transformers is not installed" in written.checks[-1]
    assert (tmp_path / "out" / "model.safetensors").is_file()
