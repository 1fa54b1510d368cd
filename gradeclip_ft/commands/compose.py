"""`conf/`: where it is, what stands in it, and its composition with readable errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from gradeclip_ft.commands.names import close_to, suggest
from gradeclip_ft.commands.signatures import PACKAGE, UnknownTargetError, signature

VERSION_BASE = "1.3"


class ConfigurationError(Exception):
    """A command line or yaml that no command understands; its text is all the user needs."""


@cache
def conf_dir() -> Path:
    """The packaged `conf/` of an installed wheel, else the one of the checkout."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if folder.is_dir():
            return folder
    raise ConfigurationError(f"no conf/ in {PACKAGE} or beside it; install the package again")


def compose(command: str, overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Configuration of a command; Hydra's own node is left out unless asked for.

    Raises:
        ConfigurationError: For an unknown group, option or key, naming the likely one.
    """
    try:
        with initialize_config_dir(str(conf_dir()), version_base=VERSION_BASE):
            return hydra_compose(command, list(overrides), return_hydra_config=with_hydra)
    except Exception as error:  # of Hydra, also ValueError for data=1 and OSError for long names
        raise ConfigurationError(explain(error, command, overrides)) from error


def options(group: str) -> list[str]:
    """Names of the yaml files of a group, sorted."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def groups() -> list[str]:
    """Names of all groups, sorted, those inside others too."""
    folders = (path for path in conf_dir().rglob("*") if path.is_dir())
    return sorted(path.relative_to(conf_dir()).as_posix() for path in folders)


def schema(command: str) -> dict[str, Any]:
    """Every key that the yaml files of a command know, whichever options are chosen."""
    primary = _load(conf_dir() / f"{command}.yaml")
    known = {key: value for key, value in primary.items() if key not in ("defaults", "hydra")}
    for group in primary_groups(command):
        known[group.split("@")[-1].lstrip("/")] = _group_keys(group.split("@")[0].lstrip("/"))
    return known


def primary_groups(command: str) -> list[str]:
    """Groups that a command's defaults list chooses from, in its order."""
    found = []
    for entry in _load(conf_dir() / f"{command}.yaml").get("defaults", []):
        if isinstance(entry, Mapping):
            found += [str(group) for group in entry if " " not in str(group)]
        elif entry != "_self_":
            found += primary_groups(entry)
    return found


def explain(error: Exception, command: str, overrides: Sequence[str]) -> str:
    """A few lines about a failed composition: what is wrong, and the likely intention."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if (conf_dir() / group).is_dir():
            return f"{group}={option}: there is no {option}; {suggest(option, options(group))}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: this is no key=value; put special characters in quotes"
    if found := re.search(r"Could not override '([^']+)'", text):
        return _explain_override(found[1], text, command, overrides)
    if found := re.search(r"Multiple values for ([^\s.]+)", text):
        return f"{found[1]} is given twice; write {found[1]}=... once, and without +"
    lines = [line for line in text.split("\n") if line.strip() and "hydra.cc" not in line]
    return "\n".join(lines[:4])


def _explain_override(key: str, text: str, command: str, overrides: Sequence[str]) -> str:
    group = key.split("@")[0]
    value = next((item.partition("=")[2] for item in overrides if _key(item) == key), "...")
    if found := re.search(r"Did you mean to override (\S+)\?", text):
        return f"{key}={value}: write {found[1]}={value}"
    if group in groups():
        return f"{key}={value}: nothing chooses {group} yet; write +{key}={value}"
    written, unwritten = _known_keys(command, overrides)
    if key in unwritten:  # an argument with a default in Python, which yaml does not repeat
        return f"{key}={value}: conf/ leaves this at its default; write +{key}={value}"
    known = [*written, *unwritten]
    meant = [*_same_place(key, known), *_same_name(key, known)]
    if meant:
        plus = "+" if meant[0] in unwritten else ""
        return f"{key}={value}: there is no key {key}; did you mean {plus}{meant[0]}?"
    start = key.rpartition(".")[0]
    return f"{key}={value}: there is no key {key}; {suggest(key, _children(start, known))}"


def _known_keys(command: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Dotted keys of the configuration with the groups that were asked for, if they compose.

    Returns:
        The keys that stand in yaml, and the arguments of their targets that do not.
    """
    chosen = [item for item in overrides if _key(item).split("@")[0] in groups()]
    for attempt in (chosen, []):
        try:
            with initialize_config_dir(str(conf_dir()), version_base=VERSION_BASE):
                cfg = hydra_compose(command, overrides=attempt)
        except Exception:  # the caller says what is wrong
            continue
        plain = OmegaConf.to_container(cfg, resolve=False)
        assert isinstance(plain, dict)
        return list(_dotted(plain)), list(_defaults(plain))
    return [], []


def _dotted(node: Mapping[Any, Any], start: str = "") -> Iterator[str]:
    for key, value in node.items():
        name = f"{start}.{key}" if start else str(key)
        if not str(key).startswith("_"):
            yield name
            if isinstance(value, Mapping):
                yield from _dotted(value, name)


def _defaults(node: Mapping[Any, Any], start: str = "") -> Iterator[str]:
    """Optional arguments of all targets below a node that yaml leaves alone."""
    if "_target_" in node:
        with suppress(UnknownTargetError):
            for name, parameter in signature(str(node["_target_"])).parameters.items():
                if name not in node and not parameter.required:
                    yield f"{start}.{name}"
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _defaults(value, f"{start}.{key}" if start else str(key))


def _same_place(key: str, known: Sequence[str]) -> list[str]:
    """Known keys that spell the first wrong part of `key` in another way."""
    parts = key.split(".")
    for end in range(1, len(parts) + 1):
        place, rest = ".".join(parts[:end]), parts[end:]
        if place not in known:
            above = ".".join(parts[: end - 1])
            siblings = {name.rpartition(".")[2]: name for name in _children(above, known)}
            close = [siblings[name] for name in close_to(parts[end - 1], siblings)]
            return [found for name in close if (found := ".".join([name, *rest])) in known]
    return []


def _same_name(key: str, known: Sequence[str]) -> list[str]:
    """Known keys of another place with this last part, or nearly."""
    by_name: dict[str, str] = {}
    for place in known:
        by_name.setdefault(place.rpartition(".")[2], place)
    return [by_name[name] for name in close_to(key.rpartition(".")[2], by_name)]


def _children(start: str, known: Sequence[str]) -> list[str]:
    return [name for name in known if name.rpartition(".")[0] == start]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _group_keys(group: str) -> dict[str, Any]:
    """Top-level keys of all options of a group, except of those that write elsewhere."""
    known: dict[str, Any] = {}
    for option in options(group):
        path = conf_dir() / group / f"{option}.yaml"
        if not path.read_text(encoding="utf-8").startswith("# @package _global_"):
            known |= _load(path)
    known.pop("defaults", None)
    return known


@cache
def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
