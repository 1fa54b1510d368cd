"""Sweeps: `-m` runs one job for each combination of values, through Hydra's launchers.

All jobs are composed and checked before the first one starts.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from gradeclip_ft.commands.check import check
from gradeclip_ft.commands.compose import (
    VERSION_BASE,
    ConfigurationError,
    compose,
    conf_dir,
    explain,
)
from gradeclip_ft.commands.failures import wants_traceback

if TYPE_CHECKING:
    from gradeclip_ft.commands.cli import Command

# These run several jobs in one process, or in workers that cannot start `python -m` again.
SHARED_PROCESS = ("basic", "joblib")


def sweep(command: Command, overrides: Sequence[str]) -> int:
    """Run every job of a sweep. Where jobs run one after another, a failed one stops none.

    Raises:
        ConfigurationError: If any job cannot be composed, two jobs share a name, or a job wants
            several processes from a launcher that cannot give them.
    """
    assert command.config is not None
    _check_all(command.config, overrides)
    full = wants_traceback()

    def job(cfg: DictConfig) -> None:
        _run_job(command, cfg, full)

    try:
        _hydra(command.config, ["--multirun", *overrides], job)
    except _JobFailedError:
        return 1
    return 0


def show(command: Command, overrides: Sequence[str], flags: Sequence[str]) -> int:
    """Print what Hydra knows about a configuration (`--cfg`, `--info`) and stop."""
    assert command.config is not None
    _hydra(command.config, [*flags, *overrides], lambda cfg: None)
    return 0


def jobs(config: str, overrides: Sequence[str]) -> list[list[str]]:
    """Overrides of each job: the product of all listed and ranged values."""
    choices: dict[str, list[str]] = {}
    with initialize_config_dir(str(conf_dir()), version_base=VERSION_BASE):
        loader = GlobalHydra.instance().config_loader()
        try:
            parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
        except HydraException as error:
            raise ConfigurationError(explain(error, config, overrides)) from error
        for override in parsed:
            key = override.get_key_element()
            if override.is_discrete_sweep():
                choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            elif not override.is_sweep_override():  # an interval is for its sweeper to draw from
                choices[key] = [f"{key}={override.get_value_element_as_str()}"]
    return [list(job) for job in itertools.product(*choices.values())]


def refuse_shared_process(cfg: DictConfig, launcher: str) -> None:
    """Refuse a job that would start other processes from a process that it does not own.

    Raises:
        ConfigurationError: If the job wants several devices and the launcher cannot give them.
    """
    devices = OmegaConf.select(cfg, "trainer.devices", default=1)
    nodes = OmegaConf.select(cfg, "trainer.num_nodes", default=1)
    if launcher in SHARED_PROCESS and (str(devices) not in ("1", "auto", "[0]") or nodes != 1):
        raise ConfigurationError(
            f"a sweep of jobs with trainer.devices={devices} and trainer.num_nodes={nodes} needs a "
            f"launcher that gives each job its own processes, not hydra/launcher={launcher}; "
            "start the jobs one by one, set trainer=gpu for one device each, "
            "or install and choose hydra/launcher=submitit_slurm"
        )


def _check_all(config: str, overrides: Sequence[str]) -> None:
    names: Counter[str] = Counter()
    for place, job in enumerate(jobs(config, overrides)):
        try:
            cfg = compose(config, job, with_hydra=True)
            launcher = str(cfg.hydra.runtime.choices["hydra/launcher"])
            if cfg.hydra.get("callbacks"):
                raise ConfigurationError("hydra.callbacks would run other code; leave it empty")
            with open_dict(cfg):
                del cfg["hydra"]
            check(cfg, config)
            refuse_shared_process(cfg, launcher)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"job {place} of the sweep ({' '.join(job)}): {error}"
            ) from None
        if "name" in cfg:
            names[str(cfg.name)] += 1
    for name, count in names.items():
        if count > 1:
            raise ConfigurationError(
                f"{count} jobs of the sweep are called {name}; give each a name of its own, "
                f"such as 'name={name}_${{seed}}'"
            )


def _run_job(command: Command, cfg: DictConfig, full: bool) -> None:
    """One job, inside Hydra's multirun."""
    assert command.config is not None
    state = HydraConfig.get()
    overrides = [str(override) for override in state.overrides.task]
    print(f"[job {state.job.num}] {command.name} {' '.join(overrides)}", file=sys.stderr)
    before = sys.argv
    try:
        check(cfg, command.config)
        if command.start(cfg, overrides, full=full) != 0:
            raise _JobFailedError(state.job.num)
    finally:
        sys.argv = before


class _JobFailedError(Exception):
    """A job that has reported its own error."""


def _hydra(config: str, arguments: Sequence[str], task: Callable[[DictConfig], None]) -> None:
    """`hydra.main` on these arguments, its errors left to us."""
    decorate = hydra.main(str(conf_dir()), config, VERSION_BASE)
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        with _raised_errors():
            decorate(task)()
    except HydraException as error:
        raise ConfigurationError(explain(error, config, arguments)) from error
    finally:
        sys.argv = before


@contextmanager
def _raised_errors() -> Iterator[None]:
    """Hydra prints errors and exits, unless this variable asks it to raise them."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
