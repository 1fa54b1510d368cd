"""Several methods on one model, some of which it may not be able to do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from gradeclip_ft.explain.base import Explainer
from gradeclip_ft.models.tower import UnsupportedTowerError

Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


class Able:
    """Methods that this model can do; the others are left out at their first failure, with a word.

    Args:
        methods: By name.
        skip: Whether others may be left out at all.

    Attributes:
        methods: Those left, by name.
        left_out: Why the others are not.
    """

    def __init__(self, methods: Mapping[str, Explainer], *, skip: bool = True) -> None:
        self.methods = dict(methods)
        self.left_out: dict[str, str] = {}
        self._skip = skip

    def each(self, work: Callable[[Explainer], Answer]) -> dict[str, Answer]:
        """Answers of all methods that this model can do.

        Raises:
            UnsupportedTowerError: It can do none, or not all of them and none may be left out.
        """
        return {name: answer for name in list(self.methods) for answer in self.one(name, work)}

    def one(self, name: str, work: Callable[[Explainer], Answer]) -> list[Answer]:
        """The answer of one method, or none."""
        try:
            return [work(self.methods[name])]
        except UnsupportedTowerError as error:
            if not self._skip:
                raise
            log.warning("%s is left out: %s", name, error)
            self.left_out[name] = str(error)
            del self.methods[name]
            if not self.methods:
                raise UnsupportedTowerError(
                    f"this model can do none of {', '.join(self.left_out)}: {error}"
                ) from error
            return []
