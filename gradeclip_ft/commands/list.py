"""`list`: what there is to choose from, read from `conf/` alone."""

from __future__ import annotations

import textwrap
from pathlib import Path

from gradeclip_ft.commands.config import ConfigurationError, groups, option_path, options, suggest

# Groups whose list is called as their folder, without an s.
UNCOUNTED = ("data", "debug", "methods", "optim", "exp/lab", "exp/maps", "exp/photos")


def list_options(what: str = "groups") -> None:
    """List what there is to choose from: experiments, explainers, evaluators, models, data, ...

    Each line is the name of a yaml file in conf/ and the first comment in it. `list groups` names
    everything that can be listed.
    """
    names = {g if g in UNCOUNTED else f"{g}s": g for g in groups() if options(g)}
    names["experiments"] = names.pop("exps")
    if what == "groups":
        for name in sorted(names):
            print(f"{name:<14}{', '.join(options(names[name]))}")
        return
    group = names.get(what, what)
    if group not in names.values():
        raise ConfigurationError(f"list {what}: there is no such list; {suggest(what, names)}")
    width = max(map(len, options(group))) + 2
    for option in options(group):
        text = summary(option_path(group, option))
        lines = [
            piece
            for line in text.split("\n")
            for piece in textwrap.wrap(line, 100 - width, break_on_hyphens=False)
        ]
        print(f"{option:<{width}}" + f"\n{'':{width}}".join(lines))


def summary(path: Path) -> str:
    """First paragraph of a yaml file's comment, without Hydra's header; its command on its own."""
    lines: list[str] = []
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
