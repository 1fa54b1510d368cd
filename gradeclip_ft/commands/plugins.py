"""Classes of other packages that a configuration may build, and what arguments they take.

`conf/targets.json` says what yaml builds. A plug-in is a Python module whose explainers,
evaluators, objectives and data sets are allowed beside that. It is opened by its installation, as
an entry point of the group `gradeclip_ft.plugins`, or by `plugins: [MODULE]` in what a command
composed from its command line. The record of a run opens nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from gradeclip_ft.results import record

GROUP = "gradeclip_ft.plugins"
# What a class must have to be built under a key; of an explainer one of them is enough.
NEEDED = {
    "explainer": ("from_trace", "from_record", "from_input"),
    "evaluator": ("name", "protocol", "__call__"),
    "objective": ("check", "__call__"),
    "data": (),
}
opened: set[str] = set()  # by a configuration, in this process


@cache
def installed() -> tuple[str, ...]:
    """Modules that installed packages offer as plug-ins."""
    return tuple(sorted({point.module for point in entry_points(group=GROUP)}))


def folders() -> list[Path]:
    """Folders `conf` of the installed plug-ins that have one."""
    specs = [find_spec(module.partition(".")[0]) for module in installed()]  # imports nothing
    homes = [place for spec in specs if spec for place in spec.submodule_search_locations or ()]
    return [Path(home) / "conf" for home in homes if (Path(home) / "conf").is_dir()]


def open_plugins(modules: str | Sequence[str]) -> None:
    """Allow the classes of these modules from now on.

    Raises:
        ValueError: There is no such module.
    """
    for module in [modules] if isinstance(modules, str) else modules:
        top = str(module).partition(".")[0]
        if top.isidentifier() and find_spec(top) is not None:
            opened.add(str(module))
        else:
            raise ValueError(
                f"plugins: there is no module {module}; install its package, or start where "
                f"`import {module}` works"
            )


def facts(target: str, kind: str) -> dict[str, Any] | None:
    """What a class of an open plug-in takes, as in `targets.json`; None where it belongs to none.

    Args:
        target: Module and name.
        kind: What it is to be: explainer, evaluator, objective, data.

    Raises:
        ValueError: It cannot be imported, or it is nothing of that kind.
    """
    home, _, name = target.rpartition(".")
    plugin = next((one for one in {*installed(), *opened} if _is_inside(home, one)), None)
    if plugin is None or kind not in NEEDED:
        return None
    try:
        found = getattr(import_module(home), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{target} cannot be imported: {error}") from error
    # What the plug-in itself imports, such as os.system, is not part of it.
    if not isinstance(found, type) or not _is_inside(found.__module__, plugin):
        raise ValueError(f"{target} is not a class of the plug-in {plugin}")
    present = [method for method in NEEDED[kind] if _has(found, method)]
    if not (present if kind == "explainer" else len(present) == len(NEEDED[kind])):
        which = "one of " if kind == "explainer" else ""
        raise ValueError(f"{target} has not what an {kind} needs: {which}{', '.join(NEEDED[kind])}")
    record.OTHER_CODE[plugin] = _version(plugin)
    return {"partial": None if kind == "data" else False, "arguments": arguments(found)}


def _is_inside(module: str, plugin: str) -> bool:
    return f"{module}.".startswith(f"{plugin}.")


def _has(found: type, name: str) -> bool:
    """Whether objects of a class have it: as a method, a property, or a field of a dataclass."""
    parts = [(vars(base), vars(base).get("__annotations__", {})) for base in found.__mro__]
    return any(name in part for pair in parts for part in pair)


def _version(module: str) -> str:
    """Of its distribution; of a module that is not installed a hash of its source."""
    distribution = packages_distributions().get(module.partition(".")[0])
    if distribution:
        return version(distribution[0])
    home = Path(str(sys.modules[module].__file__))
    files = sorted(home.parent.rglob("*.py")) if home.name == "__init__.py" else [home]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return f"source {digest.hexdigest()[:16]}"


def arguments(function: Any) -> dict[str, dict[str, Any]]:
    """Type of each argument, and whether it must be given."""
    homes = reversed(function.__mro__) if isinstance(function, type) else (function,)
    names = {k: v for home in homes for k, v in vars(sys.modules[home.__module__]).items()}
    return {
        parameter.name: {"type": plain_type(_evaluated(parameter.annotation, names))}
        | ({"required": True} if parameter.default is parameter.empty else {})
        for parameter in inspect.signature(function).parameters.values()
    }


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    try:
        return eval(annotation, names) if isinstance(annotation, str) else annotation
    except NameError:  # imported for type checkers alone, so a class
        return object


def plain_type(kind: Any) -> Any:
    """A type as JSON: a name, alternatives as a list, or one of `choices`, `list`, `dict`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        parts = [plain_type(entry) for entry in inner]
        return [part for place, part in enumerate(parts) if part not in parts[:place]]
    if origin is Literal:
        return {"choices": list(inner)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"dict": plain_type(inner[1])}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"list": plain_type(inner[0])}
    if kind in (int, float, bool, str):
        return kind.__name__
    words = {type(None): "null", Path: "str", Any: "any", inspect.Parameter.empty: "any"}
    return words.get(kind, "object")
