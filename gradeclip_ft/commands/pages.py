"""The pages behind `--help`, from docstrings and yaml read as text: nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gradeclip_ft.commands.compose import conf_dir, options, primary_groups
from gradeclip_ft.commands.signatures import PACKAGE, docstring

if TYPE_CHECKING:
    from gradeclip_ft.commands.cli import Command

PROGRAM = f"python -m {PACKAGE.name}"


def program(commands: Mapping[str, Command]) -> str:
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


def command(entry: Command) -> str:
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
