"""Weights files: what fits is read whatever its wrapping, what does not fit is named."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gradeclip_ft.models.architecture import find_architecture
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.weights import load_state, read_state


def state_of(clip: Clip) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in clip.model.state_dict().items()}


@pytest.mark.parametrize(
    "wrapping",
    ["plain", "state_dict", "model_state_dict", "ema", "lightning", "module", "safetensors"],
)
def test_every_wrapping_gives_the_same_tensors(
    wrapping: str, tiny_vit: Clip, tmp_path: Path
) -> None:
    state = state_of(tiny_vit)
    file = tmp_path / ("w.safetensors" if wrapping == "safetensors" else "w.pt")
    if wrapping == "safetensors":
        save_file(state, file)
    else:
        contents = {
            "plain": state,
            "state_dict": {"state_dict": state, "state_dict_ema": {"w": torch.zeros(1)}},
            "model_state_dict": {"model_state_dict": state, "epoch": 1},
            "ema": {"state_dict_ema": state},
            "lightning": {
                "epoch": 1,
                "state_dict": {f"clip.model.{k}": v for k, v in state.items()},
            },
            "module": {"model": {f"module.{k}": v for k, v in state.items()}},
        }
        torch.save(contents[wrapping], file)
    got = read_state(file)
    assert got.keys() == state.keys()
    assert all(got[key].equal(value) for key, value in state.items())


def test_missing_extra_misshapen_and_broken_tensors_are_named(tiny_vit: Clip) -> None:
    state = state_of(tiny_vit)
    state["visual.extra"] = state.pop("visual.proj")
    state["ln_final.weight"] = torch.zeros(7)
    state["ln_final.bias"][0] = torch.nan
    before = state_of(tiny_vit)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_state(tiny_vit.model, state, "some.pt")
    for part in (
        "1 missing: visual.proj",
        "1 unexpected: visual.extra",
        "ln_final.weight: got (7,), expected (32,)",
        "1 not finite: ln_final.bias",
    ):
        assert part in str(caught.value)
    after = tiny_vit.model.state_dict()
    assert all(after[key].equal(value) for key, value in before.items())


def test_a_bias_of_the_sigmoid_loss_is_left_out(tiny_vit: Clip) -> None:
    """Would catch a refusal, and a bias whose presence keeps the other weights from loading."""
    state = {key: value + 1 for key, value in state_of(tiny_vit).items()}
    load_state(tiny_vit.model, state | {"logit_bias": torch.zeros(())}, "some.pt")
    after = tiny_vit.model.state_dict()
    assert after.keys() == state.keys()
    assert all(after[key].equal(value) for key, value in state.items())


def test_the_architecture_in_use_is_not_recommended(tiny_vit: Clip) -> None:
    """Would catch "by its shapes it is X" said to somebody who has named X."""
    model = find_architecture("ViT-B-32").build()
    state = dict(model.state_dict()) | {"visual.more": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 unexpected: visual\.more") as caught:
        load_state(model, state, "some.pt")
    assert "but with other parts than open_clip's" in str(caught.value)
    assert "model.name=" not in str(caught.value)


def test_position_embeddings_of_another_grid_are_interpolated(tiny_vit: Clip) -> None:
    state = state_of(tiny_vit)
    state["visual.positional_embedding"] = torch.ones(1 + 8 * 8, 32)
    load_state(tiny_vit.model, state, "larger.pt")
    assert tiny_vit.model.visual.positional_embedding.shape == (17, 32)
    torch.testing.assert_close(tiny_vit.model.visual.positional_embedding, torch.ones(17, 32))


class Malicious:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_a_pickle_that_carries_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, "bad.pt")
    with pytest.raises(ValueError, match="without executing code"):
        read_state("bad.pt")
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_truncated_file_is_named(name: str, tiny_vit: Clip, tmp_path: Path) -> None:
    file = tmp_path / name
    if name.endswith("pt"):
        torch.save(state_of(tiny_vit), file)
    else:
        save_file(state_of(tiny_vit), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=name):
        read_state(file)


def test_what_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt does not exist"):
        read_state(tmp_path / "nothing.pt")
    torch.save({"epoch": 3}, tmp_path / "notes.pt")
    with pytest.raises(ValueError, match="expected tensors by name"):
        read_state(tmp_path / "notes.pt")
