"""Which errors are messages for the user, and which are defects that keep their traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradeclip_ft.commands.compose import ConfigurationError
from gradeclip_ft.commands.signatures import PACKAGE
from gradeclip_ft.results.secrets import masked

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
            print(f"error: {masked(str(told))}", file=sys.stderr)
        else:
            print(masked("".join(traceback.format_exception(error))), file=sys.stderr)
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
