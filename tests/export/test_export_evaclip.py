"""F-ViT's files: complete names, the fine-tuned text vectors, the lines of its configuration."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from gradeclip_ft.export.evaclip import COCO
from gradeclip_ft.export.export import write_export
from gradeclip_ft.export.job import save_state
from gradeclip_ft.export.verify import ExportError
from gradeclip_ft.models.clip import LoadedClip
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.models.names import to_evaclip
from gradeclip_ft.text.prompts import VILD, fill
from tests.export.small import ORIGIN, names_in


def named(loaded: LoadedClip, name: str) -> LoadedClip:
    """A small model under the name of a published one, whose files F-ViT asks for by name."""
    return replace(loaded, architecture=replace(loaded.architecture, name=name))


def test_the_files_have_the_names_that_the_detector_asks_for(eva02, tmp_path) -> None:
    written = write_export(named(eva02, "EVA02-B-16"), "evaclip", tmp_path / "out", ORIGIN)
    assert names_in(tmp_path / "out") == [
        "README.md",
        "coco_with_background_evaclip_vitb_16.pt",
        "eva_vitb16_coco_clipself_patches.pt",
        "gradeclip_ft.json",
    ]
    assert "'checkpoints/eva_vitb16_coco_clipself_patches.pt'" in written.usage
    assert "model.backbone.out_indices = [3, 5, 7, 11]" in written.usage
    assert "fvit_vitb16_upsample_fpn_bs64_3e_ovcoco_eva_clipself_patches.py" in written.usage


@pytest.mark.parametrize("name", ["tiny-test-eva02", "tiny-test-eva01"])
def test_the_file_is_a_plain_dict_of_tensors_that_our_reader_takes(small, tmp_path, name) -> None:
    """F-ViT's loader takes a dict below `model` or `state_dict`, or else the dict itself."""
    write_export(small[name], "evaclip", tmp_path / "out", ORIGIN)
    file = tmp_path / "out" / "eva_clip_model.pt"
    stored = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in stored.values())
    assert stored.keys() == to_evaclip(small[name].clip.model.state_dict()).keys()
    assert load_clip(name, file).weights_hash == small[name].weights_hash


@torch.no_grad()
def test_class_vectors_by_a_naive_loop(eva02, tmp_path) -> None:
    """G3: by the model's own text tower, one sentence at a time."""
    write_export(eva02, "class_embed", tmp_path / "out", ORIGIN)
    vectors = torch.load(tmp_path / "out" / "coco_with_background.pt", weights_only=True)
    assert list(vectors) == [*COCO, "background"]
    assert len(set(vectors)) == 81
    encode, tokenizer = eva02.clip.model.encode_text, eva02.tokenizer
    for name in ("traffic light", "orange", "background"):
        rows = [normalize(encode(tokenizer([fill(words, name)]))[0], dim=0) for words in VILD]
        expected = normalize(torch.stack(rows).mean(0), dim=0)
        assert (vectors[name].dtype, vectors[name].shape) == (torch.float32, (16,))
        torch.testing.assert_close(vectors[name], expected, rtol=0, atol=1e-5)


def test_half_precision_leaves_the_class_vectors_in_full(eva02, tmp_path) -> None:
    write_export(eva02, "evaclip", tmp_path / "out", ORIGIN, half=True)
    stored = torch.load(tmp_path / "out" / "eva_clip_model.pt", weights_only=True)
    vectors = torch.load(tmp_path / "out" / "coco_with_background.pt", weights_only=True)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert {value.dtype for value in vectors.values()} == {torch.float32}


def test_one_renamed_key_stops_the_export_with_its_name(eva02, tmp_path, monkeypatch) -> None:
    """G2: F-ViT would load the rest and leave this layer random."""

    def renamed(state):
        right, wrong = "blocks.1.attn.inner_attn_ln.bias", "blocks.1.attn.inner_ln.bias"
        return {key.replace(right, wrong): value for key, value in to_evaclip(state).items()}

    monkeypatch.setattr("gradeclip_ft.export.evaclip.to_evaclip", renamed)
    with pytest.raises(ExportError, match=r"inner_attn_ln\.bias; 1 unknown: .*inner_ln\.bias"):
        write_export(eva02, "evaclip", tmp_path / "out", ORIGIN)
    assert names_in(tmp_path) == []


def test_a_tensor_under_the_wrong_name_stops_the_export(eva02, tmp_path, monkeypatch) -> None:
    """The names are complete, but gate and input of the MLP are exchanged."""

    def exchanged(state, path, facts=None) -> None:
        one, two = "visual.blocks.0.mlp.w1.weight", "visual.blocks.0.mlp.w2.weight"
        save_state({**state, one: state[two], two: state[one]}, path)

    monkeypatch.setattr("gradeclip_ft.export.evaclip.save_state", exchanged)
    with pytest.raises(ExportError, match=r"2 changed: visual\.blocks\.0\.mlp\.w1\.weight"):
        write_export(eva02, "evaclip", tmp_path / "out", ORIGIN)


def test_a_key_map_that_timm_does_not_share_stops_the_export(eva02, tmp_path, monkeypatch) -> None:
    """Our own reader would undo our own mistake; timm's does not."""

    def without_bias(state, trunk):
        return {key: value for key, value in trunk.state_dict().items() if "q_proj.b" not in key}

    monkeypatch.setattr("gradeclip_ft.export.evaclip.checkpoint_filter_fn", without_bias)
    with pytest.raises(ExportError, match=r"by timm's reader .*blocks\.0\.attn\.q_proj\.bias"):
        write_export(eva02, "evaclip", tmp_path / "out", ORIGIN)


def test_a_plain_vit_is_told_where_to_go(vit, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has a VisionTransformer; use to=\[openclip\]"):
        write_export(vit, "evaclip", tmp_path / "out", ORIGIN)
    assert names_in(tmp_path) == []


@pytest.mark.slow
def test_the_full_size_model_goes_through(tmp_path, monkeypatch) -> None:
    """EVA02-B-16 with random weights; one template of 63, which spares two minutes."""
    monkeypatch.setattr("gradeclip_ft.export.evaclip.VILD", VILD[:1])
    loaded = load_clip("EVA02-B-16", "random")
    written = write_export(loaded, "evaclip", tmp_path / "out", ORIGIN)
    assert "410 tensors, 260 of them visual" in written.checks[0]
    assert "bit-equal, embeddings equal to 0e+00" in written.checks[1]
