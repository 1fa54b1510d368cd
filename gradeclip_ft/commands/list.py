"""`list`: what there is to choose from, read from `conf/` alone."""

from __future__ import annotations

import builtins
import textwrap
from pathlib import Path

from gradeclip_ft.commands.config import ConfigurationError, conf_dir, groups, options, suggest

# What the groups are called here, where it is not the folder's name with an s.
CALLED = {
    "exp": "experiments",
    "data": "data",
    "debug": "debug",
    "methods": "methods",
    "optim": "optim",
    "exp/maps": "exp/maps",
    "exp/photos": "exp/photos",
}
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
    """First paragraph of a yaml file's comment, without Hydra's header; its command on its own."""
    lines: builtins.list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @"):
            continue
        if not line.startswith("# "):
            break
        text = line.removeprefix("# ").strip()
        if lines and not lines[-1].startswith("python -m"):
            lines[-1] += f" {text}"
        else:
            lines.append(text)
    return "\n".join(lines)


def _entry(name: str, text: str, width: int) -> str:
    """The name in a column, the comment beside it."""
    lines = [
        piece
        for line in text.split("\n")
        for piece in textwrap.wrap(line, WIDTH - width, break_on_hyphens=False)
    ] or [""]
    return f"{name:<{width}}" + f"\n{'':{width}}".join(lines)
