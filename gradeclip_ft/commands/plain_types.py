"""Does a value from yaml fit an annotation? Plain types and `Literal`, without importing anything.

What cannot be judged from the text (foreign classes, callables, protocols) is accepted: the code
that uses the value has the last word.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from gradeclip_ft.commands.signatures import definition

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
