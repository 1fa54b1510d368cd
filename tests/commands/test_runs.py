"""Run directories: claimed once, continued on request, never overwritten."""

import json
import multiprocessing
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors.numpy import save_file

from gradeclip_ft.commands import runs

SETTINGS = {
    "name": "a",
    "resume": None,
    "optim": {"lr": 1e-5, "betas": [0.9, 0.98]},
    "trainer": {"max_steps": 8, "stop_at": None},
    "evaluation": {"every": None},
}


def write_checkpoint(path: Path) -> None:
    """As torch writes them: a zip archive."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"state")


def changed(**dotted: object) -> dict[str, object]:
    """The settings with some values replaced; a double underscore stands for a dot."""
    cfg = OmegaConf.create(SETTINGS)
    for key, value in dotted.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    plain = OmegaConf.to_container(cfg)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a b", "-m", "a\n", "ä"])
def test_a_name_that_could_leave_the_folder_is_refused(name: str) -> None:
    """Would catch a run that writes outside of runs/, or that another system cannot copy."""
    with pytest.raises(ValueError, match="not a valid run name"):
        runs.run_dir(name)


def test_a_new_run_records_its_resolved_configuration_and_environment(tmp_path: Path) -> None:
    """Would catch interpolations in config.yaml, which mean nothing outside of their command."""
    cfg = OmegaConf.create({"steps": 8, "schedule": {"steps": "${steps}"}})
    assert runs.run_dir("b16_lr=1e-5", "/x") == Path("/x/b16_lr=1e-5")  # by its name alone
    assert runs.claim(tmp_path / "a", cfg) is None
    assert runs.read_config(tmp_path / "a").schedule == {"steps": 8}
    assert "${" not in (tmp_path / "a" / "config.yaml").read_text()
    environment = json.loads((tmp_path / "a" / "environment.json").read_text())
    assert {"versions", "commit", "command", "started"} <= set(environment)
    assert "torch" in environment["versions"]


def test_an_existing_run_is_refused_with_the_ways_on(tmp_path: Path) -> None:
    """Would catch a second `train name=a` that overwrites the first."""
    runs.claim(tmp_path / "a", SETTINGS)
    (tmp_path / "a_2").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file; choose another name="):
        runs.claim(tmp_path / "file", SETTINGS)
    before = (tmp_path / "a" / "environment.json").read_text()
    with pytest.raises(FileExistsError, match=r"resume=auto.*name=a_3.*init_from=a"):
        runs.claim(tmp_path / "a", SETTINGS)
    assert (tmp_path / "a" / "environment.json").read_text() == before


@pytest.mark.parametrize("trace", ["last.ckpt", "weights.safetensors", "metrics.jsonl"])
def test_remains_of_a_run_without_its_configuration_are_refused_too(
    tmp_path: Path, trace: str
) -> None:
    """Would catch weights lost because only config.yaml was looked for."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / trace).touch()
    with pytest.raises(FileExistsError):
        runs.claim(tmp_path / "a", SETTINGS)


def test_an_empty_folder_may_be_claimed_also_on_resume(tmp_path: Path) -> None:
    """Would catch a refusal of a folder with a scheduler's log, or of a requeued first start."""
    for name, resume in (("a", None), ("b", "auto")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "slurm.out").touch()
        assert runs.claim(tmp_path / name, SETTINGS, resume=resume) is None
        assert (tmp_path / name / "config.yaml").exists()


def test_resume_continues_from_the_last_checkpoint(tmp_path: Path) -> None:
    """Would catch a restart from zero, or an environment that forgets the first start."""
    runs.claim(tmp_path / "a", SETTINGS)
    write_checkpoint(tmp_path / "a" / "last.ckpt")
    again = changed(resume="auto")
    assert runs.claim(tmp_path / "a", again, resume="auto") == tmp_path / "a" / "last.ckpt"
    assert len(runs.read_environment(tmp_path / "a")["starts"]) == 2
    assert runs.read_config(tmp_path / "a").resume is None


def test_resume_refuses_another_configuration_and_shows_what_changed(tmp_path: Path) -> None:
    """Would catch a run whose second half was trained otherwise than its record says."""
    runs.claim(tmp_path / "a", SETTINGS)
    other = changed(optim__lr=1e-4, trainer__max_steps=16)
    with pytest.raises(ValueError, match="another configuration") as caught:
        runs.claim(tmp_path / "a", other, resume="auto")
    text = str(caught.value)
    assert "optim.lr: 1e-05 -> 0.0001" in text
    assert "trainer.max_steps: 8 -> 16" in text
    assert "betas" not in text


def test_resume_allows_what_the_weights_do_not_depend_on(tmp_path: Path) -> None:
    """Would catch a refusal to stop later, to evaluate more often, or to use fewer machines."""
    runs.claim(tmp_path / "a", SETTINGS)
    other = changed(resume="auto", trainer__stop_at=4, evaluation__every=2, runs_dir="elsewhere")
    runs.claim(tmp_path / "a", other, resume="auto")
    runs.claim(tmp_path / "a", changed(trainer__devices=4, trainer__num_nodes=2), resume="auto")


def test_other_ranks_neither_write_nor_refuse(tmp_path: Path) -> None:
    """Would catch the second process of a job dying on the folder that the first has claimed."""
    assert runs.claim(tmp_path / "a", SETTINGS, rank=1) is None
    assert not (tmp_path / "a").exists()
    runs.claim(tmp_path / "a", SETTINGS)
    assert runs.claim(tmp_path / "a", SETTINGS, rank=1) is None
    write_checkpoint(tmp_path / "a" / "last.ckpt")
    assert runs.claim(tmp_path / "a", SETTINGS, resume="auto", rank=1) is not None


def test_of_two_jobs_with_one_name_one_gets_it(tmp_path: Path) -> None:
    """Would catch a look followed by a write, between which another job claims the folder."""
    refused: list[Exception] = []
    barrier = threading.Barrier(8)

    def claim() -> None:
        barrier.wait()
        try:
            runs.claim(tmp_path / "a", SETTINGS)
        except FileExistsError as error:
            refused.append(error)

    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(claim)
    assert len(refused) == 7


def test_facts_are_added_to_the_record(tmp_path: Path) -> None:
    """Would catch a tagger note that replaces the versions, or leaves a temporary file."""
    runs.claim(tmp_path / "a", SETTINGS)
    runs.record(tmp_path / "a", {"data": {"tagger": "textblob"}})
    environment = runs.read_environment(tmp_path / "a")
    assert environment["data"] == {"tagger": "textblob"}
    assert "versions" in environment
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"config.yaml", "environment.json"}


def test_weights_are_found_by_run_name_folder_or_file(tmp_path: Path) -> None:
    """Would catch init_from= that knows only one of the three, and an export of half a file."""
    runs.claim(tmp_path / "a", SETTINGS)
    weights = tmp_path / "a" / "weights.safetensors"
    save_file({"weight": np.ones(4)}, weights)
    assert runs.resolve_weights("a", tmp_path) == weights
    assert runs.resolve_weights(tmp_path / "a") == weights
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut off.*resume=auto"):
        runs.resolve_weights("a", tmp_path)
    assert runs.resolve_weights(str(weights)) == weights


def test_missing_weights_name_the_likely_run(tmp_path: Path) -> None:
    """Would catch a bare "file not found" behind a misspelt run."""
    runs.claim(tmp_path / "grad_eclip", SETTINGS)
    with pytest.raises(FileNotFoundError, match="did you mean grad_eclip"):
        runs.resolve_weights("grad_elcip", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no weights.safetensors yet"):
        runs.resolve_weights("grad_eclip", tmp_path)
    with pytest.raises(FileNotFoundError, match="there are no runs"):
        runs.resolve_weights("a", tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no run in"):
        runs.read_config(tmp_path / "a")


@pytest.mark.parametrize("resampled", [True, False, None])
def test_only_drawn_samples_allow_another_batch_size(
    tmp_path: Path, resampled: bool | None
) -> None:
    """Would catch a second half of an epoch that repeats samples of the first."""
    settings = {**SETTINGS, "data": {"resampled": resampled, "batch_size": 64, "workers": 8}}
    runs.claim(tmp_path / "a", settings)
    other = {**settings, "data": {"resampled": resampled, "batch_size": 128, "workers": 4}}
    if resampled:
        runs.claim(tmp_path / "a", other, resume="auto")
    else:
        with pytest.raises(ValueError, match=r"data.batch_size: 64 -> 128"):
            runs.claim(tmp_path / "a", other, resume="auto")


def test_side_files_that_a_crash_emptied_do_not_block_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Would catch a run that cannot be continued, and a traceback of a parser."""
    runs.claim(tmp_path / "a", SETTINGS)
    for content in ("", "{", "a: [1,"):
        (tmp_path / "a" / "config.yaml").write_text(content)
        (tmp_path / "a" / "environment.json").write_text(content)
        with pytest.raises(ValueError, match="is empty or cut off; start `train` again"):
            runs.read_config(tmp_path / "a")
        with pytest.raises(FileExistsError, match="resume=auto"):
            runs.claim(tmp_path / "a", SETTINGS)
        runs.claim(tmp_path / "a", SETTINGS, resume="auto")
        assert runs.read_config(tmp_path / "a").optim.lr == 1e-5
        assert runs.read_environment(tmp_path / "a")["starts"]
        assert "config.yaml is missing or cut off; it is written again" in caplog.text


def test_a_model_in_a_relative_folder_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a run that can be evaluated from one folder alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    settings = {**SETTINGS, "model": {"name": "mine", "weights": None}}
    runs.claim(tmp_path / "a", settings)
    assert runs.read_config(tmp_path / "a").model.name == str(tmp_path / "mine")
    runs.claim(tmp_path / "a", settings, resume="auto")


def hold(folder: Path, ready: Connection) -> None:
    """Holds a run until killed, beside a worker that outlives it for a while."""
    with runs.locked(folder):
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,)).start()
        ready.send(True)
        time.sleep(60)


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    """Would catch two resumed processes that write one folder, and a lock that outlives its holder.

    Loader workers outlive a killed process by some seconds; a restart must not wait for them.
    """
    here, there = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "a", there))
    holder.start()
    assert here.poll(30)
    with (
        pytest.raises(FileExistsError, match=rf"being trained by process {holder.pid} on"),
        runs.locked(tmp_path / "a"),
    ):
        pass
    holder.kill()
    holder.join()
    with runs.locked(tmp_path / "a"):
        pass
