"""Plain commands: words and `key=value` from the command line to a typed Python function.

Positional parameters take the words, keyword-only parameters the options; annotations say how a
value is read. A command with actions (`data make`, `data count`) maps their names to functions.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gradeclip_ft.commands.compose import ConfigurationError
from gradeclip_ft.commands.names import suggest

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def call(function: Callable[..., Any], arguments: Sequence[str]) -> Any:
    """Call `function` with arguments as typed on a command line.

    Raises:
        ConfigurationError: If a word or an option is unknown, missing, or cannot be read.
    """
    words = [argument for argument in arguments if not _is_option(argument)]
    given = dict(argument.split("=", 1) for argument in arguments if _is_option(argument))
    parameters = inspect.signature(function).parameters
    hints = get_type_hints(function)
    positional = [p for p in parameters.values() if p.kind in POSITIONAL]
    rest = next((p for p in parameters.values() if p.kind is p.VAR_POSITIONAL), None)
    keywords = {p.name: p for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name in given:
        if name not in keywords:
            raise ConfigurationError(
                f"{name}={given[name]}: no such option; {suggest(name, keywords)}"
            )
    values = []
    for place, parameter in enumerate(positional):
        if place < len(words):
            values.append(read(words[place], hints.get(parameter.name, str), parameter.name))
        elif parameter.default is parameter.empty:
            raise ConfigurationError(f"{parameter.name} is missing; {_expected(function)}")
    extra = words[len(positional) :]
    if extra and rest is None:
        raise ConfigurationError(f"{extra[0]}: one word too many; {_expected(function)}")
    if rest is not None:
        values += [read(word, hints.get(rest.name, str), rest.name) for word in extra]
    for name, parameter in keywords.items():
        if parameter.default is parameter.empty and name not in given:
            raise ConfigurationError(f"{name}=... is missing; {_expected(function)}")
    options = {name: read(text, hints.get(name, str), name) for name, text in given.items()}
    return function(*values, **options)


def usage(function: Callable[..., Any]) -> str:
    """The words and options that a function takes, in one line."""
    hints = get_type_hints(function)
    return " ".join(
        _shown(parameter, hints.get(parameter.name, str))
        for parameter in inspect.signature(function).parameters.values()
    )


def read(text: str, kind: Any, name: str) -> Any:
    """Value of an option: a number, a word, `null`, or a list with commas, as its type asks.

    Raises:
        ConfigurationError: If the text cannot be read as `kind`.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if text in ("null", "none", "") and type(None) in arguments:
            return None
        return _read_any(text, [entry for entry in arguments if entry is not type(None)], name)
    if origin is Literal:
        words = {str(choice): choice for choice in arguments}
        if text not in words:
            raise ConfigurationError(f"{name}: there is no {text}; {suggest(text, words)}")
        return words[text]
    if origin is not None and issubclass(origin, Sequence):
        entries = [entry.strip() for entry in text.strip("[]").split(",") if entry.strip()]
        return origin_list(origin, [read(entry, arguments[0], name) for entry in entries])
    if kind is bool:
        return _read_bool(text, name)
    if kind in (int, float, str, Path):
        try:
            return kind(text)
        except ValueError:
            raise ConfigurationError(f"{name}: got {text!r}, expected {kind.__name__}") from None
    return text


def origin_list(origin: type, entries: list[Any]) -> Any:
    """The list, or a tuple where the annotation asks for one."""
    return tuple(entries) if origin is tuple else entries


def _read_any(text: str, kinds: Sequence[Any], name: str) -> Any:
    """The first reading that works, text last: `int | str` reads "5" as a number."""
    error = ConfigurationError(f"{name}: got {text!r}")
    for kind in sorted(kinds, key=lambda kind: kind in (str, Path)):
        try:
            return read(text, kind, name)
        except ConfigurationError as problem:
            error = problem
    raise error


def _read_bool(text: str, name: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ConfigurationError(f"{name}: got {text!r}, expected true or false")
    return text.lower() == "true"


def _is_option(argument: str) -> bool:
    """Whether it is `key=value`; a path or an address may hold a = too."""
    name, equals, _ = argument.partition("=")
    return bool(equals) and name.isidentifier()


def _expected(function: Callable[..., Any]) -> str:
    return f"expected {usage(function)}"


def _shown(parameter: inspect.Parameter, kind: Any) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"[{parameter.name.upper()} ...]"
    choices = (
        "|".join(str(choice) for choice in get_args(kind)) if get_origin(kind) is Literal else ""
    )
    if parameter.kind is parameter.KEYWORD_ONLY:
        if parameter.default is parameter.empty:
            return f"{parameter.name}={choices or '...'}"
        default = "null" if parameter.default is None else parameter.default
        return f"[{parameter.name}={default}]"
    return choices or parameter.name.upper()
