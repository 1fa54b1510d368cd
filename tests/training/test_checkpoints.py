"""Files to go on from, whatever happens while they are written."""

import multiprocessing
import os
import signal
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from gradeclip_ft.training import checkpoints
from gradeclip_ft.training.checkpoints import step_of, write_both

TINY = {"weight": torch.ones(2, 2)}


def die_while_writing(folder: Path) -> None:
    """Killed after the weights are complete and while the checkpoint is being written."""

    def half(state: dict, path: Path) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.torch.save = half
    write_both(folder, {"step": 2}, {"weight": torch.zeros(2, 2)}, step=2)


def test_a_kill_during_writing_leaves_the_previous_files(tmp_path) -> None:
    """G8: a half-written `last.ckpt` is worse than an old one."""
    write_both(tmp_path, {"step": 1}, TINY, step=1)
    process = multiprocessing.get_context("fork").Process(
        target=die_while_writing, args=(tmp_path,)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"step": 1}
    assert torch.equal(load_file(tmp_path / "weights.safetensors")["weight"], TINY["weight"])


def test_a_full_disk_leaves_the_previous_files_and_nothing_else(tmp_path, monkeypatch) -> None:
    write_both(tmp_path, {"step": 1}, TINY, step=1)

    def refuse(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", refuse)
    with pytest.raises(OSError, match="no space left"):
        write_both(tmp_path, {"step": 2}, TINY, step=2)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "weights.safetensors"]
    assert step_of(tmp_path / "weights.safetensors") == 1


def test_checkpoint_needs_no_code_and_matches_the_weights(small_run) -> None:
    """G1: a checkpoint with objects in it cannot be loaded with weights_only."""
    run = small_run()
    run.train(max_steps=3, checkpoint_every=2)
    state = torch.load(run.folder / "last.ckpt", weights_only=True)
    saved = load_file(run.folder / "weights.safetensors")
    assert state["global_step"] == step_of(run.folder / "weights.safetensors") == 3
    assert all(torch.equal(state["state_dict"][f"clip.model.{k}"], v) for k, v in saved.items())


def test_weights_load_in_open_clip_as_they_are(small_run, small_clip, tmp_path) -> None:
    """G4: no prefix, nothing missing, nothing more."""
    run = small_run()
    trainer = run.train(max_steps=1, stop_at=1)
    model = small_clip().model
    path = str(run.folder / "weights.safetensors")
    result = open_clip.load_checkpoint(model, path, strict=True)
    assert result.missing_keys == result.unexpected_keys == []
    images = torch.randn(2, 3, 16, 16)
    trained = trainer.lightning_module.clip.model
    assert torch.equal(model.encode_image(images), trained.encode_image(images))


def test_checkpoints_come_every_so_many_steps(small_run, monkeypatch) -> None:
    steps: list[int] = []
    write = checkpoints.write_both

    def note(*args: object, step: int) -> None:
        steps.append(step)
        write(*args, step=step)

    monkeypatch.setattr(checkpoints, "write_both", note)
    small_run().train(checkpoint_every=3)
    assert steps == [3, 6, 8]


def test_no_checkpoint_before_anything_was_learnt(small_run) -> None:
    """A failure at the start must not replace a good checkpoint by the starting point."""
    run = small_run()

    def fail(batch: object) -> None:
        raise OSError("no data")

    run.source.change = fail
    with pytest.raises(OSError, match="no data"):
        run.train()
    assert not (run.folder / "last.ckpt").exists()


def test_every_must_be_positive(small_run) -> None:
    with pytest.raises(ValueError, match="checkpoint_every is 0"):
        small_run().train(checkpoint_every=0)
