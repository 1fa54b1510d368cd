"""From the command line to a command: help, composition, readable errors.

The command is taken off before Hydra sees the rest. Inside a command, `sys.argv` is the command and
the overrides of this job alone, because distributed training starts its other processes from it.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import os
import sys
import threading
import time
import types
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import hydra
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

import gradeclip_ft
from gradeclip_ft.commands.config import (
    PACKAGE,
    VERSION_BASE,
    ConfigurationError,
    check,
    compose,
    conf_dir,
    docstring,
    explain,
    options,
    perform,
    primary_groups,
    suggest,
    wants_traceback,
)
from gradeclip_ft.results.masking import masked_output

PROGRAM = f"python -m {PACKAGE.name}"


def program_help(commands: Mapping[str, Command]) -> str:
    """What the program is and which commands it has."""
    width = max(map(len, commands)) + 2
    lines = [f"usage: {PROGRAM} COMMAND [key=value ...]", "", "commands:"]
    lines += [f"  {name:<{width}}{_first(entry)}" for name, entry in commands.items()]
    lines += [
        "",
        f"{PROGRAM} COMMAND --help            options of a command",
        f"{PROGRAM} list experiments          what +exp=NAME may be",
        f"{PROGRAM} train +exp=smoke name=try four steps, to see that everything works",
    ]
    return "\n".join(lines)


def command_help(entry: Command) -> str:
    """What a command does, and what can be set."""
    text = docstring(entry.module, entry.name)
    if entry.config is None:
        return f"usage: {PROGRAM} {entry.name} ...\n\n{text}"
    return "\n".join(
        [
            f"usage: {PROGRAM} {entry.name} [group=choice ...] [key=value ...]",
            "",
            text.split("\n\nArgs:")[0],
            "",
            "groups, each with its choices:",
            *_groups(entry.config),
            "",
            f"keys (conf/{entry.config}.yaml; a group's own keys: --cfg job):",
            *_keys(entry.config),
            "",
            "flags:",
            "  -m, --multirun      one job for each combination of values: seed=0,1,2",
            "  --cfg job           print the configuration and stop; with --resolve, its values",
            "  --config-dir DIR    look for yaml files in DIR too",
            "  HYDRA_FULL_ERROR=1  as environment variable: errors with their traceback",
        ]
    )


def _first(entry: Command) -> str:
    return docstring(entry.module, entry.name).split("\n")[0].rstrip(".")


def _groups(config: str) -> list[str]:
    chosen = [*primary_groups(config), "exp"]
    width = max(map(len, chosen)) + 3
    return [
        f"  {'+exp' if group == 'exp' else group:<{width}}{', '.join(options(group))}"
        for group in chosen
        if options(group)
    ]


def _keys(config: str) -> list[str]:
    """The primary file from the first key on, as it stands there with its comments."""
    lines = (conf_dir() / f"{config}.yaml").read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("defaults")), -1) + 1
    return [f"  {line}" for line in lines[start:] if not line.startswith((" ", "-", "#", "hydra"))]


POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def call(function: Callable[..., Any], arguments: Sequence[str]) -> Any:
    """Call `function` with arguments as typed on a command line.

    Raises:
        ConfigurationError: If a word or an option is unknown, missing, or cannot be read.
    """
    words = [argument for argument in arguments if not _is_option(argument)]
    given = dict(argument.split("=", 1) for argument in arguments if _is_option(argument))
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(function)
    positional = [p for p in parameters.values() if p.kind in POSITIONAL]
    rest = next((p for p in parameters.values() if p.kind is p.VAR_POSITIONAL), None)
    keywords = {p.name: p for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name in given:
        if name not in keywords:
            raise ConfigurationError(
                f"{name}={given[name]}: no such option; {suggest(name, keywords)}"
            )
    values = []
    for place, parameter in enumerate(positional):
        if place < len(words):
            values.append(read(words[place], hints.get(parameter.name, str), parameter.name))
        elif parameter.default is parameter.empty:
            raise ConfigurationError(f"{parameter.name} is missing; {_expected(function)}")
    extra = words[len(positional) :]
    if extra and rest is None:
        raise ConfigurationError(f"{extra[0]}: one word too many; {_expected(function)}")
    if rest is not None:
        values += [read(word, hints.get(rest.name, str), rest.name) for word in extra]
    for name, parameter in keywords.items():
        if parameter.default is parameter.empty and name not in given:
            raise ConfigurationError(f"{name}=... is missing; {_expected(function)}")
    options = {name: read(text, hints.get(name, str), name) for name, text in given.items()}
    return function(*values, **options)


def usage(function: Callable[..., Any]) -> str:
    """The words and options that a function takes, in one line."""
    hints = get_type_hints(function)
    return " ".join(
        _shown(parameter, hints.get(parameter.name, str))
        for parameter in inspect.signature(function).parameters.values()
    )


def read(text: str, kind: Any, name: str) -> Any:
    """Value of an option: a number, a word, `null`, or a list with commas, as its type asks.

    Raises:
        ConfigurationError: If the text cannot be read as `kind`.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if text in ("null", "none", "") and type(None) in arguments:
            return None
        return _read_any(text, [entry for entry in arguments if entry is not type(None)], name)
    if origin is Literal:
        words = {str(choice): choice for choice in arguments}
        if text not in words:
            raise ConfigurationError(f"{name}: there is no {text}; {suggest(text, words)}")
        return words[text]
    if origin is not None and issubclass(origin, Sequence):
        entries = [entry.strip() for entry in text.strip("[]").split(",") if entry.strip()]
        return origin_list(origin, [read(entry, arguments[0], name) for entry in entries])
    if kind is bool:
        return _read_bool(text, name)
    if kind in (int, float, str, Path):
        try:
            return kind(text)
        except ValueError:
            raise ConfigurationError(f"{name}: got {text!r}, expected {kind.__name__}") from None
    return text


def origin_list(origin: type, entries: list[Any]) -> Any:
    """The list, or a tuple where the annotation asks for one."""
    return tuple(entries) if origin is tuple else entries


def _read_any(text: str, kinds: Sequence[Any], name: str) -> Any:
    """The first reading that works, text last: `int | str` reads "5" as a number."""
    error = ConfigurationError(f"{name}: got {text!r}")
    for kind in sorted(kinds, key=lambda kind: kind in (str, Path)):
        try:
            return read(text, kind, name)
        except ConfigurationError as problem:
            error = problem
    raise error


def _read_bool(text: str, name: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ConfigurationError(f"{name}: got {text!r}, expected true or false")
    return text.lower() == "true"


def _is_option(argument: str) -> bool:
    """Whether it is `key=value`; a path or an address may hold a = too."""
    name, equals, _ = argument.partition("=")
    return bool(equals) and name.isidentifier()


def _expected(function: Callable[..., Any]) -> str:
    return f"expected {usage(function)}"


def _shown(parameter: inspect.Parameter, kind: Any) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"[{parameter.name.upper()} ...]"
    choices = (
        "|".join(str(choice) for choice in get_args(kind)) if get_origin(kind) is Literal else ""
    )
    if parameter.kind is parameter.KEYWORD_ONLY:
        if parameter.default is parameter.empty:
            return f"{parameter.name}={choices or '...'}"
        default = "null" if parameter.default is None else parameter.default
        return f"[{parameter.name}={default}]"
    return choices or parameter.name.upper()


CONFIGURATION_ERROR, INTERRUPTED = 2, 130


@dataclass(frozen=True)
class Several:
    """A group of which a command takes several options, each under its own name: `group=[a,b]`.

    Attributes:
        group: Also the key that holds them.
        default: Option where none is given.
        never: Options that make no sense here, with the reason; `group=all` leaves them out.
    """

    group: str
    default: str
    never: Mapping[str, str]

    def overrides(self, given: Sequence[str]) -> list[str]:
        """The command line with every option as an addition of its own.

        Raises:
            ConfigurationError: An option makes no sense here.
        """
        start = f"{self.group}="
        others = [override for override in given if not override.startswith(start)]
        listed = [override for override in given if override.startswith(start)]
        names = [
            name.strip(" '\"")
            for override in listed or [start + self.default]
            for name in override.removeprefix(start).strip("[]").split(",")
        ]
        if "all" in names:
            known = [name for name in options(self.group) if name not in self.never]
            names = [self.default, *known]
        for name in names:
            if name in self.never:
                raise ConfigurationError(f"{self.group}={name}: {self.never[name]}")
        added = [f"+{self.group}@{self.group}.{name}={name}" for name in dict.fromkeys(names)]
        return [*added, *others]


@dataclass(frozen=True)
class Command:
    """A line of the table of commands.

    Attributes:
        name: Of the module in `gradeclip_ft.commands` and of the function in it.
        config: Primary file, `conf/<config>.yaml`; None for a plain command without Hydra.
        preset: Overrides that stand before the user's.
        several: A group of which it takes several options.
    """

    name: str
    config: str | None
    preset: tuple[str, ...] = ()
    several: Several | None = None

    def overrides(self, given: Sequence[str]) -> list[str]:
        """All overrides of a command line, as Hydra takes them."""
        rest = list(given) if self.several is None else self.several.overrides(given)
        return [*self.preset, *rest]

    @property
    def module(self) -> str:
        """Where the command is; imported only when it runs."""
        return f"{PACKAGE.name}.commands.{self.name}"

    def function(self) -> Callable[..., Any]:
        """The command itself."""
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.name)
        return function

    @masked_output()  # again, because a job of a sweep may run in a process of its own
    def start(self, cfg: DictConfig, overrides: Sequence[str], *, full: bool) -> int:
        """Run in this process, with the command line that would repeat this job alone."""
        sys.argv = [sys.argv[0], self.name, *overrides]
        shown = logging.StreamHandler()
        shown.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logging.basicConfig(handlers=[shown])
        logging.getLogger(PACKAGE.name).setLevel(logging.INFO)
        return perform(lambda: self.function()(cfg), full=full)


@masked_output()
def run(commands: Mapping[str, Command], arguments: Sequence[str]) -> int:
    """Do what the command line says.

    Returns:
        Exit code: 0, 1 for a failure while running, 2 for a command line or a configuration that
        cannot be understood.
    """
    name, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    try:
        if name in ("-h", "--help", "help"):
            print(program_help(commands))
            return 0
        if name == "--version":
            print(gradeclip_ft.__version__)
            return 0
        if name not in commands:
            raise ConfigurationError(f"there is no command {name}; {suggest(name, commands)}")
        return _run(commands[name], rest)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return CONFIGURATION_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(command: Command, arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(command_help(command))
        return 0
    if command.config is None:
        return perform(lambda: call(command.function(), arguments), full=wants_traceback())
    options = _options(command, arguments)
    overrides = [*command.overrides(options.overrides), *_search_path(options.config_dir)]
    if options.multirun:
        return sweep(command, overrides)
    cfg = compose(command.config, overrides)
    if options.cfg is not None or options.info is not None:
        return show(command, overrides, [a for a in arguments if a not in options.overrides])
    check(cfg, command.config)
    return command.start(cfg, overrides, full=wants_traceback())


def _options(command: Command, arguments: list[str]) -> Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-r", "--resolve", action="store_true")
    parser.add_argument("-p", "--package")
    parser.add_argument("-i", "--info", nargs="?", const="all")
    parser.add_argument("-cd", "--config-dir", type=Path)
    return parser.parse_intermixed_args(arguments)


class _Parser(ArgumentParser):
    """Raises where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see --help")


def _search_path(folder: Path | None) -> list[str]:
    """A folder of the user's own yaml files, as an override that other processes repeat."""
    if folder is None:
        return []
    if not folder.is_dir():
        raise ConfigurationError(f"--config-dir {folder} is no folder")
    return [f"hydra.searchpath=[file://{folder.resolve()}]"]


Item = TypeVar("Item")


def tracked(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """The same items, with a progress bar where somebody watches."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(
        items, what, total, console=console, transient=True, disable=not console.is_terminal
    )


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
