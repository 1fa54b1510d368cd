"""A run that was interrupted, in whatever way, ends as if it had not been."""

import os
import signal
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch

from gradeclip_ft.explain.game import Game
from gradeclip_ft.losses import AlignmentOptions
from gradeclip_ft.objectives.crops import Crops
from gradeclip_ft.objectives.keep import Keep
from gradeclip_ft.objectives.mosaic import Mosaic
from gradeclip_ft.objectives.sff import SFF
from gradeclip_ft.training import callbacks


class At(pl.Callback):
    """Does something when a step is finished, or within the n-th batch of the next one."""

    def __init__(
        self,
        step: int,
        action: Callable[[pl.Trainer], None],
        *,
        inside: bool = False,
        batch: int = 1,
    ):
        self.step, self.action, self.inside, self.left = step, action, inside, batch

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step and not self.inside:
            self.action(trainer)

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == self.step and self.inside:
            self.left -= 1
            if self.left == 0:
                self.action(trainer)


def fail(trainer: pl.Trainer) -> None:
    raise RuntimeError("out of memory")


def weights(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    return dict(trainer.lightning_module.clip.model.state_dict())


def assert_same_end(run, trainer: pl.Trainer, whole, expected: pl.Trainer) -> None:
    """Every logged loss and every weight, to the last bit, and only one start from nothing."""
    assert run.source.opened.count((0, 0)) == 1
    assert run.losses == whole.losses
    assert [line["step"] for line in run.lines] == list(range(1, 9))
    assert run.lines[-1]["learning_rate"] == whole.lines[-1]["learning_rate"]
    assert run.lines[-1]["skipped"] == whole.lines[-1]["skipped"]
    end = weights(expected)
    assert all(torch.equal(value, end[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize(("stop", "accumulate"), [(1, 1), (3, 1), (4, 1), (7, 1), (4, 2)])
def test_resumed_training_equals_uninterrupted(small_run, stop, accumulate) -> None:
    """4 + 4 = 8 steps: also at the end of an epoch (3) and in the middle of one (B5, B6)."""
    whole, parts = small_run("whole"), small_run("parts")
    expected = whole.train(accumulate=accumulate)
    parts.train(stop_at=stop, accumulate=accumulate)
    assert max(parts.losses) == stop
    trainer = parts.train(resume=True, accumulate=accumulate)
    assert_same_end(parts, trainer, whole, expected)


def taught() -> SFF:
    """Everything that has a state: both copies, the momentum copy, a temperature; and draws."""
    alignment = AlignmentOptions(kind="contrastive", temperature="learned")
    terms = {"keep": Keep(), "crops": Crops(grids=(2,), per_image=1), "mosaic": Mosaic()}
    options = {"maps_from": "ema", "ema_momentum": 0.5, "momentum": 0.5, "every": 3}
    return SFF(Game(), alignment, terms=terms, **options)


@pytest.mark.parametrize("stop", [3, 4])
def test_teachers_resume_with_the_run(small_run, small_clip, stop) -> None:
    """At the end of an epoch (3) and inside one.

    Would catch an average that begins again, and a start model that is the resumed one.
    """
    whole, parts = small_run("whole"), small_run("parts")
    expected = whole.train(objective=taught())
    parts.train(objective=taught(), stop_at=stop)
    assert max(parts.losses) == stop
    other = small_clip()
    with torch.no_grad():
        other.model.visual.proj.add_(1.0)
    trainer = parts.train(objective=taught(), clip=other, resume=True)
    assert_same_end(parts, trainer, whole, expected)
    states = [run.lightning_module.objective.state_dict() for run in (trainer, expected)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("accumulate", "when"),
    [
        (1, {"step": 5}),
        (1, {"step": 5, "inside": True}),
        (2, {"step": 5, "inside": True}),
        (2, {"step": 5, "inside": True, "batch": 2}),
        (2, {"step": 7, "inside": True, "batch": 2}),
    ],
)
def test_a_failure_loses_nothing(small_run, accumulate, when) -> None:
    """The steps since the last checkpoint are saved although the loops are inside a step.

    Would catch a run that continues inside the step while its data begin at the step again.
    """
    whole, parts = small_run("whole"), small_run("parts")
    expected = whole.train(accumulate=accumulate)
    with pytest.raises(RuntimeError, match="out of memory"):
        parts.train(accumulate=accumulate, callbacks=(At(action=fail, **when),))
    assert max(parts.losses) == when["step"]
    parts.train(accumulate=accumulate, resume=True, stop_at=when["step"])
    trainer = parts.train(accumulate=accumulate, resume=True)
    assert_same_end(parts, trainer, whole, expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_inside_a_step_ends_the_run_after_it(small_run, number) -> None:
    """What a cluster sends before it takes a node away; the step is finished and saved."""
    whole, parts = small_run("whole"), small_run("parts")
    expected = whole.train()
    send = At(5, lambda trainer: os.kill(os.getpid(), number), inside=True)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        parts.train(callbacks=(send,))
    assert ended.value.code == 143
    assert parts.losses.keys() == {1, 2, 3, 4, 5, 6}
    saved = torch.load(parts.folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert signal.getsignal(number) == before
    assert_same_end(parts, parts.train(resume=True), whole, expected)


def test_a_run_that_stops_early_by_itself_can_go_on(small_run) -> None:
    """A time limit ends training between two checkpoints."""
    whole, parts = small_run("whole"), small_run("parts")
    expected = whole.train()
    parts.train(callbacks=(At(5, lambda trainer: setattr(trainer, "should_stop", True)),))
    assert max(parts.losses) == 5
    assert_same_end(parts, parts.train(resume=True), whole, expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_skipped_samples_are_counted_up_to_the_save(small_run, accumulate) -> None:
    """One per batch; would catch counts of the last record, and batches that are taken again."""
    run = small_run()
    options = {"accumulate": accumulate, "log_every": 8}
    stop = At(5, fail, inside=True, batch=accumulate)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train(callbacks=(stop,), **options)
    run.train(resume=True, **options)
    assert [line["skipped"] for line in run.lines] == [8 * accumulate]


def test_only_saves_of_all_processes_gather_what_was_skipped(small_run, monkeypatch) -> None:
    """Two processes alike: a save after a failure is one process's, which must not wait."""
    calls: list[object] = []
    monkeypatch.setattr(callbacks, "gather", lambda own: (calls.append(own), [own, own])[1])
    run = small_run()
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train(callbacks=(At(5, fail),), log_every=8, checkpoint_every=3)
    assert calls == [{"broken image": 3}]
    saved = torch.load(run.folder / "last.ckpt", weights_only=True)["callbacks"]["MetricsRecorder"]
    assert saved == {"skipped": {"broken image": 2 * 3 + 2}}


def test_lines_after_the_checkpoint_are_written_once(small_run) -> None:
    """A killed run has logged further than it has saved; steps must not appear twice."""
    run = small_run()
    run.train(stop_at=4)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    run.train(resume=True)
    assert [line["step"] for line in run.lines] == list(range(1, 9))
    table = (run.folder / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in table] == ["step", *map(str, range(1, 9))]


def test_resuming_a_finished_run_changes_nothing(small_run) -> None:
    run = small_run()
    run.train()
    before = (run.folder / "metrics.jsonl").read_bytes()
    assert run.train(resume=True).global_step == 8
    assert (run.folder / "metrics.jsonl").read_bytes() == before


def seen_after_a_change(run, name: str) -> tuple[list[str], list[str]]:
    """First samples of the batches before and after a resume with another setting of the data."""
    seen: list[str] = []
    run.source.change = lambda batch: (seen.append(batch.keys[0]), batch)[1]
    run.train(stop_at=2)
    before = list(seen)
    setattr(run.source, name, 3)
    run.train(resume=True, stop_at=4)
    return before, seen[len(before) :]


@pytest.mark.parametrize("name", ["workers", "batch_size"])
def test_other_workers_or_batches_begin_new_draws(small_run, name, caplog) -> None:
    """Would catch other workers that draw from the start what was drawn before."""
    run = small_run()
    run.source.resampled = True
    before, after = seen_after_a_change(run, name)
    assert before[:2] == ["0-0", "1-0"]
    assert not {"0-0", "1-0", "2-0", "100-0", "101-0", "102-0"} & set(after)
    assert len(set(after)) == len(after) >= 2
    assert f"{name} was" in caplog.text
    assert ("another number of pairs" in caplog.text) == (name == "batch_size")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, r"\d, is 3: data.resampled=false") for name in ("workers", "batch_size")),
        ("batches", "2, is 3"),
    ],
)
def test_other_batches_are_refused_where_samples_come_once(small_run, name, said) -> None:
    """An epoch of another length would repeat some samples and leave out others."""
    run = small_run()
    run.source.batches = 2
    with pytest.raises(ValueError, match=rf"{name}\w* was {said}"):
        seen_after_a_change(run, name)


def test_the_order_differs_between_epochs_and_seeds(small_run) -> None:
    """B5: an epoch that repeats the order of the one before."""
    seen: list[str] = []
    for seed in (0, 1):
        run = small_run(str(seed))
        run.source.change = lambda batch: (seen.append(batch.keys[0]), batch)[1]
        run.train(max_steps=7, seed=seed)
    assert len(set(seen)) == 14
