"""transformers' names: which models have them all, and keys that have no place."""

import open_clip
import pytest
import torch

from gradeclip_ft.models.names import clip_config, from_huggingface, misfit, to_huggingface


def state_of(loaded) -> dict[str, torch.Tensor]:
    return dict(loaded.clip.model.state_dict())


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
    sizes = (vision["intermediate_size"], vision["patch_size"], vision["image_size"])
    assert sizes == (4096, 14, 224)
    assert (text["hidden_size"], text["num_attention_heads"]) == (768, 12)
    assert text["eos_token_id"] == 49407
    assert (vision["hidden_act"], settings["projection_dim"]) == ("quick_gelu", 768)
