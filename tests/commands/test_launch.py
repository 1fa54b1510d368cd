"""Which process this is, who started it, and whether that fits the configuration."""

import os
from contextlib import nullcontext

import pytest
from omegaconf import OmegaConf

from gradeclip_ft.commands import cli
from gradeclip_ft.commands.cli import (
    lost_contact,
    process_rank,
    refuse_shared_process,
    require_as_started,
)
from gradeclip_ft.commands.config import ConfigurationError, compose

TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "b16"}
SHELL = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}
VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    *SLURM,
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Sets the variables of a launcher and no others."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),
        ({"RANK": "4", "LOCAL_RANK": "0", "NODE_RANK": "1"}, 4),
        (SLURM, 5),
        ({**SLURM, "LOCAL_RANK": "0"}, 5),  # exported by a script below srun
        ({**SHELL, "LOCAL_RANK": "1"}, 1),  # started by Lightning in a shell of SLURM
        (SHELL, 0),
        ({"NODE_RANK": "1"}, 1),
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, 0),
    ],
)
def test_only_one_process_of_a_job_is_the_first(environment, variables, rank) -> None:
    """A6: two processes that both write the run's files spoil them."""
    environment(variables)
    assert process_rank() == rank


def trainer(devices: object, nodes: int = 1):
    processes = {"devices": devices, "num_nodes": nodes}
    return OmegaConf.create({"trainer": {"accelerator": "cpu", **processes}})


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "refusal"),
    [
        ({}, 2, 1, None),  # we start the second one ourselves
        (TORCHRUN, 4, 1, None),
        (TORCHRUN, 2, 2, None),
        (TORCHRUN, "auto", 1, None),
        (SLURM, 4, 2, None),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, 1, 1, None),
        ({"SLURM_NTASKS": "8"}, 1, 1, None),  # in the batch script itself, not below srun
        (TORCHRUN, 1, 1, "torchrun started 4 processes, but trainer.devices=1"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}, 1, 1, "ddp_sim trainer.devices=2 .*num_nodes=2"),
        (TORCHRUN, 2, 1, "trainer.devices=2 x trainer.num_nodes=1"),
        (SLURM, 4, 1, "srun started 8 processes.* trainer=slurm trainer.devices=8"),
    ],
)
def test_a_job_started_otherwise_than_configured_is_refused(
    environment, variables, devices, nodes, refusal
) -> None:
    """Would catch four processes that each train a run of their own and write the same files."""
    environment(variables)
    with pytest.raises(ConfigurationError, match=refusal) if refusal else nullcontext():
        require_as_started(trainer(devices, nodes))


def test_the_slurm_file_is_one_task_per_gpu(environment) -> None:
    """H3: Lightning and SLURM must agree on tasks, and only one of them requeues."""
    cfg = compose("train", ["name=a", "trainer=slurm", "trainer.num_nodes=2"])
    assert (cfg.trainer.strategy, cfg.trainer.accelerator) == ("ddp", "gpu")
    environment(SLURM)
    require_as_started(cfg)


def test_a_sweep_through_slurm_may_have_several_processes_per_job() -> None:
    """Submitit starts the tasks of each job itself; basic and joblib share one process."""
    refuse_shared_process(trainer(4), "submitit_slurm")
    for launcher in ("basic", "joblib"):
        with pytest.raises(ConfigurationError, match="submitit_slurm"):
            refuse_shared_process(trainer(4), launcher)


def test_the_echo_of_a_death_is_told_from_an_error_of_our_own() -> None:
    gone = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert lost_contact(gone)
    assert not lost_contact(RuntimeError("out of memory"))
    assert not lost_contact(BrokenPipeError("Broken pipe"))


def test_only_other_ranks_watch_their_parent(environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a first process that takes itself for a child: it exits with 0 on SIGTERM.

    Also one that inherits the number of another program's run, such as a notebook's.
    """
    environment({})
    for inherited in ("", str(os.getppid())):
        monkeypatch.setenv(cli.PARENT, inherited)
        assert not cli.started_by_us()
        cli.stay_with_parent()
        assert os.environ[cli.PARENT] == str(os.getpid())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.started_by_us()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not cli.started_by_us()
