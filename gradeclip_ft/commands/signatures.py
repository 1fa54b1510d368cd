"""What a `_target_` accepts, read from its source text.

The typed signature of a class or function is the schema of its yaml. Reading it with `ast` instead
of importing it keeps configuration errors free of torch: they answer in a fraction of a second.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gradeclip_ft

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
