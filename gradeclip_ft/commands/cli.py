"""From the command line to a command: help, options, sweeps, and which process of a job this is.

The command is taken off before Hydra sees the rest. Inside a command, `sys.argv` is the command and
the overrides of this job alone, because distributed training starts its other processes from it.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import inspect
import logging
import os
import re
import signal
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict
from omegaconf.errors import ValidationError

import gradeclip_ft
from gradeclip_ft.commands.config import (
    PACKAGE,
    VERSION_BASE,
    ConfigurationError,
    check,
    compose,
    conf_dir,
    config_dirs,
    describe,
    options,
    perform,
    primary_groups,
    run_name,
    search_path,
    suggest,
    wants_traceback,
)
from gradeclip_ft.results.masking import masked_output

PROGRAM = f"python -m {PACKAGE.name}"
CONFIGURATION_ERROR, INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Command:
    """A command: its name, config file and groups."""

    name: str  # of the module in gradeclip_ft.commands
    config: str | None  # primary file, conf/<config>.yaml; None for a plain command without Hydra
    calls: str | None = None  # name of the function where it is another than the module's
    actions: bool = False  # whether its module is light and holds ACTIONS, which its help shows
    several: str | None = None  # a group of which it takes several options: `group=[a,b]` or `all`
    default: str = ""  # option of it where none is given
    never: Mapping[str, str] = field(default_factory=dict)  # options refused, with the reason

    def overrides(self, given: Sequence[str]) -> list[str]:
        """All overrides of a command line, as Hydra takes them."""
        if self.config is not None and "model" in primary_groups(self.config):
            given = named_model(given)
        if self.several is None:
            return list(given)
        start = f"{self.several}="
        listed = [override for override in given if override.startswith(start)]
        names = [
            name.strip(" '\"")
            for override in listed or [start + self.default]
            for name in override.removeprefix(start).strip("[]").split(",")
        ]
        if "all" in names:
            names = [self.default, *(n for n in options(self.several) if n not in self.never)]
        for name in names:
            if name in self.never:
                raise ConfigurationError(f"{self.several}={name}: {self.never[name]}")
        added = [f"+{self.several}@{self.several}.{name}={name}" for name in dict.fromkeys(names)]
        return [*added, *(override for override in given if override not in listed)]

    @property
    def help(self) -> str:
        """Docstring of the command, read without importing it."""
        tree = ast.parse((PACKAGE / "commands" / f"{self.name}.py").read_text(encoding="utf-8"))
        named = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        return ast.get_docstring(named[self.calls or self.name]) or ""

    def function(self) -> Callable[..., Any]:
        """The command itself; its module is imported only when it runs."""
        module = importlib.import_module(f"{PACKAGE.name}.commands.{self.name}")
        function: Callable[..., Any] = getattr(module, self.calls or self.name)
        return function

    @masked_output()  # again, because a job of a sweep may run in a process of its own
    def start(self, cfg: DictConfig, overrides: Sequence[str]) -> int:
        """Run in this process, with the command line that would repeat this job alone."""
        sys.argv = [sys.argv[0], self.name, *overrides]
        shown = logging.StreamHandler()
        shown.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logging.basicConfig(handlers=[shown])
        logging.getLogger(PACKAGE.name).setLevel(logging.INFO)
        return perform(lambda: self.function()(cfg), full=wants_traceback())


def named_model(given: Sequence[str]) -> list[str]:
    """`model=ViT-B-32` as choices of conf/: a name of open_clip, with its usual weights."""
    names = [item.removeprefix("model=") for item in given if item.startswith("model=")]
    package = find_spec("open_clip")
    assert package is not None
    assert package.submodule_search_locations is not None
    configs = Path(package.submodule_search_locations[0]) / "model_configs"
    if len(names) != 1 or not names[0] or names[0] in options("model"):
        return list(given)
    if names[0] not in [path.stem for path in configs.glob("*.json")]:
        return list(given)
    name, added = names[0], []
    if not any(item.startswith("model.weights=") for item in given):
        load = importlib.import_module(f"{PACKAGE.name}.models.load")  # only now, since it is slow
        try:
            name, weights = load.usual_weights(name)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        added = [f"model.weights={weights}"]
    chosen = ["model=open_clip", f"model.name={name}", *added]
    return [*chosen, *(item for item in given if not item.startswith("model="))]


@masked_output()
def run(commands: Mapping[str, Command], arguments: Sequence[str]) -> int:
    """Do what the command line says.

    Returns:
        Exit code: 0, 1 for a failure while running, 2 for a command line or a configuration that
        cannot be understood, 130 for Ctrl-C.
    """
    name, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    try:
        if name in ("-h", "--help", "help"):
            print(program_help(commands))
            code = 0
        elif name == "--version":
            print(gradeclip_ft.__version__)
            code = 0
        elif name not in commands:
            raise ConfigurationError(f"there is no command {name}; {suggest(name, commands)}")
        else:
            code = _run(commands[name], rest)
        sys.stdout.flush()
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return CONFIGURATION_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `list models | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _run(command: Command, arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(command_help(command))
        return 0
    arguments = _without_folder(arguments)
    if command.config is None:
        return perform(lambda: call(command.function(), arguments), full=wants_traceback())
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job",))
    parser.add_argument("-r", "--resolve", action="store_true")
    flags = parser.parse_intermixed_args(arguments)
    overrides = command.overrides(flags.overrides)
    if not any(override.startswith("hydra.searchpath=") for override in overrides):
        overrides += search_path()  # as an override, which the other processes of a job repeat
    if flags.multirun:
        return sweep(command, overrides)
    cfg = compose(command.config, overrides)
    if flags.cfg is not None:
        print(OmegaConf.to_yaml(cfg, resolve=flags.resolve), end="")
        return 0
    check(cfg, command.config)
    return command.start(cfg, overrides)


def _without_folder(arguments: Sequence[str]) -> list[str]:
    """The arguments but for `--config-dir DIR`, in which `config` looks from now on."""
    config_dirs.clear()
    rest = list(arguments)
    for at, word in enumerate(arguments):
        name, _, given = word.partition("=")
        if name in ("-cd", "--config-dir"):
            folder = given or " ".join(arguments[at + 1 : at + 2])
            if not folder or not Path(folder).is_dir():
                raise ConfigurationError(f"--config-dir {folder} is not a folder")
            config_dirs.append(Path(folder))
            del rest[at : at + (1 if given else 2)]
    return rest


class _Parser(ArgumentParser):
    """Raises where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see --help")


def program_help(commands: Mapping[str, Command]) -> str:
    """What the program is and which commands it has."""
    width = max(map(len, commands)) + 2
    names = [f"  {n:<{width}}{c.help.splitlines()[0].rstrip('.')}" for n, c in commands.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [key=value ...]\n\ncommands:",
            *names,
            "",
            f"{PROGRAM} COMMAND --help     options of a command",
            f"{PROGRAM} list experiments   what +exp=NAME may be",
            f"{PROGRAM} train +exp=smoke   four steps, to see that everything works",
        ]
    )


def command_help(entry: Command) -> str:
    """What a command does, and what can be set."""
    if entry.config is None:
        lines = [f"usage: {PROGRAM} {entry.name} ...\n\n{entry.help}"]
        if entry.actions:
            module = importlib.import_module(f"{PACKAGE.name}.commands.{entry.name}")
            for name, action in module.ACTIONS.items():
                lines += [f"\n{entry.name} {name} {usage(action)}", f"    {action.__doc__.strip()}"]
        return "\n".join(lines)
    chosen = [*primary_groups(entry.config), "exp"]
    width = max(map(len, chosen)) + 3
    names = {group: ", ".join(options(group)) for group in chosen}
    # The primary file from the first key on, as written there with its comments.
    lines = (conf_dir() / f"{entry.config}.yaml").read_text(encoding="utf-8").splitlines()
    keys = lines[lines.index("defaults:") + 1 :]
    return "\n".join(
        [
            f"usage: {PROGRAM} {entry.name} [group=choice ...] [key=value ...]",
            f"\n{entry.help}\n\ngroups, each with its choices:",
            *(f"  {'+exp' if g == 'exp' else g:<{width}}{names[g]}" for g in chosen if names[g]),
            f"\nkeys (conf/{entry.config}.yaml; a group's own keys: --cfg job):",
            *(f"  {line}" for line in keys if not line.startswith((" ", "-", "#", "hydra"))),
            "\nflags:",
            "  -m, --multirun      one job for each combination of values: seed=0,1,2",
            "  --cfg job           print the configuration and stop; with --resolve, its values",
            "  --config-dir DIR    look for yaml files in DIR too",
            "  HYDRA_FULL_ERROR=1  as environment variable: errors with their traceback",
        ]
    )


def call(function: Callable[..., Any], arguments: Sequence[str]) -> Any:
    """Call `function` with arguments as typed on a command line.

    Keyword-only parameters are its options, key=value, read as their annotations say. A function
    without options gets every argument as a word.

    Raises:
        ConfigurationError: If a word or an option is unknown, missing, or cannot be read.
    """
    signature, hints = inspect.signature(function), get_type_hints(function)
    options = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    # A path or an address may hold a = too.
    given = [a for a in arguments if options and a.partition("=")[0].isidentifier() and "=" in a]
    for name, text in (pair.split("=", 1) for pair in given):
        if name not in options:
            raise ConfigurationError(f"{name}={text}: no such option; {suggest(name, options)}")
    words = [argument for argument in arguments if argument not in given]
    try:
        bound = signature.bind(*words, **dict(pair.split("=", 1) for pair in given))
    except TypeError as error:  # a word or an option is missing, or there is a word too many
        raise ConfigurationError(f"{error}; expected {usage(function)}") from None
    for name, text in bound.arguments.items():
        if isinstance(text, str):
            bound.arguments[name] = _read(name, text, hints.get(name, str))
    return function(*bound.args, **bound.kwargs)


def _read(name: str, text: str, hint: Any) -> Any:
    """The value that a text is by its annotation."""
    if choices := _choices(hint):
        if text not in choices:
            raise ConfigurationError(f"{name}: there is no {text}; {suggest(text, choices)}")
        return text
    if "tuple" in str(hint):
        return tuple(part.strip() for part in text.strip("[]").split(",") if part.strip())
    value = OmegaConf.structured(make_dataclass("Value", [(name, hint, MISSING)]))
    try:
        value[name] = None if text == "null" else text
    except ValidationError:
        kind = getattr(hint, "__name__", str(hint))
        raise ConfigurationError(f"{name}: got {text!r}, expected {kind}") from None
    return value[name]


def usage(function: Callable[..., Any]) -> str:
    """The words and options that a function takes, in one line."""
    words = {"None": "null", "True": "true", "False": "false"}  # as one types them
    hints, shown = get_type_hints(function), []
    for p in inspect.signature(function).parameters.values():
        choices = "|".join(_choices(hints.get(p.name)))
        if p.kind is p.VAR_POSITIONAL:
            shown.append(f"[{p.name.upper()} ...]")
        elif p.kind is not p.KEYWORD_ONLY:
            shown.append(choices or p.name.upper())
        elif p.default is p.empty:
            shown.append(f"{p.name}={choices or '...'}")
        else:
            shown.append(f"[{p.name}={choices or words.get(str(p.default), p.default)}]")
    return " ".join(shown)


def _choices(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """The same items, with a progress bar where somebody watches."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(
        items, what, total, console=console, transient=True, disable=not console.is_terminal
    )


# These run several jobs in one process, or in workers that cannot start `python -m` again.
SHARED_PROCESS = ("basic", "joblib")


def jobs(config: str, overrides: Sequence[str]) -> list[list[str]]:
    """Overrides of each job: the product of all listed and ranged values."""
    with initialize_config_dir(str(conf_dir()), version_base=VERSION_BASE):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        try:
            return BasicSweeper.split_arguments(parser.parse_overrides(list(overrides)), None)[0]
        except HydraException as error:
            raise ConfigurationError(describe(error, config, overrides)) from error


def sweep(command: Command, overrides: Sequence[str]) -> int:
    """Check every job of a sweep, then run them all; where one fails, the others still run."""
    assert command.config is not None
    wanted = jobs(command.config, overrides)
    columns = [column for column in zip(*wanted, strict=True) if len(set(column)) > 1]
    varied = [column[0].partition("=")[0] for column in columns]
    varied = [key for key in varied if key.lstrip("+").split("/")[0] != "exp"]
    _check_jobs(command.config, wanted, varied)
    with initialize_config_dir(str(conf_dir()), version_base=VERSION_BASE):
        main = GlobalHydra.instance().hydra
        assert main is not None
        try:
            main.multirun(
                command.config,
                partial(_run_job, command=command, varied=varied),
                list(overrides),
                with_log_configuration=False,
            )
        except _JobFailedError:
            return 1
        except HydraException as error:
            raise ConfigurationError(describe(error, command.config, overrides)) from error
    return 0


def _check_jobs(config: str, wanted: Sequence[Sequence[str]], varied: Sequence[str]) -> None:
    names: Counter[str] = Counter()
    for place, job in enumerate(wanted):
        try:
            cfg = compose(config, job, with_hydra=True, suffix=_suffix(job, varied))
            launcher = str(cfg.hydra.runtime.choices["hydra/launcher"])
            if cfg.hydra.get("callbacks"):
                raise ConfigurationError("hydra.callbacks would run other code; leave it empty")
            with open_dict(cfg):
                del cfg["hydra"]
            check(cfg, config)
            refuse_shared_process(cfg, launcher)
        except ConfigurationError as error:
            line = " ".join(job)
            raise ConfigurationError(f"job {place} of the sweep ({line}): {error}") from None
        names.update([str(cfg.name)] if "name" in cfg else [])
    name, count = max(names.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise ConfigurationError(
            f"{count} jobs of the sweep are called {name}; leave name= out, or give each a name of "
            f"its own, such as 'name={name}_${{seed}}'"
        )


def _suffix(job: Sequence[str], varied: Sequence[str]) -> str:
    """Values that this job has to itself, for the name of its run: `_1_0.001`."""
    values = [value for key, _, value in (o.partition("=") for o in job) if key in varied]
    return "".join("_" + re.sub(r"[^\w.+-]+", "-", value).strip("-") for value in values)


def refuse_shared_process(cfg: DictConfig, launcher: str) -> None:
    """Refuse a job that would start other processes from a process that it does not own."""
    devices = OmegaConf.select(cfg, "trainer.devices", default=1)
    nodes = OmegaConf.select(cfg, "trainer.num_nodes", default=1)
    if launcher in SHARED_PROCESS and (str(devices) not in ("1", "auto", "[0]") or nodes != 1):
        raise ConfigurationError(
            f"a sweep of jobs with trainer.devices={devices} and trainer.num_nodes={nodes} needs a "
            f"launcher that gives each job its own processes, not hydra/launcher={launcher}; "
            "start the jobs one by one, set trainer=gpu for one device each, "
            "or install and choose hydra/launcher=submitit_slurm"
        )


def _run_job(cfg: DictConfig, *, command: Command, varied: Sequence[str]) -> None:
    """One job, inside Hydra's multirun."""
    assert command.config is not None
    state = HydraConfig.get()
    overrides = [str(override) for override in state.overrides.task]
    print(f"[job {state.job.num}] {command.name} {' '.join(overrides)}", file=sys.stderr)
    if "name" in cfg and cfg.name is None:
        cfg.name = run_name(state.runtime.choices, _suffix(overrides, varied))
        overrides.append(f"name={cfg.name}")  # for the other processes of this job
    before = sys.argv
    try:
        check(cfg, command.config)
        if command.start(cfg, overrides) != 0:
            raise _JobFailedError(state.job.num)
    finally:
        sys.argv = before


class _JobFailedError(Exception):
    """A job that has reported its own error."""


PARENT = "GRADECLIP_FT_PARENT"  # set where `train` starts the other processes of its job
# Words of torch.distributed for a process that is gone or does not answer.
GONE = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "NCCL", "Timed out waiting")


def process_rank() -> int:
    """Number of this process in its job; 0 where it is alone or starts the others."""
    if int(os.environ.get("NODE_RANK", 0)) and "RANK" not in os.environ:
        return 1 + int(os.environ.get("LOCAL_RANK", 0))
    # Lightning sets LOCAL_RANK for its children, which inherit the number 0 of a SLURM shell;
    # below srun it can only be a script's own.
    below_srun = _launcher()[0] == "srun"
    names = ("RANK", *(() if below_srun else ("LOCAL_RANK",)), "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def started_by_us() -> bool:
    """Whether `train` started this process for another rank of its own job."""
    is_other_rank = int(os.environ.get("LOCAL_RANK", 0)) > 0 and _launcher()[0] is None
    return is_other_rank and PARENT in os.environ


def stay_with_parent() -> None:
    """End this process when the one that started it is killed, even inside a collective."""
    if not started_by_us():
        os.environ[PARENT] = str(os.getpid())  # the children that Lightning starts inherit it
    elif sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def require_as_started(cfg: DictConfig) -> None:
    """Refuse a job whose launcher started other processes than the configuration says.

    Without this, each process of `torchrun ... trainer=cpu` would train a run of its own.
    """
    launcher, started = _launcher()
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    if launcher is None or not str(devices).isdigit() or int(devices) * nodes == started:
        return
    several = "ddp_sim" if cfg.trainer.accelerator == "cpu" else "ddp"
    if launcher == "srun":
        several = "slurm"
    here = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")
    local = int(next((os.environ[name] for name in here if name in os.environ), started))
    raise ConfigurationError(
        f"{launcher} started {started} processes, but trainer.devices={devices} x "
        f"trainer.num_nodes={nodes} are configured; set trainer={several} trainer.devices={local} "
        f"trainer.num_nodes={started // local}"
    )


def lost_contact(error: Exception) -> bool:
    """Whether an error is the echo of another process's death."""
    foreign = type(error) is RuntimeError or type(error).__module__.split(".")[0] == "torch"
    return foreign and any(word in str(error) for word in GONE)


def _launcher() -> tuple[str | None, int]:
    """Name and number of processes where they were started from outside."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun", int(os.environ["WORLD_SIZE"])
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_PROCID" in os.environ and "SLURM_NTASKS" in os.environ and not interactive:
        return "srun", int(os.environ["SLURM_NTASKS"])
    return None, 1
