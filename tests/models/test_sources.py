"""Where models come from: folders, Hugging Face, OpenAI's and EVA-CLIP's names, other sizes."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from gradeclip_ft.models.architecture import find_architecture
from gradeclip_ft.models.load import load_clip, published_preprocess
from gradeclip_ft.models.names import to_evaclip
from gradeclip_ft.models.weights import load_state, read_state
from tests.tiny import DIM, TEXT, VISION, make_tiny_clip

TINY = {
    "embed_dim": DIM,
    "vision_cfg": VISION,
    "text_cfg": {**TEXT, "context_length": 77, "vocab_size": 49408},
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def tiny_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small architecture that open_clip knows by name, with both activations."""
    folder = tmp_path_factory.mktemp("architecture")
    for name, quick in (("tiny-test", False), ("tiny-test-quickgelu", True)):
        (folder / f"{name}.json").write_text(json.dumps({**TINY, "quick_gelu": quick}))
        open_clip.add_model_config(folder / f"{name}.json")
    return "tiny-test"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in open_clip's layout: timm's DINOv2 and a BERT, as folders inside of it."""
    from transformers import BertConfig, BertTokenizerFast

    folder = tmp_path / "model"
    (folder / "trunk").mkdir(parents=True)
    text = folder / "text"
    text.mkdir()
    trunk = {"img_size": 56, "embed_dim": 32, "depth": 2, "num_heads": 4}
    description = {"architecture": "vit_small_patch14_dinov2", "num_classes": 0}
    (folder / "trunk" / "config.json").write_text(
        json.dumps({**description, "model_args": trunk, "pretrained_cfg": {"num_classes": 0}})
    )
    BertConfig(
        vocab_size=9,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        pad_token_id=0,
    ).save_pretrained(text)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "red", "car"]
    (text / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(text / "vocab.txt")).save_pretrained(text)
    config = {
        "embed_dim": DIM,
        "vision_cfg": {
            "image_size": 56,
            "timm_model_name": "local-dir:trunk",
            "timm_pool": "token",
            "timm_proj": "linear",
        },
        "text_cfg": {
            "hf_model_name": "text",
            "hf_tokenizer_name": "text",
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "linear",
            "context_length": 16,
        },
    }
    how = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": how})
    )
    torch.manual_seed(4)
    save_file(
        find_architecture(str(folder)).build().state_dict(), folder / "open_clip_model.safetensors"
    )
    return folder


def test_a_folder_loads_from_anywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative parts belong to the folder, not to the working directory as in open_clip."""
    monkeypatch.chdir(tmp_path)
    loaded = load_clip("model")
    assert loaded.image_size == (56, 56)
    assert loaded.preprocessing.resize == "squash"
    assert loaded.mean == (0.5, 0.4, 0.3)
    ids = loaded.tokenizer(["a red dog", "a car"], trim=True)
    assert ids.shape == (2, 8)  # cut, because BERT masks its padding
    assert ids[0, :5].tolist() == [2, 5, 7, 6, 3]
    with torch.no_grad():
        whole = loaded.clip.model.encode_text(loaded.tokenizer(["a red dog", "a car"]))
        torch.testing.assert_close(loaded.clip.text.encode(ids), whole, **CLOSE)
    for name in (str(folder), f"local-dir:{folder}"):
        assert load_clip(name).weights_hash == loaded.weights_hash
    assert load_clip("model", "random").weights_hash != loaded.weights_hash


def test_one_object_encodes_pictures_and_texts(folder: Path) -> None:
    """The four lines of a notebook."""
    clip = load_clip(str(folder))
    pictures = [Image.new("RGB", (90, 60), color) for color in ("red", "blue", "white")]
    found = clip.encode_images(pictures, batch_size=2)
    assert found.shape == (3, DIM)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    again = clip.encode_images([pictures[2]])
    torch.testing.assert_close(again, found[2:], **CLOSE)
    texts = clip.encode_texts(["a dog", "a red car", "a car"], batch_size=2)
    torch.testing.assert_close(texts[2:], clip.encode_texts(["a car"]), **CLOSE)
    assert clip.encode_images([]).shape == clip.encode_texts([]).shape == (0, DIM)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "open_clip_config.json").unlink(), "has no open_clip_config.json"),
        (lambda f: (f / "open_clip_config.json").write_text('{"model'), "not complete JSON"),
        (lambda f: (f / "open_clip_config.json").write_text("{}"), "has no model_cfg"),
        (lambda f: (f / "open_clip_model.safetensors").unlink(), "holds no weights"),
    ],
)
def test_a_broken_folder_says_what_is_missing(folder: Path, break_it, message: str) -> None:
    break_it(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_clip(str(folder))


def save_clip_model(folder: Path, *, act: str = "gelu", heads: int = 4) -> nn.Module:
    """Transformers' CLIPModel of the tiny architecture, written by its own save_pretrained."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(3)
    block = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    both = {**block, "num_attention_heads": heads, "hidden_act": act}
    vision = {**both, "image_size": 32, "patch_size": 8}
    text = {**both, "num_attention_heads": 4, "eos_token_id": 49407}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM))
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_transformers_clip_gives_its_features(
    file: str, tiny_name: str, tmp_path: Path
) -> None:
    """Transformers itself is the oracle; its pixels are its folder's."""
    theirs = save_clip_model(tmp_path)
    how = {"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1], "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(how))
    if file.endswith("bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / file)
    ours = load_clip(tiny_name, tmp_path)
    assert ours.mean == (0.5, 0.4, 0.3)
    assert ours.preprocessing.interpolation == "bilinear"
    pixels, ids = torch.randn(2, 3, 32, 32), ours.tokenizer(["a dog", "two red cars"])
    with torch.no_grad():
        image = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
        words = theirs.text_projection(theirs.text_model(ids).pooler_output)
        torch.testing.assert_close(ours.clip.image.encode(pixels), image, **CLOSE)
        torch.testing.assert_close(ours.clip.text.encode(ids), words, **CLOSE)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"act": "quick_gelu"}, r"quick_gelu True, not False .* give name=tiny-test-quickgelu"),
        ({"heads": 2}, r"vision_cfg\.head_width 16, not 8"),
        ({"act": "gelu_new"}, "hidden_act is gelu_new and gelu_new"),
    ],
)
def test_a_folder_that_computes_something_else_is_refused(
    how: dict, message: str, tiny_name: str, tmp_path: Path
) -> None:
    """The tensors fit in all three cases; the embeddings would be wrong without a word."""
    save_clip_model(tmp_path, **how)
    with pytest.raises(ValueError, match=message):
        load_clip(tiny_name, tmp_path)
    if how == {"act": "quick_gelu"}:
        assert not load_clip("tiny-test-quickgelu", tmp_path).activation_unknown


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_cfg", {"pool_type": "avg"}, r"vision_cfg\.pool_type 'avg', not 'tok'"),
        ("text_cfg", {"norm_kwargs": {"eps": 1e-6}}, "norm_kwargs"),
        ("vision_cfg", {"image_size": 48}, r"image_size \(48, 48\).* or image_size=48"),
    ],
)
def test_an_open_clip_description_beside_weights_is_heeded(
    part: str, change: dict, message: str, tiny_name: str, tmp_path: Path
) -> None:
    file = tmp_path / "open_clip_model.safetensors"
    save_file(load_clip(tiny_name, "random").clip.model.state_dict(), file)
    config = {"model_cfg": {**TINY, part: {**TINY[part], **change}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_clip(tiny_name, file)


@pytest.mark.parametrize(
    ("name", "tag", "right"),
    [
        ("ViT-B-16", "openai", "ViT-B-16-quickgelu"),
        ("RN50x16", "openai", "RN50x16-quickgelu"),  # open_clip's own list does not say so
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "ViT-B-16"),
    ],
)
def test_a_tag_of_another_activation_names_the_right_architecture(
    name: str, tag: str, right: str
) -> None:
    """Nothing is fetched. open_clip builds these with a warning; embeddings differ by 1e-3."""
    with pytest.raises(ValueError, match=rf"does not compute; give name={right}$"):
        load_clip(name, tag)


def test_a_file_that_cannot_say_its_activation_is_recorded(tiny_name: str, tmp_path: Path) -> None:
    """A run's file is known by the run's configuration; a name without a twin has no doubt."""
    state = load_clip(tiny_name, "random").clip.model.state_dict()
    save_file(state, tmp_path / "plain.safetensors")
    save_file(state, tmp_path / "run.safetensors", metadata={"step": "7"})
    assert load_clip(tiny_name, tmp_path / "plain.safetensors").activation_unknown
    assert not load_clip(tiny_name, tmp_path / "run.safetensors").activation_unknown
    assert not load_clip("shapes_tiny").activation_unknown


def test_a_file_brings_its_own_number_of_text_positions(tiny_name: str, tmp_path: Path) -> None:
    state = dict(load_clip(tiny_name, "random").clip.model.state_dict())
    state["positional_embedding"] = state["positional_embedding"][:64].clone()
    save_file(state, tmp_path / "short.safetensors")
    loaded = load_clip(tiny_name, tmp_path / "short.safetensors")
    assert loaded.tokenizer.context_length == loaded.clip.text.context_length == 64
    with torch.no_grad():
        ids = loaded.tokenizer(["a dog", "a " * 100])
        expected = loaded.clip.model.encode_text(ids)
        torch.testing.assert_close(loaded.clip.text.encode(ids), expected, **CLOSE)


@pytest.mark.parametrize("change", [{"width": 33}, {"layers": -1, "width": 0}, {"no": 1}])
def test_an_impossible_description_is_one_sentence(folder: Path, change: dict) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"] = {**VISION, **change}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="describes a model that cannot be built"):
        load_clip(str(folder))


def test_flat_names_and_settings_of_openai_are_read(tmp_path: Path) -> None:
    """The file holds three numbers beside the weights, and the text tower without prefix."""
    clip = make_tiny_clip("eva02")
    state = {key.removeprefix("text."): value for key, value in clip.model.state_dict().items()} | {
        name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")
    }
    other = make_tiny_clip("eva02", seed=5)
    load_state(other.model, state, "openai.pt")
    for key, value in clip.model.state_dict().items():
        assert other.model.state_dict()[key].equal(value)


def test_eva_clips_names_are_recognised(tmp_path: Path) -> None:
    state = make_tiny_clip("eva02").model.state_dict()
    torch.save({"module": to_evaclip(state)}, tmp_path / "eva.pt")
    got = read_state(tmp_path / "eva.pt")
    assert got.keys() == state.keys()
    assert all(got[key].equal(value) for key, value in state.items())


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    """OpenAI's own files are of this kind: loading them runs code."""
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "openai.pt"))
    with pytest.raises(ValueError, match="TorchScript archive, which carries code"):
        read_state(tmp_path / "openai.pt")


def test_a_wrong_architecture_is_told_by_its_shapes() -> None:
    state = find_architecture("ViT-B-32").build().state_dict()
    with pytest.raises(ValueError, match=r"by its shapes it is ViT-B-32"):
        load_state(make_tiny_clip("vit").model, state, "file.pt")


def test_diverged_weights_are_told_from_another_architecture() -> None:
    clip = make_tiny_clip("vit")
    state = {key: value.clone() for key, value in clip.model.state_dict().items()}
    state["visual.proj"][0, 0] = torch.inf
    with pytest.raises(ValueError, match="its training diverged"):
        load_state(clip.model, state, "file.pt")


def test_rectangles_and_other_sizes(tiny_name: str) -> None:
    """(height, width): the grid has the same order, and the transform makes such pixels."""
    loaded = load_clip(tiny_name, "random", image_size=[48, 72])
    pixels = loaded.transform()(Image.new("RGB", (100, 100)))[None]
    assert pixels.shape == (1, 3, 48, 72)
    assert loaded.clip.image.trace(pixels).grid == (6, 9)
    with torch.no_grad():
        expected = loaded.clip.model.encode_image(pixels)
        torch.testing.assert_close(loaded.clip.image.encode(pixels), expected, **CLOSE)
    with pytest.raises(ValueError, match="expected a side or"):
        load_clip(tiny_name, "random", image_size=[48, 72, 3])
    with pytest.raises(ValueError, match="73 is not a multiple of the patch size 8"):
        load_clip(tiny_name, "random", image_size=[48, 73])


def test_weights_saved_at_another_size_fit(tiny_name: str, tmp_path: Path) -> None:
    """A run at 48 pixels goes on at 48 exactly, and back at 32 with its positions interpolated."""
    larger = load_clip(tiny_name, "random", image_size=48)
    save_file(larger.clip.model.state_dict(), tmp_path / "w.safetensors")
    again = load_clip(tiny_name, tmp_path / "w.safetensors", image_size=48)
    assert again.weights_hash == larger.weights_hash
    small = load_clip(tiny_name, tmp_path / "w.safetensors")
    assert small.clip.model.visual.positional_embedding.shape == (17, 32)


def test_what_the_hub_holds_needs_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"cannot be fetched .*no route to host.* give its folder"):
        load_clip("hf-hub:owner/name")


def test_a_hub_repository_is_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert load_clip("hf-hub:owner/name").weights_hash == load_clip(str(folder)).weights_hash


def test_pixels_follow_the_published_weights_of_a_name() -> None:
    """SigLIP's are squashed to -1..1; a fine-tuned file of it must not get CLIP's statistics."""
    assert published_preprocess("ViT-B-16-SigLIP")["mean"] == (0.5, 0.5, 0.5)
    assert published_preprocess("ViT-B-16-SigLIP")["resize_mode"] == "squash"
    assert published_preprocess("no-such-model") == {}
