"""A loss that is not finite stops the run before it can spoil the weights."""

import json
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from gradeclip_ft.training.callbacks import NonFiniteError


class BreakBatch:
    """Makes the n-th batch that is asked for not finite."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, batch):
        self.left -= 1
        if self.left:
            return batch
        images = batch.images.clone()
        images[2] = torch.inf
        return replace(batch, images=images)


@pytest.mark.parametrize(("accumulate", "samples"), [(1, "1000-0, 1000-1"), (2, "2001-0, 2001-1")])
def test_a_broken_batch_stops_the_run_and_the_weights_before_are_kept(
    small_run, accumulate, samples
) -> None:
    """The save happens inside step 4, after all of its batches; the step is then taken again.

    The message is all that a user has after a night of training.
    """
    whole, run = small_run("whole"), small_run("run")
    whole.train(accumulate=accumulate)
    run.source.change = BreakBatch(4 * accumulate)
    with pytest.raises(NonFiniteError) as caught:
        run.train(checkpoint_every=2, accumulate=accumulate)
    last = f"last good checkpoint: {run.folder / 'last.ckpt'} (step 3)"
    for words in ("step 4 is not finite", "loss nan", samples, last, "init_from="):
        assert words in str(caught.value)
    saved = load_file(run.folder / "weights.safetensors")
    assert all(value.isfinite().all() for value in saved.values())
    run.source.change = lambda batch: batch
    run.train(resume=True, checkpoint_every=2, accumulate=accumulate)
    assert run.losses == whole.losses


def test_a_few_broken_steps_are_left_out_and_counted(small_run) -> None:
    """Weights and moments stay as they were: the next steps are those of a run without it."""
    run = small_run()
    run.source.change = BreakBatch(5)
    seen = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            state = pl_module.clip.model.state_dict()
            seen[trainer.global_step] = {key: value.clone() for key, value in state.items()}

    run.train(max_non_finite=1, callbacks=(Watch(),))
    assert [step for step, loss in run.losses.items() if loss is None] == [5]
    assert all(torch.equal(value, seen[4][key]) for key, value in seen[5].items())
    assert not all(torch.equal(value, seen[5][key]) for key, value in seen[6].items())
    assert all(value.isfinite().all() for value in seen[8].values())
    assert [line["left_out_steps"] for line in run.lines] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_one_too_many_stops_with_a_dump_also_after_a_resume(small_run) -> None:
    """The limit is for the run, not for the attempt."""
    run = small_run()
    run.source.change = BreakBatch(3)
    run.train(max_non_finite=1, stop_at=4)
    run.source.change = BreakBatch(2)
    with pytest.raises(NonFiniteError, match=r"step 6 .*; 1 steps before were skipped"):
        run.train(max_non_finite=1, resume=True)
    first, second = map(json.loads, (run.folder / "non_finite.jsonl").read_text().splitlines())
    assert (first["step"], first["stopped"]) == (3, False)
    assert (second["step"], second["stopped"]) == (6, True)
    assert second["last_good"] == f"{run.folder / 'last.ckpt'} (step 5)"
    (process,) = second["processes"]
    assert process["loss"] == "nan"
    assert process["samples"] == [f"1002-{row}" for row in range(6)]
    assert load_file(run.folder / "weights.safetensors")


def test_a_broken_gradient_is_left_out_or_stops_as_well(small_run, small_clip) -> None:
    with pytest.raises(NonFiniteError, match="gradient norm nan"):
        small_run("stops").train(callbacks=(BreakGradient(),))
    run = small_run()
    run.train(max_non_finite=8, callbacks=(BreakGradient(),), gradient_clip=1.0)
    assert run.lines[-1]["left_out_steps"] == 8
    end = load_file(run.folder / "weights.safetensors")
    assert all(torch.equal(v, end[k]) for k, v in small_clip().model.state_dict().items())


def test_training_in_bf16_stays_finite(small_run) -> None:
    """Towers in bf16; log and powers of the focal loss in fp32, where 1 - 1e-6 is not 1 (D5)."""
    exact, half = small_run("exact"), small_run("half")
    exact.train()
    half.train(precision="bf16-mixed")
    assert half.lines[-1]["left_out_steps"] == 0
    for step, loss in exact.losses.items():
        assert half.losses[step] == pytest.approx(loss, rel=0.05), step


def test_without_a_step_there_is_no_checkpoint_to_name(small_run) -> None:
    run = small_run()
    run.source.change = BreakBatch(1)
    with pytest.raises(NonFiniteError, match="last good checkpoint: none yet"):
        run.train()
    assert not (run.folder / "last.ckpt").exists()


class BreakGradient(pl.Callback):
    """A finite loss with a gradient that is not."""

    def on_after_backward(self, trainer, pl_module) -> None:
        pl_module.clip.model.visual.proj.grad[0, 0] = torch.nan


def test_the_gradient_norm_is_that_before_clipping(small_run) -> None:
    """A clipped norm would be 1 at every step and say nothing."""
    plain, clipped = small_run("plain"), small_run("clipped")
    plain.train(max_steps=1)
    clipped.train(max_steps=1, gradient_clip=1e-3)
    assert clipped.lines[0]["gradient_norm"] == plain.lines[0]["gradient_norm"] > 1
