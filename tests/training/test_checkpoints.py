"""Files to go on from, whatever happens while they are written."""

import errno
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import lightning.pytorch as pl
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from gradeclip_ft.training import checkpoints
from gradeclip_ft.training.checkpoints import SaveError, write_both
from gradeclip_ft.training.run_files import damage, newest_good, step_of

TINY = {"weight": torch.ones(2, 2)}


def test_checkpoint_needs_no_code_and_matches_the_weights(small_run) -> None:
    """G1: a checkpoint with objects in it cannot be loaded with weights_only."""
    run = small_run()
    run.train(max_steps=3, checkpoint_every=2)
    state = torch.load(run.folder / "last.ckpt", weights_only=True)
    saved = load_file(run.folder / "weights.safetensors")
    assert state["global_step"] == step_of(run.folder / "weights.safetensors") == 3
    assert all(torch.equal(state["state_dict"][f"clip.model.{k}"], v) for k, v in saved.items())


def test_weights_load_in_open_clip_as_they_are(small_run, small_clip) -> None:
    """G4: no prefix, nothing missing, nothing more."""
    run = small_run()
    trainer = run.train(max_steps=1, stop_at=1)
    model = small_clip().model
    open_clip.load_checkpoint(model, str(run.folder / "weights.safetensors"), strict=True)
    images = torch.randn(2, 3, 16, 16)
    trained = trainer.lightning_module.clip.model
    assert torch.equal(model.encode_image(images), trained.encode_image(images))


def test_no_checkpoint_before_anything_was_learnt(small_run) -> None:
    """A failure at the start must not replace a good checkpoint by the starting point."""
    run = small_run()
    run.source.change = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert not (run.folder / "last.ckpt").exists()


@pytest.mark.parametrize("option", ["checkpoint_every", "keep"])
def test_numbers_of_checkpoints_must_be_positive(small_run, option) -> None:
    with pytest.raises(ValueError, match=f"{option} is 0"):
        small_run().train(**{option: 0})


def test_older_checkpoints_are_kept_as_many_as_asked_for(small_run) -> None:
    run = small_run()
    run.train(checkpoint_every=2, keep=3)
    kept = {path.name: torch.load(path, weights_only=True) for path in run.folder.glob("*.ckpt")}
    steps = {name: state["global_step"] for name, state in kept.items()}
    assert steps == {"last.ckpt": 8, "step-00000004.ckpt": 4, "step-00000006.ckpt": 6}
    assert all(damage(run.folder / name) is None for name in [*kept, "weights.safetensors"])
    alone = small_run("alone")
    alone.train(checkpoint_every=2, keep=1)
    assert [path.name for path in alone.folder.glob("*.ckpt")] == ["last.ckpt"]


def cut(content: bytes) -> bytes:
    return content[:-100]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("harm", [cut, flip, lambda content: b"", None])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(small_run, caplog, harm) -> None:
    """Would catch a run that resumes from half a file, or cannot be resumed at all."""
    whole, run = small_run("whole"), small_run()
    whole.train(checkpoint_every=2)
    run.train(checkpoint_every=2, stop_at=6)
    last = run.folder / "last.ckpt"
    last.write_bytes(harm(last.read_bytes())) if harm else last.unlink()
    assert newest_good(run.folder) == run.folder / "step-00000004.ckpt"
    assert ("resuming from" in caplog.text) == (harm is not None)
    run.train(resume=True, checkpoint_every=2)
    assert run.losses == whole.losses
    assert newest_good(run.folder) == run.folder / "last.ckpt"


def test_only_damaged_checkpoints_are_an_error_and_not_a_new_start(small_run) -> None:
    run = small_run()
    run.train(checkpoint_every=2, stop_at=4)
    for path in run.folder.glob("*.ckpt"):
        path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(ValueError, match=r"no checkpoint can be used: .*cut off"):
        newest_good(run.folder)


def test_a_kill_between_any_two_operations_leaves_a_good_checkpoint(tmp_path, monkeypatch) -> None:
    """Every rename and every flush in turn is the last thing that happens."""
    write_both(tmp_path, {"step": 1}, TINY, step=1)
    for number in range(20):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path, folder, ignore=lambda *_: {str(n) for n in range(20)})
        process = multiprocessing.get_context("fork").Process(
            target=die_at_operation, args=(folder, number)
        )
        process.start()
        process.join(60)
        good = newest_good(folder)
        assert good is not None
        state = torch.load(good, weights_only=True)
        assert damage(folder / "weights.safetensors") is None
        assert step_of(folder / "weights.safetensors") >= state["step"]
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert number > 6
    assert state == {"step": 2}


def die_at_operation(folder: Path, number: int) -> None:
    """Killed before the n-th rename, flush or removal of a save."""
    left = iter(range(number))

    def counted(native):
        def call(*args, **kwargs):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return native(*args, **kwargs)

        return call

    os.fsync = counted(os.fsync)
    Path.replace, Path.unlink = counted(Path.replace), counted(Path.unlink)
    write_both(folder, {"step": 2}, {"weight": torch.zeros(2, 2)}, step=2, keep=2, before=1)


def test_what_a_killed_process_left_is_swept_away(small_run) -> None:
    run = small_run()
    run.train(stop_at=4)
    (run.folder / ".last.ckpt.123").write_bytes(b"half")
    (run.folder / ".mine").touch()
    run.train(resume=True)
    assert [path.name for path in run.folder.glob(".*")] == [".mine"]


class Full:
    """A disk that is full at some saves, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, saves: tuple[int, ...]) -> None:
        self.count, self.saves, self.native = 0, saves, torch.save
        monkeypatch.setattr(checkpoints.torch, "save", self)

    def __call__(self, state: object, file: BinaryIO) -> None:
        self.count += 1
        if self.count in self.saves:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.native(state, file)


def test_a_full_disk_stops_the_run_with_the_last_good_checkpoint(small_run, monkeypatch) -> None:
    run = small_run()
    Full(monkeypatch, (2,))
    with pytest.raises(SaveError, match=r"step 4: .*No space left.*last.ckpt \(step 2\)") as caught:
        run.train(checkpoint_every=2)
    assert "trainer.on_save_error=continue" in str(caught.value)
    assert torch.load(newest_good(run.folder), weights_only=True)["global_step"] == 2
    run.train(resume=True, checkpoint_every=2)
    assert list(run.losses) == list(range(1, 9))


def test_a_full_disk_can_be_lived_through(small_run, monkeypatch, caplog) -> None:
    """Reported each time; the next checkpoint is written when there is room again."""
    run = small_run()
    Full(monkeypatch, (2, 3))
    run.train(checkpoint_every=2, on_save_error="continue")
    assert caplog.text.count("training continues") == 2
    assert torch.load(newest_good(run.folder), weights_only=True)["global_step"] == 8


def test_a_failed_save_is_not_tried_again_within_the_next_step(small_run, monkeypatch) -> None:
    """Would catch process 0 saving at every batch, and the others, who know no failure, not."""
    run = small_run()
    disk = Full(monkeypatch, (1,))
    run.train(checkpoint_every=2, on_save_error="continue", accumulate=3, max_steps=4)
    assert disk.count == 2
    assert torch.load(newest_good(run.folder), weights_only=True)["global_step"] == 4


def test_a_run_never_ends_well_without_its_last_checkpoint(small_run, monkeypatch) -> None:
    run = small_run()
    Full(monkeypatch, (4, 5))
    with pytest.raises(SaveError, match=r"step 8: .*last.ckpt \(step 6\)"):
        run.train(checkpoint_every=2, on_save_error="continue")


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 100 kB."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("state", "weights"), [(10, 10**5), (10**5, 10)])
def test_what_the_writers_of_either_file_say_is_understood(
    tmp_path, small_disk, state, weights
) -> None:
    """Torch and safetensors have errors of their own for a disk that takes no more."""
    write_both(tmp_path, {"step": 1}, TINY, step=1)
    large = {"state": torch.zeros(state)}, {"weight": torch.zeros(weights)}
    with pytest.raises(OSError, match="File too large"):
        write_both(tmp_path, *large, step=2)
    assert not list(tmp_path.glob(".*"))
    assert torch.load(newest_good(tmp_path), weights_only=True) == {"step": 1}


class NoRoom(pl.Callback):
    """Files may not grow in steps 4 and 5."""

    def __init__(self, run) -> None:
        self.file = run.folder / "metrics.jsonl"
        self.resource = pytest.importorskip("resource")
        self.before = self.resource.getrlimit(self.resource.RLIMIT_FSIZE)

    def on_train_batch_start(self, trainer, *_) -> None:
        full = trainer.global_step in (3, 4)
        self.limit(self.file.stat().st_size + 10 if full else self.before[0])

    def on_exception(self, *_) -> None:
        self.limit(self.before[0])

    def limit(self, size: int) -> None:
        self.resource.setrlimit(self.resource.RLIMIT_FSIZE, (size, self.before[1]))


def test_metrics_without_room_end_no_run_that_is_to_go_on(small_run, caplog) -> None:
    """Would catch `continue` that survives the large files and dies of the small ones."""
    run, other = small_run(), small_run("other")
    run.train(callbacks=(NoRoom(run),), on_save_error="continue", checkpoint_every=8)
    assert list(run.losses) == [1, 2, 3, 6, 7, 8]
    assert "metrics of step 4 are lost" in caplog.text
    with pytest.raises(OSError, match="File too large"):
        other.train(callbacks=(NoRoom(other),), checkpoint_every=8)
    assert list(other.losses) == [1, 2, 3]
