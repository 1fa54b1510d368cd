"""Evaluation around training, and counters."""

import re
from copy import copy
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gradeclip_ft.evaluators.base import Track, untracked
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.architecture import Architecture
from gradeclip_ft.models.clip import LoadedClip, Preprocessing
from gradeclip_ft.models.tokenizer import Tokenizer, WordTokenizer
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.results.record import Measured, read
from gradeclip_ft.training.callbacks import Bar, Evaluate
from gradeclip_ft.training.checkpoints import keep_best
from gradeclip_ft.training.run_files import step_of


class Watch:
    """An evaluator that notes how it finds the model, and spoils the random state."""

    name = "watch"

    def __init__(self) -> None:
        self.protocol: dict = {}
        self.prepared = 0
        self.modes: list[bool] = []
        self.bars: list[list] = []  # what the training's bar shows meanwhile
        self.dies = False  # at the second evaluation

    def prepare(self) -> None:
        self.prepared += 1

    def __call__(self, loaded: LoadedClip, track: Track = untracked) -> Measured:
        for _ in track(range(1), "watching", 1):
            if isinstance(bar := getattr(track, "__self__", None), Bar):
                self.bars.append([copy(task) for task in bar.progress.tasks])
        if self.dies and self.modes:
            raise RuntimeError("the node is gone")
        self.modes.append(any(module.training for module in loaded.clip.modules()))
        torch.manual_seed(99)
        value = float(loaded.clip.log_scale.detach())
        return Measured(metrics={"boxes/top1": value}, protocol={}, data={})


@pytest.fixture
def evaluation(small_clip, tmp_path):
    """A clip, an evaluator on it and the callback, with options."""

    def make(**options: object) -> tuple:
        clip = small_clip()
        words = Tokenizer(WordTokenizer(("a",), 8), 8)
        loaded = LoadedClip(clip, words, Preprocessing(), (16, 16), Architecture("tiny", {}, {}))
        watch = Watch()
        folder = tmp_path / "run" / "evaluations"
        callback = Evaluate({"watch": watch}, loaded, folder=folder, run="run", **options)
        return clip, watch, callback, folder

    return make


def steps(folder) -> list[int]:
    return sorted(int(path.stem.split("@")[1]) for path in folder.glob("*.json"))


def test_evaluators_run_before_during_and_after(small_run, evaluation, small_clip) -> None:
    """The first result is the untouched model; metrics are beside the losses."""
    clip, watch, callback, folder = evaluation(every=3)
    run = small_run()
    trainer = run.train(clip=clip, callbacks=(callback,))
    assert steps(folder) == [0, 3, 6, 8]
    assert [line["step"] for line in run.lines if "watch/boxes/top1" in line] == [0, 3, 6, 8]
    assert watch.prepared == 1
    assert watch.modes == [False] * 4
    assert trainer.lightning_module.training
    assert callback.evaluated == 8
    first, last = (read(folder / f"watch@{step}.json") for step in (0, 8))
    untouched = float(small_clip().log_scale.detach())
    assert first.metrics["boxes/top1"] == untouched != last.metrics["boxes/top1"]
    assert first.weights["hash"] != last.weights["hash"]
    assert (last.run, last.step) == ("run", 8)


def test_the_finished_model_is_also_measured_mixed_with_its_start(
    small_run, evaluation, small_clip
) -> None:
    """By the definition of the mean; the run's own weights are the tuned ones."""
    clip, _, callback, folder = evaluation(alphas=[1.0, 0.75], every=4)
    start = float(small_clip().log_scale.detach())
    small_run().train(clip=clip, callbacks=(callback,))
    tuned = float(clip.log_scale.detach())
    assert {path.name for path in folder.iterdir()} == {
        *(f"watch@{step}.json" for step in (0, 4, 8)),
        "watch@8_alpha0.75.json",
    }
    mixed = read(folder / "watch@8_alpha0.75.json")
    assert mixed.metrics["boxes/top1"] == pytest.approx(0.75 * tuned + 0.25 * start)
    assert mixed.weights["alpha"] == 0.75
    assert read(folder / "watch@8.json").metrics["boxes/top1"] == tuned != start
    with pytest.raises(ValueError, match=r"alpha=1.5 is outside of 0 to 1"):
        evaluation(alphas=[1.5])


def test_the_best_weights_are_kept_beside_the_last(tmp_path) -> None:
    """The value falls and rises; of equal ones the first; another metric begins anew."""
    for step, value in enumerate([0.2, 0.1, 0.5, 0.5]):
        weights = {"weight": torch.full((2,), float(step))}
        keep_best(tmp_path, "watch/top1", {"watch/top1": value}, weights, step=step)
    best = tmp_path / "best.safetensors"
    assert step_of(best) == 2
    assert load_file(best)["weight"].tolist() == [2, 2]
    keep_best(tmp_path, "watch/top5", {"watch/top5": 0.1}, weights, step=9)
    assert step_of(best) == 9


def test_the_best_of_a_run_is_among_its_evaluations(small_run, evaluation) -> None:
    clip, _, callback, folder = evaluation(every=2, best="watch/boxes/top1")
    small_run().train(clip=clip, callbacks=(callback,))
    results = [read(folder / f"watch@{step}.json") for step in range(0, 9, 2)]
    values = {result.step: result.metrics["boxes/top1"] for result in results}
    assert values[step_of(folder.parent / "best.safetensors")] == max(values.values())


def test_a_metric_that_nobody_measures_is_named_before_training(small_run, evaluation) -> None:
    """With evaluation.before=false it was noticed when all steps were done."""
    clip, _, callback, _ = evaluation(best="watch/boxes/top9", before=False)
    run = small_run()
    with pytest.raises(ValueError, match="top9, which no evaluator measures; choose from watch/"):
        run.train(clip=clip, callbacks=(callback,))
    assert not (run.folder / "last.ckpt").exists()


def test_evaluation_changes_no_loss(small_run, evaluation) -> None:
    """Mode, gradients or random numbers that an evaluation leaves behind would show here."""
    clip, _, callback, _ = evaluation(every=2)
    plain, evaluated = small_run("plain"), small_run("evaluated")
    plain.train()
    evaluated.train(clip=clip, callbacks=(callback,))
    losses = {line["step"]: line["loss"] for line in evaluated.lines if "loss" in line}
    assert losses == plain.losses


def test_an_evaluation_that_an_interruption_left_out_is_made_up(small_run, evaluation) -> None:
    """The step is saved first; a node that dies meanwhile must not cost its evaluation.

    Nor may a resumed run be evaluated as the untouched model.
    """
    run = small_run()
    clip, watch, callback, folder = evaluation(every=3)
    watch.dies = True
    with pytest.raises(RuntimeError, match="node is gone"):
        run.train(clip=clip, callbacks=(callback,), checkpoint_every=3)
    assert steps(folder) == [0]
    assert torch.load(run.folder / "last.ckpt", weights_only=True)["global_step"] == 3
    (folder / "watch@0.json").unlink()
    clip, _, callback, _ = evaluation(every=3)
    run.train(clip=clip, callbacks=(callback,), checkpoint_every=3, resume=True)
    assert steps(folder) == [3, 6, 8]


def test_every_so_many_steps_are_recorded_and_shown_and_the_last(small_run, capsys) -> None:
    run = small_run()
    run.train(log_every=3)
    assert [line["step"] for line in run.lines] == [3, 6, 8]
    assert [line["skipped"] for line in run.lines] == [3, 6, 8]
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown] == ["step 3/8", "step 6/8", "step 8/8"]
    assert "samples/s" in shown[0]
    assert [line.split("  ")[1] for line in shown] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all(re.search(r"  \d:\d\d:\d\d left$", line) for line in shown)
    assert shown[-1].endswith("0:00:00 left")


@pytest.mark.parametrize(("weight", "hinted"), [(1.0, False), (1000.0, True)])
def test_a_local_loss_that_drowns_the_global_one_is_said_once(
    small_run, caplog, weight, hinted
) -> None:
    """Would catch a hint for a loss whose weight makes it small, or one at every step."""
    objective = GlobalLocal(GradEclip(create_graph=True), local_weight=weight)
    run = small_run()
    with caplog.at_level("INFO"):
        run.train(max_steps=3, objective=objective)
    hints = [r.getMessage() for r in caplog.records if "times the global one" in r.getMessage()]
    ratio = weight * run.lines[0]["local"] / run.lines[0]["global"]
    assert (ratio >= 10) == hinted
    assert len(hints) == hinted
    assert all(f"{ratio:.0f} times the global one" in hint for hint in hints)
    assert all("objective.alignment.reduction=mean" in hint for hint in hints)


def test_samples_per_second_count_the_time_spent_waiting(small_run, monkeypatch) -> None:
    """By a clock that moves by 1 s per batch that is waited for, and by 2 s per step."""
    import gradeclip_ft.training.callbacks as callbacks
    import gradeclip_ft.training.data_module as data_module

    for module, tick in ((callbacks, 2.0), (data_module, 1.0)):
        clock = SimpleNamespace(perf_counter=partial(next, count(0.0, tick)))
        monkeypatch.setattr(module, "time", clock)
    run = small_run()
    run.train(max_steps=3)
    assert run.lines[-1]["data_seconds"] == 1.0
    assert run.lines[-1]["samples_per_second"] == pytest.approx(6 / 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_every": 0}, "log_every is 0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"stop_at": 0}, "stop_at 0"),
        ({"extra": {"max_epochs": 3}}, "trainer.extra holds max_epochs"),
        (
            {"devices": 2, "strategy": "auto", "accelerator": "gpu"},
            "2 GPUs wanted, 0 found; choose trainer=cpu",
        ),
    ],
)
def test_a_trainer_that_cannot_be_is_refused(small_run, options, message, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=message):
        small_run().train(**options)


def test_the_bar_shows_losses_where_there_is_a_terminal(small_run, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    trainer = small_run().train(max_steps=3)
    bar = trainer.progress_bar_callback
    shown = bar.get_metrics(trainer, trainer.lightning_module)
    assert list(shown) == ["loss", "global", "local", "samples_per_second"]
    assert bar.train_progress_bar.description.endswith("epoch 1/1")


def test_an_evaluation_has_a_bar_of_its_own_while_the_training_has_one(
    small_run, evaluation, monkeypatch
) -> None:
    """Two bars that do not know of each other would draw over each other."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    plain: list[str] = []

    def track(items, what, total):
        plain.append(what)
        return items

    clip, watch, callback, _ = evaluation(every=2, track=track)
    trainer = small_run().train(max_steps=4, clip=clip, callbacks=(callback,))
    below = [[task.description.split("]")[-1] for task in tasks] for tasks in watch.bars]
    at_2, at_4 = ([f"epoch {epoch}/2", "watching"] for epoch in (1, 2))
    assert below == [["watching"], at_2, at_4]
    assert plain == []
    callback.measure(trainer)  # when the training and its bar are gone
    assert plain == ["watching"]
    assert len(trainer.progress_bar_callback.progress.tasks) == 1
