"""Configuration against the signatures of the code, before anything heavy is imported.

Hydra knows which groups, options and keys exist in yaml. It does not know that `+optim.typo=1` has
no reader, that a word is none of a `Literal`, or that an argument is missing: this is found here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gradeclip_ft.commands.compose import ConfigurationError, schema
from gradeclip_ft.commands.names import close_to, suggest
from gradeclip_ft.commands.plain_types import choices, fits
from gradeclip_ft.commands.signatures import Parameter, Signature, UnknownTargetError, signature

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
