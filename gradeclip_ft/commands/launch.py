"""Which process of a job this is, who started it, and what the death of one means to the others."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping

from omegaconf import DictConfig

from gradeclip_ft.commands.compose import ConfigurationError

# Where launchers say which of a job's processes this is. Lightning sets LOCAL_RANK for its
# children, which inherit the number 0 of a SLURM shell; below srun it can only be a script's own.
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
RANKS_OF_SRUN = ("RANK", "SLURM_PROCID")
PARENT = "GRADECLIP_FT_PARENT"  # process number of the one that started this one
LOST = 1  # exit code of a process whose parent died
LOOK_EVERY = 2.0  # seconds
# Words of torch.distributed for a process that is gone or does not answer.
GONE = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "NCCL", "Timed out waiting")


def process_rank() -> int:
    """Number of this process in its job; 0 where it is alone or starts the others."""
    if int(os.environ.get("NODE_RANK", 0)) and "RANK" not in os.environ:
        return 1 + int(os.environ.get("LOCAL_RANK", 0))
    names = RANKS_OF_SRUN if _launcher(os.environ)[0] == "srun" else RANKS
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def started_by_us() -> bool:
    """Whether `train` started this process for another rank of its own job.

    A process that is none of its ranks may inherit the number of a run that another program did.
    """
    is_other_rank = int(os.environ.get("LOCAL_RANK", 0)) > 0 and _launcher(os.environ)[0] is None
    return is_other_rank and PARENT in os.environ


def require_as_started(cfg: DictConfig) -> None:
    """Refuse a job whose launcher started other processes than the configuration says.

    Without this, each process of `torchrun ... trainer=cpu` would train a run of its own.

    Raises:
        ConfigurationError: Naming both numbers.
    """
    launcher, started = _launcher(os.environ)
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    if launcher is None or not str(devices).isdigit():
        return
    if int(devices) * nodes != started:
        raise ConfigurationError(
            f"{launcher} started {started} processes, but trainer.devices={devices} x "
            f"trainer.num_nodes={nodes} are configured; use trainer=ddp (or ddp_sim, slurm) with "
            f"trainer.devices=PROCESSES_PER_MACHINE trainer.num_nodes=MACHINES"
        )


def stay_with_parent() -> None:
    """End this process when the one that started it is gone, even inside a collective."""
    if not started_by_us():
        os.environ[PARENT] = str(os.getpid())  # the children that Lightning starts inherit it
        return
    threading.Thread(target=_watch, args=(int(os.environ[PARENT]),), daemon=True).start()


def lost_contact(error: Exception) -> bool:
    """Whether an error is the echo of another process's death."""
    foreign = type(error) is RuntimeError or type(error).__module__.split(".")[0] == "torch"
    return foreign and any(word in str(error) for word in GONE)


def _launcher(environment: Mapping[str, str]) -> tuple[str | None, int]:
    """Name and number of processes where they were started from outside."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun", int(environment["WORLD_SIZE"])
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment and not interactive:
        return "srun", int(environment["SLURM_NTASKS"])
    return None, 1


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    print(
        f"error: the process that started this one ({parent}) is gone; process {process_rank()} "
        "ends, resume=auto goes on",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)
