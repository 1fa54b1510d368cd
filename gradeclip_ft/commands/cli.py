"""From the command line to a command: help, composition, readable errors.

The command is taken off before Hydra sees the rest. Inside a command, `sys.argv` is the command and
the overrides of this job alone, because distributed training starts its other processes from it.
"""

from __future__ import annotations

import importlib
import logging
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig

import gradeclip_ft
from gradeclip_ft.commands import pages
from gradeclip_ft.commands.check import check
from gradeclip_ft.commands.compose import ConfigurationError, compose, options
from gradeclip_ft.commands.failures import perform, wants_traceback
from gradeclip_ft.commands.names import suggest
from gradeclip_ft.commands.plain import call
from gradeclip_ft.commands.signatures import PACKAGE
from gradeclip_ft.results.secrets import masked

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

    def start(self, cfg: DictConfig, overrides: Sequence[str], *, full: bool) -> int:
        """Run in this process, with the command line that would repeat this job alone."""
        sys.argv = [sys.argv[0], self.name, *overrides]
        shown = logging.StreamHandler()
        shown.setFormatter(_Masking("%(levelname)s: %(message)s"))
        logging.basicConfig(handlers=[shown])
        logging.getLogger(PACKAGE.name).setLevel(logging.INFO)
        return perform(lambda: self.function()(cfg), full=full)


def run(commands: Mapping[str, Command], arguments: Sequence[str]) -> int:
    """Do what the command line says.

    Returns:
        Exit code: 0, 1 for a failure while running, 2 for a command line or a configuration that
        cannot be understood.
    """
    name, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    try:
        if name in ("-h", "--help", "help"):
            print(pages.program(commands))
            return 0
        if name == "--version":
            print(gradeclip_ft.__version__)
            return 0
        if name not in commands:
            raise ConfigurationError(f"there is no command {name}; {suggest(name, commands)}")
        return _run(commands[name], rest)
    except ConfigurationError as error:
        print(f"error: {masked(str(error))}", file=sys.stderr)
        return CONFIGURATION_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(command: Command, arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(pages.command(command))
        return 0
    if command.config is None:
        return perform(lambda: call(command.function(), arguments), full=wants_traceback())
    options = _options(command, arguments)
    overrides = [*command.overrides(options.overrides), *_search_path(options.config_dir)]
    if options.multirun:
        from gradeclip_ft.commands.sweep import sweep

        return sweep(command, overrides)
    cfg = compose(command.config, overrides)
    if options.cfg is not None or options.info is not None:
        from gradeclip_ft.commands.sweep import show

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


class _Masking(logging.Formatter):
    """Log lines, of whatever library, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


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
