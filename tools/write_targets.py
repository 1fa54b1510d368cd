"""Writes `conf/targets.json`: what yaml may build, under which keys, with which arguments.

    python -m tools.write_targets

Run it after a change to a `_target_` in conf/, or to a signature that such a target has; a test
proves that the file is current. Commands check configurations against it without importing torch.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from gradeclip_ft.commands.config import TARGETS, conf_dir, kind_of


def used() -> Iterator[tuple[str, str, bool]]:
    """Every `_target_` of conf/, the kind of the key that it is under, whether it is partial."""
    for path in conf_dir().rglob("*.yaml"):
        group = path.relative_to(conf_dir()).parts[0]
        if group != "exp":  # experiments change nodes of other groups
            yield from _below(yaml.safe_load(path.read_text(encoding="utf-8")), group)


def _below(node: Any, key: str) -> Iterator[tuple[str, str, bool]]:
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        yield node["_target_"], kind_of(key), node.get("_partial_", False)
    for name, value in node.items():
        # The entries of a group of several, as evaluators, are named freely.
        yield from _below(value, name if "_target_" in node else key)


def arguments(target: str) -> dict[str, dict[str, Any]]:
    """Type of each argument, and whether it must be given."""
    module, name = target.rsplit(".", 1)
    function = getattr(importlib.import_module(module), name)
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
    return {type(None): "null", Path: "str", Any: "any"}.get(kind, "object")


def content() -> str:
    """The text of the file, an argument a line."""
    entries = []
    places = sorted(set(used()))
    for target in sorted({place[0] for place in places}):
        keys = sorted({key for name, key, _ in places if name == target})
        partial = any(partial for name, _, partial in places if name == target)
        lines = [f'  "{name}": {json.dumps(fact)}' for name, fact in arguments(target).items()]
        takes = "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"
        facts = f' "under": {json.dumps(keys)},\n "partial": {json.dumps(partial)},\n'
        entries.append(f'"{target}": {{\n{facts} "arguments": {takes}\n}}')
    return "{\n" + ",\n".join(entries) + "\n}\n"


if __name__ == "__main__":
    (conf_dir() / TARGETS).write_text(content(), encoding="utf-8")
