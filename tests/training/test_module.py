"""The step itself: what it reports, and what it leaves alone."""

import math
from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
import pytest
import torch

from gradeclip_ft.models.clip import Preprocessing
from gradeclip_ft.training.optim import adamw
from tests.training.conftest import make_batch


class KeepGradients(pl.Callback):
    """Copies of all gradients of the last step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = pl_module.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


class PushTemperature(pl.Callback):
    """Gives the temperature a huge gradient of one sign."""

    def __init__(self, sign: float) -> None:
        self.sign = sign

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        pl_module.clip.model.logit_scale.grad.fill_(1e6 * self.sign)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_step_past_a_bound_of_the_temperature_ends_on_it(small_run, sign) -> None:
    """A temperature that runs away never comes back (C8)."""
    trainer = small_run(steps=3).train(lr=50.0, callbacks=(PushTemperature(sign),))
    scale = float(trainer.lightning_module.clip.log_scale.detach())
    assert scale == pytest.approx(0.0 if sign > 0 else math.log(100.0))


@pytest.mark.parametrize("tower", ["text", "image"])
def test_a_frozen_tower_does_not_move(small_run, small_clip, tower) -> None:
    """Maps need gradients inside a frozen image tower; its weights need none."""
    before = small_clip().model.state_dict()
    trainer = small_run(steps=3).train(parts={f"train_{tower}": False})
    after = trainer.lightning_module.clip.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    moving = {name.startswith("visual.") for name in moved - {"logit_scale"}}
    assert moving == {tower == "text"}


def test_checkpointed_activations_give_the_same_losses(small_run) -> None:
    """D1: the gradient inside the forward must survive the recomputation."""
    plain, checkpointed = small_run("plain", steps=3), small_run("checkpointed", steps=3)
    plain.train()
    checkpointed.train(parts={"grad_checkpointing": True})
    assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-5)  # other summation order


def test_colours_of_8_bits_give_the_losses_of_normalised_pixels(small_run) -> None:
    """The loader sends colours, the step normalises them by the model's own numbers."""
    how = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))

    def colours(batch):
        draw = torch.Generator().manual_seed(batch.images.numel())
        pixels = torch.randint(256, batch.images.shape, generator=draw, dtype=torch.uint8)
        return replace(batch, images=pixels)

    def normalised(batch):
        pixels = colours(batch).images.float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (how.mean, how.std))
        return replace(batch, images=(pixels - mean) / std)

    runs = small_run("after", steps=3), small_run("before", steps=3)
    for run, change in zip(runs, (colours, normalised), strict=True):
        run.source.change = change
        run.train(parts={"preprocessing": how})
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)
    with pytest.raises(ValueError, match="give preprocessing="):
        runs[0].train()


def test_a_fused_optimiser_works_beside_mixed_precision_and_clipping(small_run) -> None:
    """Lightning refuses it as if every mixed precision had a loss scaler."""
    plain, fused = small_run("plain", steps=3), small_run("fused", steps=3)
    for run, extra in ((plain, None), (fused, {"fused": True})):
        options = {"precision": "bf16-mixed", "gradient_clip": 0.1}
        run.train(parts={"optimizer": partial(adamw, lr=1e-3, extra=extra)}, **options)
    assert fused.losses == pytest.approx(plain.losses, rel=1e-4)


def test_gradients_are_clipped_by_value_where_that_is_asked(small_run, small_clip) -> None:
    """In bf16 too: SGD then moves every number by the limit, not all of them together."""
    clip = small_clip()
    before = clip.model.visual.conv1.weight.detach().clone()
    small_run(steps=3).train(
        clip=clip,
        parts={"optimizer": lambda named: torch.optim.SGD([part for _, part in named], lr=1.0)},
        precision="bf16-mixed",
        gradient_clip=1e-3,
        extra={"gradient_clip_algorithm": "value"},
    )
    assert float((clip.model.visual.conv1.weight - before).norm()) > 3e-3


def test_every_part_of_the_loss_and_of_the_batch_is_recorded(small_run) -> None:
    run = small_run(steps=3)
    run.train()
    line = run.lines[-1]
    assert line["loss"] == pytest.approx(line["global"] + line["local"], rel=1e-6)
    assert line["phrases_per_caption"] == pytest.approx(5 / 6)
    assert line["captions_without_phrase"] == pytest.approx(2 / 6)  # rows 2 and 5
    assert line["skipped"] == line["skipped/broken image"] == 3
    assert {
        "positive_cosine",
        "negative_cosine",
        "clamped_share",
        "temperature",
        "gradient_norm",
        "samples_per_second",
        "data_seconds",
        "learning_rate",
    } <= set(line)


def test_an_accumulated_step_averages_the_gradients_of_its_batches(small_run) -> None:
    """C6: the batches of a step contrast within themselves; they are no larger batch."""
    first, second, both = (small_run(name, steps=3) for name in ("first", "second", "both"))
    both.train(accumulate=2, max_steps=1, callbacks=(keep := KeepGradients(),))
    first.train(max_steps=1, callbacks=(one := KeepGradients(),))
    second.source.change = lambda batch: make_batch(1)
    second.train(max_steps=1, callbacks=(two := KeepGradients(),))
    for name, gradient in keep.gradients.items():
        mean = (one.gradients[name] + two.gradients[name]) / 2
        torch.testing.assert_close(gradient, mean, rtol=1e-3, atol=1e-5)  # sums of fp32


class KeepSeeds(pl.Callback):
    """What each batch draws first, by step."""

    def __init__(self) -> None:
        self.seeds: list[tuple[int, int]] = []

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self.seeds.append((trainer.global_step, torch.initial_seed()))


def test_every_batch_of_a_step_draws_random_numbers_of_its_own(small_run) -> None:
    """Would catch the same dropout in all batches of a step; steps of one batch keep theirs."""
    one, both = KeepSeeds(), KeepSeeds()
    small_run("one").train(max_steps=4, callbacks=(one,))
    small_run("both").train(accumulate=2, max_steps=2, callbacks=(both,))
    first = one.seeds[0][1]
    assert one.seeds == [(step, first + step) for step in range(4)]
    assert both.seeds == [(0, first), (0, first + 1), (1, first + 2), (1, first + 3)]


@pytest.mark.parametrize("pinned", [True, False])
def test_only_pinned_memory_is_left_to_a_transfer_that_does_not_wait(monkeypatch, pinned) -> None:
    """A loader fills pageable memory again while CUDA may still read it: wrong numbers."""
    asked = []

    def to(tensor, device, *, non_blocking):
        asked.append(non_blocking)
        return tensor

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: pinned)
    monkeypatch.setattr(torch.Tensor, "to", to)
    make_batch(1).to("cuda")
    assert set(asked) == {pinned}
