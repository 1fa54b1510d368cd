"""A configuration as records and trackers may hold it: resolved, but without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from gradeclip_ft.results.secrets import masked_values

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
