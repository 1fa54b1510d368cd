"""transformers' names: its CLIPModel takes them all and computes the same embeddings."""

from typing import Any

import open_clip
import pytest
import torch

from gradeclip_ft.models.names import clip_config, from_huggingface, misfit, to_huggingface

transformers = pytest.importorskip("transformers")
PLAIN = ["tiny-test-export", "tiny-test-nested"]


def state_of(loaded) -> dict[str, torch.Tensor]:
    return dict(loaded.clip.model.state_dict())


def clip_model(loaded) -> Any:
    """The library's model with our tensors; strict."""
    config = open_clip.get_model_config(loaded.name)
    settings = clip_config(config, start=49406, end=49407)
    model = transformers.CLIPModel(transformers.CLIPConfig(**settings))
    model.load_state_dict(to_huggingface(state_of(loaded)), strict=True)
    return model.eval()


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_clip_model_gives_the_same_embeddings(small, name) -> None:
    """A swapped projection, a forgotten transposition or the wrong GELU changes them.

    1e-5 on embeddings of length about 1: the libraries add in another order.
    """
    loaded = small[name]
    model, own = clip_model(loaded), loaded.clip.model
    pixels, tokens = torch.randn(2, 3, 32, 32), loaded.tokenizer(["a dog", "two red cars"])
    image = model.get_image_features(pixel_values=pixels).pooler_output
    text = model.get_text_features(input_ids=tokens).pooler_output
    torch.testing.assert_close(image, own.encode_image(pixels), rtol=0, atol=1e-5)
    torch.testing.assert_close(text, own.encode_text(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_there_and_back_is_the_same_state(small, name) -> None:
    state = state_of(small[name])
    back = from_huggingface(to_huggingface(state), nested=name.endswith("nested"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_index_tables_of_older_files_are_dropped(vit) -> None:
    state = to_huggingface(state_of(vit))
    old = {**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}
    assert from_huggingface(old).keys() == state_of(vit).keys()


def test_keys_without_a_place_are_named(vit, small, eva02) -> None:
    with pytest.raises(ValueError, match=r"visual\.transformer\.resblocks\.0\.ls_1\.gamma"):
        to_huggingface(state_of(small["tiny-test-scaled"]))
    with pytest.raises(ValueError, match=r"missing: .*visual\.class_embedding"):
        to_huggingface(state_of(eva02))
    state = to_huggingface(state_of(vit))
    with pytest.raises(ValueError, match=r"1 unknown: vision_model\.head"):
        from_huggingface({**state, "vision_model.head": torch.zeros(1)})
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match=r"1 missing: .*k_proj\.bias"):
        from_huggingface(state)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ViT-B-16", None),
        ("ViT-B-16-quickgelu", None),
        ("ViT-bigG-14", None),
        ("EVA02-B-16", "timm_model_name"),
        ("ViT-B-16-SigLIP", "timm_model_name"),
        ("RN50", "ResNet"),
        ("coca_ViT-B-32", "attentional_pool"),
        ("roberta-ViT-B-32", "hf_model_name"),
        ("ViT-M-16-alt", "ls_init_value"),
        ("ViT-H-14-CLIPA", "no_ln_pre"),
    ],
)
def test_which_architectures_fit(name, reason) -> None:
    found = misfit(open_clip.get_model_config(name))
    assert found is None if reason is None else reason in str(found)


def test_a_rectangle_does_not_fit() -> None:
    config = open_clip.get_model_config("ViT-B-16")
    config["vision_cfg"]["image_size"] = [224, 320]
    assert "rectangle" in str(misfit(config))
    with pytest.raises(ValueError, match=r"use to=\[openclip\]|Use to=\[openclip\]"):
        clip_config(config, start=0, end=1)


def test_openai_sizes_are_those_of_the_published_configuration() -> None:
    """ViT-L-14: 24 layers of 1024 with 16 heads, text 12 of 768 with 12 heads."""
    config = open_clip.get_model_config("ViT-L-14-quickgelu")
    settings = clip_config(config, start=49406, end=49407)
    vision, text = settings["vision_config"], settings["text_config"]
    assert (vision["hidden_size"], vision["num_attention_heads"]) == (1024, 16)
    assert (vision["intermediate_size"], vision["patch_size"], vision["image_size"]) == (
        4096,
        14,
        224,
    )
    assert (text["hidden_size"], text["num_attention_heads"], text["eos_token_id"]) == (
        768,
        12,
        49407,
    )
    assert (vision["hidden_act"], settings["projection_dim"]) == ("quick_gelu", 768)
