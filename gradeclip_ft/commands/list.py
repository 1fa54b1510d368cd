"""`list`: what there is to choose from, read from `conf/` alone."""

from __future__ import annotations

import textwrap
from pathlib import Path

from gradeclip_ft.commands.compose import ConfigurationError, conf_dir, groups, options
from gradeclip_ft.commands.names import suggest

# What the groups are called here, where it is not the folder's name with an s.
CALLED = {"exp": "experiments", "data": "data", "debug": "debug", "optim": "optim"}
WIDTH = 100


def list(what: str = "groups") -> None:
    """List what there is to choose from: experiments, explainers, evaluators, models, data, ...

    Each line is the name of a yaml file in conf/ and the first comment in it. `list groups` names
    everything that can be listed.
    """
    names = {CALLED.get(group, f"{group}s"): group for group in groups() if options(group)}
    if what == "groups":
        print("\n".join(f"{name:<14}{', '.join(options(names[name]))}" for name in names))
        return
    group = names.get(what) or next((g for g in names.values() if what == g), None)
    if group is None:
        raise ConfigurationError(f"list {what}: there is no such list; {suggest(what, names)}")
    width = max(map(len, options(group))) + 2
    for option in options(group):
        print(_entry(option, summary(conf_dir() / group / f"{option}.yaml"), width))


def summary(path: Path) -> str:
    """First comment of a yaml file, without Hydra's header: all its lines up to the first key."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @"):
            continue
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return "\n".join(lines)


def _entry(name: str, text: str, width: int) -> str:
    """The name in a column, the comment beside it."""
    lines = [
        piece
        for line in text.split("\n")
        for piece in textwrap.wrap(line, WIDTH - width, break_on_hyphens=False)
    ] or [""]
    return f"{name:<{width}}" + f"\n{'':{width}}".join(lines)
