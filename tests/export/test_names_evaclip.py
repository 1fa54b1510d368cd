"""EVA-CLIP's names: complete, exact in both directions, and those that timm's reader knows."""

import open_clip
import pytest
import torch
from timm.models.eva import checkpoint_filter_fn

from gradeclip_ft.models.names import from_evaclip, is_evaclip, to_evaclip

SMALL = ["tiny-test-eva02", "tiny-test-eva01"]
# Tensors of the published files, counted in them: all, and those of the image tower.
COUNTS = {
    "EVA02-B-16": (410, 260),
    "EVA02-L-14": (662, 512),
    "EVA02-L-14-336": (662, 512),
}


def state_of(loaded) -> dict[str, torch.Tensor]:
    return dict(loaded.clip.model.state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_timm_reads_the_trunk_back_bit_equal(small, name) -> None:
    """G2: a name that timm's own reader of EVA-CLIP files does not turn back would show."""
    loaded = small[name]
    trunk = loaded.clip.model.visual.trunk
    read = checkpoint_filter_fn(to_evaclip(state_of(loaded)), trunk)
    expected = trunk.state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], value) for key, value in expected.items())


def test_names_by_hand(eva02) -> None:
    """The names that differ, as EVA-CLIP's source has them."""
    names = set(to_evaclip(state_of(eva02)))
    block = "visual.blocks.1."
    assert {
        f"{block}attn.q_bias",
        f"{block}attn.v_bias",
        f"{block}attn.k_proj.weight",
        f"{block}attn.inner_attn_ln.weight",
        f"{block}mlp.w1.weight",
        f"{block}mlp.w2.bias",
        f"{block}mlp.ffn_ln.bias",
        f"{block}mlp.w3.weight",
        "visual.patch_embed.proj.weight",
        "visual.head.bias",
        "text.transformer.resblocks.0.attn.in_proj_weight",
        "logit_scale",
    } <= names
    assert not any("trunk" in name or "fc1" in name for name in names)


@pytest.mark.parametrize("name", SMALL)
def test_there_and_back_is_the_same_state(small, name) -> None:
    state = state_of(small[name])
    there = to_evaclip(state)
    assert is_evaclip(there)
    assert not is_evaclip(state)
    back = from_evaclip(there)
    assert back.keys() == state.keys()
    assert all(back[key] is value for key, value in state.items())


@pytest.mark.parametrize(("name", "counts"), COUNTS.items())
def test_full_size_models_have_every_tensor(name, counts) -> None:
    """Names alone, without memory for the weights."""
    config = open_clip.get_model_config(name)
    del config["custom_text"]
    with torch.device("meta"):
        state = open_clip.CustomTextCLIP(**config).state_dict()
    names = to_evaclip(state)
    assert (len(names), sum(key.startswith("visual.") for key in names)) == counts
    assert from_evaclip(names).keys() == state.keys()


def test_a_renamed_key_stops_with_both_names(eva02) -> None:
    """G2: F-ViT would skip it and train on a random layer."""
    state = state_of(eva02)
    key = "visual.trunk.blocks.1.mlp.fc1_g.weight"
    state["visual.trunk.blocks.1.mlp.fc1.weight"] = state.pop(key)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1_g\.weight.*mlp\.fc1\.weight"):
        to_evaclip(state)


def test_a_key_that_a_file_lacks_or_adds_is_named(eva02) -> None:
    state = to_evaclip(state_of(eva02))
    del state["visual.blocks.0.attn.q_bias"]
    state["visual.mask_token"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"attn\.q_bias.*1 unknown: visual\.mask_token"):
        from_evaclip(state)


def test_rotary_tables_alone_may_be_dropped(eva02) -> None:
    """EVA-CLIP saves them under these names, one pair for the tower and one per block."""
    state = to_evaclip(state_of(eva02))
    tables = {
        f"{home}.{name}": torch.zeros(16, 8)
        for home in ("visual.rope", "visual.blocks.0.attn.rope", "visual.blocks.1.attn.rope")
        for name in ("freqs_cos", "freqs_sin")
    }
    assert from_evaclip({**state, **tables}).keys() == state_of(eva02).keys()
    with pytest.raises(ValueError, match=r"visual\.rope\.freqs_tan"):
        from_evaclip({**state, "visual.rope.freqs_tan": torch.zeros(1)})


def test_another_architecture_is_told_where_to_go(vit) -> None:
    with pytest.raises(ValueError, match=r"use to=\[openclip\]"):
        to_evaclip(state_of(vit))
