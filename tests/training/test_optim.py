"""Who is decayed, who learns, and how fast."""

from functools import partial

import pytest
import torch
from torch import nn

from gradeclip_ft.training.optim import adamw, freeze, parameter_groups, warmup_cosine


def test_exactly_the_matrices_are_decayed(small_clip) -> None:
    """A norm, bias or temperature that shrinks with every step (G7)."""
    model = small_clip().model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {g["name"]: g for g in parameter_groups(model.named_parameters(), weight_decay=0.1)}
    assert (groups["decay"]["weight_decay"], groups["no_decay"]["weight_decay"]) == (0.1, 0.0)
    parts = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert {names[id(parameter)] for parameter in groups["decay"]["params"]} == {
        *(
            f"{tower}.resblocks.{layer}.{part}"
            for tower in ("visual.transformer", "transformer")
            for layer in (0, 1)
            for part in parts
        ),
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.proj",
        "positional_embedding",
        "token_embedding.weight",
        "text_projection",
    }


def test_a_scalar_temperature_of_shape_one_is_not_decayed() -> None:
    """Some open_clip checkpoints store logit_scale with a dimension; the name decides too."""
    model = nn.Module()
    model.logit_scale = nn.Parameter(torch.zeros(1, 1))
    (group,) = parameter_groups(model.named_parameters(), weight_decay=0.1)
    assert group["name"] == "no_decay"


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_frozen_tower_leaves_the_other_and_the_temperature(small_clip) -> None:
    model = small_clip().model
    freeze(model, train_text=False)
    assert all(name.startswith("visual.") or name == "logit_scale" for name in learning(model))
    freeze(model, train_image=False, train_temperature=False)
    assert not any(name.startswith(("visual.", "logit")) for name in learning(model))
    assert "token_embedding.weight" in learning(model)


def test_last_image_blocks_learn_with_norm_and_projection(small_clip) -> None:
    model = small_clip().model
    freeze(model, train_text=False, train_temperature=False, image_blocks=1)
    heads = {name.split("resblocks.")[-1].split(".")[0] for name in learning(model)}
    assert heads == {"1", "visual"}
    assert {name for name in learning(model) if "resblocks" not in name} == {
        "visual.ln_post.weight",
        "visual.ln_post.bias",
        "visual.proj",
    }


@pytest.mark.parametrize("tiny_clip", ["eva02"], indirect=True)
def test_last_blocks_of_an_eva_tower_are_found(tiny_clip) -> None:
    """In timm blocks and tail and tail have other names (G9)."""
    model = tiny_clip.model
    freeze(model, train_text=False, train_temperature=False, image_blocks=1)
    blocks = {name.split("blocks.")[1][0] for name in learning(model) if "blocks." in name}
    assert blocks == {"1"}
    assert "visual.trunk.norm.weight" in learning(model)
    assert "visual.trunk.patch_embed.proj.weight" not in learning(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_blocks": 3}, r"image_blocks is 3 of 2 blocks; use 0 to 2"),
        (dict.fromkeys(("train_image", "train_text", "train_temperature"), False), "nothing to"),
    ],
)
def test_what_cannot_be_trained_is_refused(small_clip, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        freeze(small_clip().model, **options)


def rates(steps: int, schedule) -> list[float]:
    optimizer = adamw([("w", nn.Parameter(torch.zeros(2, 2)))], lr=2.0)
    scheduler = schedule(optimizer)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_rates_of_a_run_of_six_steps() -> None:
    """By hand: 2 steps of warm-up, then (1 + cos(pi k / 4)) for k = 0..3 (B1: never garbage)."""
    half = 2**0.5 / 2
    expected = [1.0, 2.0, 2.0, 1 + half, 1.0, 1 - half]
    assert rates(6, partial(warmup_cosine, warmup=2, steps=6)) == pytest.approx(expected)


def test_the_rate_ends_at_its_floor_and_stays_there() -> None:
    used = rates(8, partial(warmup_cosine, warmup=0, steps=4, final=0.1))
    assert [used[0], *used[4:]] == pytest.approx([2.0, *[0.2] * 4])


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    """The default warm-up with a short run: the full rate would never be reached."""
    with pytest.raises(ValueError, match=r"warm-up takes 1000 of 4 steps"):
        rates(1, partial(warmup_cosine, warmup=1000, steps=4))
