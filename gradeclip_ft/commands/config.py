"""`conf/`: where it is, what stands in it, and its composition with readable errors."""

from __future__ import annotations

import ast
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

import gradeclip_ft
from gradeclip_ft.results.masking import masked_values

PACKAGE = Path(gradeclip_ft.__file__).parent


@dataclass(frozen=True)
class Parameter:
    """One argument: its annotation as written, and whether it may be left out."""

    name: str
    annotation: ast.expr | None
    required: bool


@dataclass(frozen=True)
class Signature:
    """Arguments of a target.

    Attributes:
        module: Dotted name of the module whose names the annotations use.
        parameters: By name, in order.
        takes_any: Whether there is a `**keywords` argument.
    """

    module: str
    parameters: dict[str, Parameter]
    takes_any: bool


# Commands, records and pages write files: nothing in them is built from yaml.
CLOSED = ("commands", "results", "report")


class UnknownTargetError(LookupError):
    """A `_target_` that names nothing in this package."""


@cache
def signature(target: str) -> Signature:
    """Signature behind a dotted path such as `gradeclip_ft.explain.grad_eclip.GradEclip`.

    Raises:
        UnknownTargetError: If the path is not in this package, or names no class or function.
    """
    module, names = _split(target)
    if module.split(".")[1] in CLOSED or any(name.startswith("_") for name in names):
        raise UnknownTargetError(f"{target} is not built from yaml; `list` shows what is")
    owner, node = definition(module, names[0])
    for name in names[1:]:
        node = next((child for child in getattr(node, "body", []) if _name(child) == name), None)
    if isinstance(node, ast.ClassDef):
        return _of_class(owner, node)
    if isinstance(node, ast.FunctionDef):
        return _of_function(owner, node, bound=len(names) > 1 and not _is_static(node))
    raise UnknownTargetError(f"{target} is no class or function; {module} has {_public(module)}")


def definition(module: str, name: str) -> tuple[str, ast.stmt | None]:
    """Where a module's global name is defined: (module, statement), through our own imports."""
    for statement in _globals(module):
        if isinstance(statement, ast.ImportFrom) and _inside(statement.module):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return definition(str(statement.module), alias.name)
        elif _name(statement) == name:
            return module, statement
    return module, None


def docstring(module: str, name: str) -> str:
    """Docstring of a function of a module, without importing it."""
    _, node = definition(module, name)
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return ast.get_docstring(node) or ""
    return ""


def _split(target: str) -> tuple[str, list[str]]:
    """The longest prefix that is a module file, and the names behind it."""
    parts = target.split(".")
    if parts[0] != PACKAGE.name:
        raise UnknownTargetError(f"{target} is not in {PACKAGE.name}, where every _target_ lives")
    for end in range(len(parts) - 1, 1, -1):
        if _file(".".join(parts[:end])).is_file():
            return ".".join(parts[:end]), parts[end:]
    raise UnknownTargetError(f"{target}: there is no such module in {PACKAGE.name}")


def _file(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _inside(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == PACKAGE.name and _file(module).is_file()


@cache
def _parse(module: str) -> ast.Module:
    return ast.parse(_file(module).read_text(encoding="utf-8"))


def _globals(module: str) -> Iterator[ast.stmt]:
    """Statements at module level, also those under `if TYPE_CHECKING:`."""
    for statement in _parse(module).body:
        if isinstance(statement, ast.If):
            yield from statement.body
        else:
            yield statement


def _name(statement: ast.AST) -> str | None:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return statement.name
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id
    return None


def _public(module: str) -> str:
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [node.name for node in _globals(module) if isinstance(node, kinds)]
    return ", ".join(name for name in names if not name.startswith("_")) or "none"


def _of_function(module: str, node: ast.FunctionDef, *, bound: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    optional = len(positional) - len(arguments.defaults)
    entries = [
        Parameter(argument.arg, argument.annotation, required=place < optional)
        for place, argument in enumerate(positional)
    ][bound:]
    entries += [
        Parameter(argument.arg, argument.annotation, required=default is None)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return Signature(module, {entry.name: entry for entry in entries}, arguments.kwarg is not None)


def _of_class(module: str, node: ast.ClassDef) -> Signature:
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            return _of_function(module, child, bound=True)
    inherited: dict[str, Parameter] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            owner, found = definition(module, base.id)
            if isinstance(found, ast.ClassDef):
                inherited |= _of_class(owner, found).parameters
    if not _is_dataclass(node):
        return Signature(module, inherited, takes_any=False)
    fields = {field.name: field for field in _fields(node)}
    return Signature(module, inherited | fields, takes_any=False)


def _fields(node: ast.ClassDef) -> Iterator[Parameter]:
    for child in node.body:
        if not isinstance(child, ast.AnnAssign) or not isinstance(child.target, ast.Name):
            continue
        options = _field_options(child.value)
        if "ClassVar" in ast.unparse(child.annotation) or _is_false(options.get("init")):
            continue
        settled = child.value is not None and (
            not _is_field(child.value) or bool({"default", "default_factory"} & set(options))
        )
        yield Parameter(child.target.id, child.annotation, required=not settled)


def _field_options(value: ast.expr | None) -> dict[str | None, ast.expr]:
    if isinstance(value, ast.Call) and _is_field(value):
        return {keyword.arg: keyword.value for keyword in value.keywords}
    return {}


def _is_field(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")


def _is_false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_static(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)


LISTED = 12
LIKE = 0.6  # difflib's usual bound for "similar"
TIE = 0.1


def close_to(name: str, names: Iterable[str]) -> list[str]:
    """The name most like `name`, and a second one if it is nearly as like; else abbreviations."""
    listed = list(dict.fromkeys(names))
    likeness = {known: SequenceMatcher(None, name, known).ratio() for known in listed}
    ranked = sorted(listed, key=lambda known: -likeness[known])[:2]
    best = likeness[ranked[0]] if ranked else 0.0
    if best >= LIKE:
        return [known for known in ranked if likeness[known] >= max(LIKE, best - TIE)]
    return [known for known in listed if name and known.startswith(name)][:2]


def suggest(name: str, names: Iterable[str]) -> str:
    """Close names as a question, or else all there is to choose from."""
    listed = list(dict.fromkeys(names))
    close = close_to(name, listed)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if not listed:
        return "there is nothing to choose from"
    shown = ", ".join(listed[:LISTED])
    return f"choose from {shown}{', ...' if len(listed) > LISTED else ''}"


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


Fits = Callable[[Any], bool]

PLAIN: dict[str, Fits] = {
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "Path": lambda value: isinstance(value, str),
    "None": lambda value: value is None,
}
SEQUENCES = {"list", "tuple", "set", "frozenset", "Sequence", "Iterable", "Collection", "List"}
MAPPINGS = {"dict", "Mapping", "MutableMapping", "Dict"}


def fits(value: Any, annotation: ast.expr | None, module: str) -> bool:
    """Whether `value` may be passed where `annotation`, written in `module`, stands."""
    if annotation is None or (isinstance(value, Mapping) and "_target_" in value):
        return True
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str() as text):
            return fits(value, ast.parse(text, mode="eval").body, module)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return fits(value, left, module) or fits(value, right, module)
        case ast.Subscript(value=outer, slice=inner):
            return _fits_subscript(value, _last(outer), _items(inner), module)
        case ast.Name() | ast.Attribute():
            return _fits_name(value, annotation, module)
    return True


def choices(annotation: ast.expr | None, module: str) -> list[Any]:
    """Every value that the `Literal`s in an annotation allow; empty without one."""
    match annotation:
        case ast.Constant(value=str() as text):
            return choices(ast.parse(text, mode="eval").body, module)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return choices(left, module) + choices(right, module)
        case ast.Subscript(value=outer, slice=inner):
            items = _items(inner)
            if _last(outer) == "Literal":
                return [item.value for item in items if isinstance(item, ast.Constant)]
            return [value for item in items for value in choices(item, module)]
        case ast.Name(id=name):
            owner, alias = _alias(module, name)
            return choices(alias, owner) if alias is not None else []
    return []


def _fits_name(value: Any, annotation: ast.Name | ast.Attribute, module: str) -> bool:
    name = _last(annotation)
    if name in PLAIN:
        return PLAIN[name](value)
    if name in SEQUENCES:
        return isinstance(value, list)
    if name in MAPPINGS:
        return isinstance(value, Mapping)
    if name == "Callable":
        return False  # only a node with _target_ makes one
    if isinstance(annotation, ast.Attribute):
        return True
    owner, alias = _alias(module, name)
    if alias is not None:
        return fits(value, alias, owner)
    _, found = definition(module, name)
    return not isinstance(found, ast.ClassDef)  # ours, and built from a node with _target_


def _fits_subscript(value: Any, outer: str, items: list[ast.expr], module: str) -> bool:
    if outer == "Literal":
        allowed = [item.value for item in items if isinstance(item, ast.Constant)]
        return any(type(value) is type(choice) and value == choice for choice in allowed)
    if outer == "Optional":
        return value is None or fits(value, items[0], module)
    if outer == "Union":
        return any(fits(value, item, module) for item in items)
    if outer == "Annotated":
        return fits(value, items[0], module)
    if outer in SEQUENCES:
        return isinstance(value, list) and _fits_items(value, outer, items, module)
    if outer in MAPPINGS:
        inner = items[1] if len(items) == 2 else None
        return isinstance(value, Mapping) and all(
            fits(entry, inner, module) for entry in value.values()
        )
    return outer != "Callable"


def _fits_items(value: list[Any], outer: str, items: list[ast.expr], module: str) -> bool:
    endless = outer != "tuple" or _is_ellipsis(items[-1])
    if not endless and len(value) != len(items):
        return False
    expected = [items[0]] * len(value) if endless else items
    return all(fits(entry, item, module) for entry, item in zip(value, expected, strict=True))


def _alias(module: str, name: str) -> tuple[str, ast.expr | None]:
    """The type behind `Name = Literal[...]`, and the module it is written in."""
    owner, found = definition(module, name)
    if isinstance(found, ast.Assign | ast.AnnAssign):
        return owner, found.value
    return owner, None


def _items(inner: ast.expr) -> list[ast.expr]:
    return list(inner.elts) if isinstance(inner, ast.Tuple) else [inner]


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else ast.unparse(node)


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


OPEN = "???"
# Read by hydra.utils.instantiate, not by the target.
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")
SHOWN = 6

Node = Mapping[str, Any]


def check(cfg: DictConfig, command: str) -> None:
    """Refuse a configuration that the code would not understand.

    Args:
        cfg: Composed for `command`.
        command: Primary file, `conf/<command>.yaml`, whose keys and groups are the ones that count.

    Raises:
        ConfigurationError: Naming every key that is unknown, open, or of a wrong value.
    """
    try:
        found = [f"{key}: has no value; add {key}=..." for key in OmegaConf.missing_keys(cfg)]
        found = sorted(found) or list(problems(_resolved(cfg), schema(command)))
    except OmegaConfBaseException as error:
        text = str(error).split("\n")[0]
        raise ConfigurationError(f"{error.full_key}: {text}" if error.full_key else text) from error
    if found:
        rest = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise ConfigurationError("\n".join([*found[:SHOWN], *rest]))


def problems(node: Node, known: Node, key: str = "") -> Iterator[str]:
    """What is wrong below a mapping; `known` holds the keys of the yaml files at this place."""
    if "_target_" in node:
        yield from _target_problems(node, key)
        return
    for name, value in node.items():
        inner = f"{key}.{name}" if key else name
        is_added_target = bool(key) and isinstance(value, Mapping) and "_target_" in value
        if name not in known and not is_added_target:
            yield f"{inner}: there is no such key; {suggest(name, _names(known))}"
        elif isinstance(value, Mapping):
            expected = known.get(name)
            yield from problems(value, expected if isinstance(expected, Mapping) else {}, inner)


def _target_problems(node: Node, key: str) -> Iterator[str]:
    target = str(node["_target_"])
    try:
        accepted = signature(target)
    except UnknownTargetError as error:
        yield f"{key}._target_: {error}"
        return
    short = target.rpartition(".")[2]
    for name, value in node.items():
        if name in HYDRA_KEYS:
            continue
        inner = f"{key}.{name}"
        parameter = accepted.parameters.get(name)
        if parameter is None and not accepted.takes_any:
            yield f"{inner}: {short} takes no {name}; {suggest(name, accepted.parameters)}"
            continue
        yield from _value_problems(value, parameter, accepted, inner)
        yield from _nested(value, inner)
    if not node.get("_partial_"):
        for name, parameter in accepted.parameters.items():
            if parameter.required and name not in node:
                yield f"{key}.{name}: {short} needs it; add +{key}.{name}=..."


def _value_problems(
    value: Any, parameter: Parameter | None, accepted: Signature, key: str
) -> Iterator[str]:
    if parameter is None or fits(value, parameter.annotation, accepted.module):
        return
    assert parameter.annotation is not None
    words = [str(choice) for choice in choices(parameter.annotation, accepted.module)]
    close = close_to(str(value), words)
    expected = f"one of {', '.join(words)}" if words else ast.unparse(parameter.annotation)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    yield f"{key}: got {value!r}, expected {expected}{hint}"


def _nested(value: Any, key: str) -> Iterator[str]:
    """Targets somewhere inside an argument."""
    if isinstance(value, Mapping) and "_target_" in value:
        yield from _target_problems(value, key)
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _nested(entry, f"{key}.{name}")
    elif isinstance(value, list):
        for place, entry in enumerate(value):
            yield from _nested(entry, f"{key}.{place}")


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _names(known: Node) -> list[str]:
    return [name for name in known if name not in HYDRA_KEYS]


VARIABLE = re.compile("\0env:(.*?)\0")


def recorded(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Plain containers in which `${oc.env:NAME}` stands as written, and secrets as ***.

    Read back, such a variable is looked up again, in the environment of then.
    """
    config = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    with _variables_unread():
        plain = masked_values(OmegaConf.to_container(config, resolve=True))
    assert isinstance(plain, dict)
    return {str(key): _written(value) for key, value in plain.items()}


@contextmanager
def _variables_unread() -> Iterator[None]:
    """`oc.env` gives a mark that says which variable was asked for."""
    OmegaConf.register_new_resolver("oc.env", _mark, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _mark(name: str, *default: Any) -> str:
    return f"\0env:{','.join([name, *map(str, default)])}\0"


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _written(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_written(entry) for entry in value]
    return VARIABLE.sub(r"${oc.env:\1}", value) if isinstance(value, str) else value


FAILURE = 1


def perform(command: Callable[[], Any], *, full: bool) -> int:
    """Run a command and report its error, if any.

    Args:
        command: Its result is the exit code if it is a number.
        full: Show the traceback of every error.

    Returns:
        Exit code.

    Raises:
        ConfigurationError: As the command raises it.
    """
    try:
        result = command()
    except ConfigurationError:
        raise
    except Exception as error:
        told = unwrapped(error)
        if is_meant(told) and not full:
            print(f"error: {told}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        return FAILURE
    return result if isinstance(result, int) else 0


def is_meant(error: Exception) -> bool:
    """Whether a `raise` statement of this package made this error, so that its text says it all."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or isinstance(error, AssertionError):
        return False
    last = frames[-1]
    return Path(last.filename).is_relative_to(PACKAGE) and (last.line or "").startswith("raise ")


def wants_traceback() -> bool:
    """Whether Hydra's own switch for complete tracebacks is on."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def unwrapped(error: Exception) -> Exception:
    """The error of a constructor, without what Hydra says around it."""
    while type(error).__name__ == "InstantiationException" and isinstance(
        error.__cause__, Exception
    ):
        error = error.__cause__
    return error
