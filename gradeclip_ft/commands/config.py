"""`conf/`: composition with readable errors, the check of what it builds, and its record."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import gradeclip_ft
from gradeclip_ft.commands import plugins
from gradeclip_ft.results.masking import masked, masked_values

PACKAGE = Path(gradeclip_ft.__file__).parent
VERSION_BASE = "1.3"  # of Hydra
# Beside the yaml: what may be built, under which keys, from which arguments (tools/write_targets).
TARGETS = "targets.json"
# Keys that hold nodes of a group with another name.
KINDS = {
    "explainers": "explainer",
    "words": "explainer",
    "terms": "term",
    "segmenters": "segmenter",
}
NODE_KEYS = ("_target_", "_partial_")

Node = Mapping[str, Any]


class ConfigurationError(Exception):
    """A command line or yaml that no command understands; its text is all the user needs."""


@cache
def conf_dir() -> Path:
    """The packaged `conf/` of an installed wheel, else the one of the checkout."""
    for folder in (PACKAGE / "conf", PACKAGE.parent / "conf"):
        if folder.is_dir():
            return folder
    raise ConfigurationError(f"no conf/ in {PACKAGE} or beside it; install the package again")


config_dirs: list[Path] = []
"""Folders of `--config-dir`, in which every command looks too."""


def conf_dirs() -> list[Path]:
    """`conf/`, those of installed plug-ins and of the command line; the first that has a file."""
    return [conf_dir(), *plugins.folders(), *config_dirs]


def option_path(group: str, option: str) -> Path:
    """The yaml file of an option."""
    files = [folder / group / f"{option}.yaml" for folder in conf_dirs()]
    return next((file for file in files if file.is_file()), files[0])


def options(group: str) -> list[str]:
    """Names of the yaml files of a group, sorted."""
    return sorted({path.stem for one in conf_dirs() for path in (one / group).glob("*.yaml")})


def groups() -> list[str]:
    """Names of all groups, sorted, those inside others too."""
    return sorted(
        {
            path.relative_to(folder).as_posix()
            for folder in conf_dirs()
            for path in folder.rglob("*")
            if path.is_dir()
        }
    )


def search_path() -> list[str]:
    """The override by which Hydra looks in all of them, where there are several."""
    others = ",".join(f"file://{folder.resolve()}" for folder in conf_dirs()[1:])
    return [f"hydra.searchpath=[{others}]"] if others else []


@cache
def primary(command: str) -> dict[str, Any]:
    """`conf/<command>.yaml` as written."""
    content = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{command}.yaml"))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def primary_groups(command: str) -> dict[str, Any]:
    """Groups that a command's defaults list chooses from, with its choices, in its order."""
    entries = [entry for entry in primary(command)["defaults"] if isinstance(entry, Mapping)]
    pairs = [(str(group), option) for entry in entries for group, option in entry.items()]
    return {group: option for group, option in pairs if " " not in group}


@cache
def targets() -> dict[str, dict[str, Any]]:
    """What yaml may build: `under` which keys, and its `arguments` with their types."""
    return dict(json.loads((conf_dir() / TARGETS).read_text(encoding="utf-8")))


def kind_of(key: str) -> str:
    """The last part of a dotted key, or the group whose nodes it holds."""
    name = key.rpartition(".")[2]
    return KINDS.get(name, name)


def suggest(name: str, names: Iterable[str]) -> str:
    """The closest name, or one that it abbreviates, as a question; else what to choose from."""
    listed = list(dict.fromkeys(names))
    begun = [known for known in listed if name and known.startswith(name)]
    for close in (get_close_matches(name, listed, n=1) or begun)[:1]:
        return f"did you mean {close}?"
    if not listed:
        return "there is nothing to choose from"
    return f"choose from {', '.join(listed[:12])}{', ...' if len(listed) > 12 else ''}"


def compose(
    command: str, overrides: Sequence[str], *, with_hydra: bool = False, suffix: str = ""
) -> DictConfig:
    """Configuration of a command; `suffix` is what the job of a sweep adds to the name of its run.

    Raises:
        ConfigurationError: For an unknown group, option or key, naming the closest one.
    """
    try:
        cfg = _composed(command, overrides)
    except Exception as error:  # of Hydra, also ValueError for data=1 and OSError for long names
        raise ConfigurationError(describe(error, command, overrides)) from error
    if "name" in cfg and cfg.name is None:
        cfg.name = run_name(cfg.hydra.runtime.choices, suffix)
    if not with_hydra:
        with open_dict(cfg):
            del cfg["hydra"]
    return cfg


def _composed(command: str, overrides: Sequence[str]) -> DictConfig:
    outer = GlobalHydra.instance().hydra  # of a program that is composed by Hydra and calls us
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base=VERSION_BASE):
            return hydra_compose(command, list(overrides), return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer


def run_name(choices: Node, suffix: str = "") -> str:
    """What a run without name= is called: as its experiment, `maps/uniform` as `maps_uniform`."""
    chosen = [
        "_".join([*group.split("/")[1:], *([option] if isinstance(option, str) else option)])
        for group, option in choices.items()
        if group.split("/")[0] == "exp" and option
    ]
    return ("_".join(chosen) or "run") + suffix


def describe(error: Exception, command: str, overrides: Sequence[str]) -> str:
    """A few lines about a failed composition: what is wrong, and the likely intention."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group in groups():
            return f"{group}={option}: there is no {option}; {suggest(option, options(group))}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not a key=value that Hydra can read{_requoted(error.override)}"
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        key = found[1].partition("=")[0]
        return (
            f"{found[1]}: a value with commas{_requoted(found[1])} for one text, {key}=[...] for a "
            "list, or add --multirun for a job each"
        )
    if found := re.search(r"Could not override '([^']+)'", text):
        inner = str(getattr(error.__cause__, "full_key", ""))  # the wrong key of data={...}
        key = inner if inner.startswith(f"{found[1]}.") else found[1]
        return _describe_override(key, text, command, overrides)
    if found := re.search(r"Multiple values for ([^\s.]+)", text):
        return f"{found[1]} is given twice; write {found[1]}=... once, and without +"
    lines = [line for line in text.split("\n") if line.strip() and "hydra.cc" not in line]
    return "\n".join(lines[:4])


def _requoted(override: str | None) -> str:
    """What to write in the shell, where the shell took away the quotes that Hydra wants."""
    key, equals, value = str(override).partition("=")
    if not key or not equals:
        return ""
    if value.startswith("[") and not value.endswith("]"):
        return f"; the shell cut the list at a blank: write {shlex.quote(f'{key}=[...]')}"

    def quoted(text: str) -> str:
        if re.fullmatch(r"[\w./-]+", text):
            return text
        return '"' + text.replace('"', '\\"') + '"'

    plain = [text.strip().strip("'\"") for text in value.strip("[]").split(",")]
    listed = value.startswith("[")
    meant = plain if listed else value.strip().strip("'\"")
    line = f"{key}=[{','.join(map(quoted, plain))}]" if listed else f"{key}={quoted(str(meant))}"
    try:
        read = OverridesParser.create().parse_override(line).value()
    except HydraException:
        return ""
    return f"; in the shell write {shlex.quote(line)}" if read == meant else ""


def _describe_override(key: str, text: str, command: str, overrides: Sequence[str]) -> str:
    given = next((item for item in overrides if _key(item) == key), key)
    value = given.partition("=")[2] or "..."
    if found := re.search(r"Did you mean to override (\S+)\?", text):
        return f"{given}: write {found[1]}={value}"
    if key.split("@")[0] in groups():
        return f"{given}: nothing chooses {key} yet; write +{key}={value}"
    known = _known_keys(command, overrides)
    if known.get(key) is False:  # an argument with a default in Python, which yaml does not repeat
        return f"{given}: conf/ leaves this at its default; write +{key}={value}"

    def likeness(name: str) -> tuple[float, float]:
        """Of the last parts or of the whole keys: a place or a name may be misspelt."""
        last, known_last = key.rpartition(".")[2], name.rpartition(".")[2]
        whole = SequenceMatcher(None, key, name).ratio()
        return max(whole, SequenceMatcher(None, last, known_last).ratio()), whole

    best = max(known, key=likeness, default="")
    if likeness(best)[0] < 0.6:
        return f"{given}: there is no key {key}; {command} --cfg job shows all keys"
    plus = "" if known[best] else "+"
    return f"{given}: there is no key {key}; did you mean {plus}{best}?"


def _known_keys(command: str, overrides: Sequence[str]) -> dict[str, bool]:
    """Dotted keys with the groups that were asked for; False for arguments that yaml leaves out."""
    chosen = [item for item in overrides if _key(item).split("@")[0] in groups()]
    for attempt in (chosen, []):
        try:
            cfg = _composed(command, attempt)
        except Exception:  # the caller says what is wrong
            continue
        plain = OmegaConf.to_container(cfg, resolve=False)
        assert isinstance(plain, dict)
        return dict(_dotted({key: value for key, value in plain.items() if key != "hydra"}))
    return {}


def _dotted(node: Mapping[Any, Any], start: str = "") -> Iterator[tuple[str, bool]]:
    arguments = targets().get(str(node.get("_target_")), {"arguments": {}})["arguments"]
    yield from ((start + name, False) for name, fact in arguments.items() if "required" not in fact)
    for key, value in node.items():
        if key not in NODE_KEYS:
            yield f"{start}{key}", True
            if isinstance(value, dict):
                yield from _dotted(value, f"{start}{key}.")


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def check(cfg: DictConfig, command: str) -> None:
    """Refuse a configuration that the code would not understand.

    Raises:
        ConfigurationError: Naming every key that is unknown, open, or of a wrong value.
    """
    try:
        plugins.open_plugins(cfg.get("plugins") or [])
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    known = {k: v for k, v in primary(command).items() if k not in ("defaults", "hydra")}
    chosen = primary_groups(command)
    plain = _plain(cfg)
    needed = [*known, *(group for group, option in chosen.items() if isinstance(option, str))]
    known |= {group.split("@")[-1].split(".")[0]: {} for group in chosen}
    found = sorted(f"{key}: has no value; add {key}=..." for key in OmegaConf.missing_keys(cfg))
    absent = [key for key in needed if "@" not in key and key not in plain]
    found += [f"{key}: is missing; leave out ~{key}" for key in absent]
    refuse(found or list(_problems(plain, known)))


def check_node(node: Any, key: str, *, given: Iterable[str] = ()) -> dict[str, Any]:
    """A resolved node that may be built under `key`, whoever wrote it; `given` comes while running.

    Raises:
        ConfigurationError: A target does not belong there, or an argument does not fit.
    """
    plain = _plain(node)
    refuse(list(_target_problems(plain, key, given)))
    return plain


def refuse(found: Sequence[str]) -> None:
    """Raise if there are problems, the first few of them shown."""
    if found:
        more = [f"... and {len(found) - 6} more"] if len(found) > 6 else []
        raise ConfigurationError("\n".join([*found[:6], *more]))


def _problems(node: Node, known: Node, key: str = "") -> Iterator[str]:
    """What is wrong below a mapping; `known` holds the keys that it may have."""
    for name, value in node.items():
        inner = f"{key}{name}"
        if name not in known:
            yield f"{inner}: there is no such key; {suggest(name, known)}"
        elif isinstance(value, Mapping) and "_target_" in value:
            yield from _target_problems(value, inner)
        elif isinstance(value, Mapping) and not isinstance(known[name], Mapping):
            yield f"{inner}: got keys ({', '.join(value)}), expected a value"
        elif isinstance(value, Mapping) and known[name]:
            yield from _problems(value, known[name], f"{inner}.")
        elif isinstance(value, Mapping):  # several of a group, such as evaluators, by name
            for entry in value:
                yield from _target_problems(value[entry], f"{inner}.{entry}", kind=kind_of(name))
        elif isinstance(known[name], Mapping):
            yield f"{inner}: got {value!r}, expected keys below it; {suggest(name, known[name])}"
        elif isinstance(known[name], int | float) and not fits(value, type(known[name]).__name__):
            yield f"{inner}: got {value!r}, expected {type(known[name]).__name__}"


def _target_problems(
    node: Any, key: str, given: Iterable[str] = (), kind: str | None = None
) -> Iterator[str]:
    """What is wrong with a node that names what it builds."""
    kind = kind or kind_of(key)
    here = [target for target, entry in targets().items() if kind in entry["under"]]
    target = str(node.get("_target_")) if isinstance(node, Mapping) else None
    try:
        entry = targets()[target] if target in here else plugins.facts(str(target), kind)
    except ValueError as error:
        yield f"{key}._target_: {error}"
        return
    if entry is None:
        wrong = key if target is None else f"{key}._target_"
        module = str(target).rpartition(".")[0]
        remedy = suggest(str(target), here) if here else "conf/ builds nothing under this key"
        if kind in plugins.NEEDED and module and module.partition(".")[0] != "gradeclip_ft":
            remedy = f"if you wrote or trust that module, name it: plugins=[{module}]"
        yield f"{wrong}: {node if target is None else target} is not built here; {remedy}"
        return
    assert target is not None
    arguments, short = entry["arguments"], target.rpartition(".")[2]
    partial = entry["partial"]  # else it would be called here and now
    if partial is not None and bool(node.get("_partial_", False)) != partial:
        yield f"{key}._partial_: {short} needs {str(partial).lower()}"
    for name, value in node.items():
        if name not in NODE_KEYS and name not in arguments:
            yield f"{key}.{name}: {short} takes no {name}; {suggest(name, arguments)}"
        elif name not in NODE_KEYS:
            yield from _value_problems(value, arguments[name]["type"], f"{key}.{name}")
    for name, fact in arguments.items():
        missing = fact.get("required") and name not in node and name not in given
        if missing and not node.get("_partial_"):
            yield f"{key}.{name}: {short} needs it; add +{key}.{name}=..."


def _value_problems(value: Any, kind: Any, key: str) -> Iterator[str]:
    if fits(value, kind):
        for inner, nested in _nested(value, key):
            yield from _target_problems(nested, inner, kind=kind_of(key))
        return
    words = _expected(kind)
    if isinstance(value, Mapping) and "_target_" not in value and "object" in words:
        yield (
            f"{key}: its keys ({', '.join(value)}) belong to a choice that was replaced on the "
            f"command line; leave them out with '~{key}'"
        )
        return
    close = suggest(str(value), words) if isinstance(value, str) else ""
    hint = f"; {close}" if close.startswith("did") else ""
    yield f"{key}: got {value!r}, expected {' or '.join(words)}{hint}"


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value may be passed where a type of `targets.json` is expected."""
    if isinstance(kind, list):
        return any(fits(value, alternative) for alternative in kind)
    if "choices" in kind and isinstance(kind, Mapping):
        return any(type(value) is type(choice) and value == choice for choice in kind["choices"])
    if isinstance(kind, Mapping):
        outer, inner = next(iter(kind.items()))
        if outer == "list":
            return isinstance(value, list) and all(fits(entry, inner) for entry in value)
        entries = value.values() if isinstance(value, Mapping) and "_target_" not in value else None
        return entries is not None and all(fits(entry, inner) for entry in entries)
    if kind == "object":
        return isinstance(value, Mapping) and "_target_" in value
    if kind == "any":
        return not list(_nested(value, ""))
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return value is None if kind == "null" else type(value).__name__ == kind


def _expected(kind: Any) -> list[str]:
    """A type in words: names of types, and every choice."""
    if isinstance(kind, list):
        return [word for alternative in kind for word in _expected(alternative)]
    if isinstance(kind, Mapping):
        outer, inner = next(iter(kind.items()))
        return list(map(str, inner)) if outer == "choices" else [outer]
    return [kind]


def _nested(value: Any, key: str) -> Iterator[tuple[str, Node]]:
    """Nodes somewhere inside a value that name what they build, each with its key."""
    if isinstance(value, Mapping) and "_target_" in value:
        yield key, value
    elif isinstance(value, Mapping | list):
        named = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, entry in named:
            yield from _nested(entry, f"{key}.{name}")


def recorded(cfg: DictConfig | Node) -> dict[str, Any]:
    """Plain containers in which `${oc.env:NAME}` is left as written, and secrets are ***.

    Read back, such a variable is looked up again, in the environment of then.
    """
    config = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))

    def mark(text: str) -> str:  # a word to OmegaConf, also inside of another interpolation
        return re.sub(r"\$\{oc\.env:([^{}]*)\}", lambda m: f"@oc.env@{m[1].encode().hex()}@", text)

    def unmark(text: str) -> str:
        found = re.compile("@oc.env@([0-9a-f]*)@")
        return found.sub(lambda m: f"${{oc.env:{bytes.fromhex(m[1]).decode()}}}", text)

    marked = _map_strings(OmegaConf.to_container(config, resolve=False), mark)
    return dict(_map_strings(masked_values(_plain(OmegaConf.create(marked))), unmark))


def as_written(cfg: DictConfig) -> Callable[[Any], Any]:
    """What a result may hold: options with `${oc.env:NAME}` as they were given, and no secrets."""
    given = dict(_differing(_plain(cfg), recorded(cfg)))

    def written(text: str) -> str:
        for value in sorted(given, key=len, reverse=True):
            if text == value or len(value) >= 8:  # a shorter one may be part of any word
                text = text.replace(value, given[value])
        return masked(text)

    return lambda plain: _map_strings(plain, written)


def _differing(plain: Any, written: Any) -> Iterator[tuple[str, str]]:
    """Texts of a resolved configuration beside those of its record, where they differ."""
    if isinstance(plain, dict | list) and type(written) is type(plain):  # else all of it is ***
        for key in plain if isinstance(plain, dict) else range(len(plain)):
            yield from _differing(plain[key], written[key])
    elif isinstance(plain, str) and plain != written:
        yield plain, str(written)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {str(key): _map_strings(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(entry, change) for entry in value]
    return change(value) if isinstance(value, str) else value


def _plain(cfg: Any) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    except OmegaConfBaseException as error:
        text = str(error).split("\n")[0]
        raise ConfigurationError(f"{error.full_key}: {text}" if error.full_key else text) from error
    if not isinstance(plain, dict):
        raise ConfigurationError(f"got {plain!r}, expected keys and values")
    return dict(_map_strings(plain, str))  # keys may be numbers in yaml


def perform(command: Callable[[], Any], *, full: bool) -> int:
    """Run a command and report its error, with `full` always by its traceback.

    Returns:
        Exit code: 1 after an error, else what the command returns if that is a number.
    """
    try:
        result = command()
    except (ConfigurationError, BrokenPipeError):
        raise
    except Exception as error:
        if full or not is_meant(error):
            traceback.print_exception(error)
        elif isinstance(error, OSError) and error.filename is not None:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        else:
            print(f"error: {error}", file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0


def is_meant(error: Exception) -> bool:
    """Whether an error's text is all that a user needs: ours, or about a path, by the system."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or isinstance(error, AssertionError):
        return False
    last = frames[-1]
    return Path(last.filename).is_relative_to(PACKAGE) and (last.line or "").startswith("raise ")


def wants_traceback() -> bool:
    """Whether Hydra's own switch for complete tracebacks is on."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"
