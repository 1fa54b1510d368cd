"""Between two models."""

import pytest
import torch

from gradeclip_ft.export.export import mix

START = {
    "weight": torch.tensor([0.0, 4.0]),
    "logit_scale": torch.tensor(1.0),
    "ids": torch.tensor([1]),
}
TUNED = {
    "weight": torch.tensor([4.0, 0.0]),
    "logit_scale": torch.tensor(3.0),
    "ids": torch.tensor([2]),
}


def test_ends_are_the_two_models_themselves() -> None:
    for alpha, end in ((0.0, START), (1.0, TUNED)):
        mixed = mix(START, TUNED, alpha)
        assert torch.equal(mixed["weight"], end["weight"])
        assert torch.equal(mixed["logit_scale"], end["logit_scale"])


def test_a_quarter_by_hand_with_the_temperature() -> None:
    mixed = mix(START, TUNED, 0.25)
    assert mixed["weight"].tolist() == [1.0, 3.0]
    assert mixed["logit_scale"].item() == 1.5


def test_integers_are_not_mixed() -> None:
    assert mix(START, TUNED, 0.5)["ids"].tolist() == [2]


def test_halves_keep_their_type() -> None:
    half = {"weight": torch.tensor([1.0], dtype=torch.bfloat16)}
    assert mix(half, half, 0.3)["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_a_share_outside_of_the_range_is_refused(alpha) -> None:
    with pytest.raises(ValueError, match="outside of 0 to 1"):
        mix(START, TUNED, alpha)


def test_another_architecture_is_refused() -> None:
    other = {**TUNED, "weight": torch.zeros(3)}
    with pytest.raises(ValueError, match="differ in 1 tensors, for example weight"):
        mix(START, other, 0.5)
