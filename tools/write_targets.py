"""Writes `conf/targets.json`: what yaml may build, under which keys, with which arguments.

    python -m tools.write_targets

Run it after a change to a `_target_` in conf/, or to a signature that such a target has; a test
proves that the file is current. Commands check configurations against it without importing torch.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from typing import Any

import yaml

from gradeclip_ft.commands.config import TARGETS, conf_dir, kind_of
from gradeclip_ft.commands.plugins import arguments


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


def taken(target: str) -> dict[str, dict[str, Any]]:
    """What the arguments of a target are."""
    module, name = target.rsplit(".", 1)
    return arguments(getattr(importlib.import_module(module), name))


def content() -> str:
    """The text of the file, an argument a line."""
    entries = []
    places = sorted(set(used()))
    for target in sorted({place[0] for place in places}):
        keys = sorted({key for name, key, _ in places if name == target})
        partial = any(partial for name, _, partial in places if name == target)
        lines = [f'  "{name}": {json.dumps(fact)}' for name, fact in taken(target).items()]
        takes = "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"
        facts = f' "under": {json.dumps(keys)},\n "partial": {json.dumps(partial)},\n'
        entries.append(f'"{target}": {{\n{facts} "arguments": {takes}\n}}')
    return "{\n" + ",\n".join(entries) + "\n}\n"


if __name__ == "__main__":
    (conf_dir() / TARGETS).write_text(content(), encoding="utf-8")
