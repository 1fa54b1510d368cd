"""What things cost: `python -m tools.bench ACTION [key=value ...]`; `out=results/speed` keeps it.

Every action prints a table with the machine, the threads and the versions behind it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from gradeclip_ft.commands.cli import CONFIGURATION_ERROR, call, usage
from gradeclip_ft.commands.config import ConfigurationError, suggest

from .evaluate import evaluate
from .explain import explain
from .loader import loader
from .memory import memory
from .phrases import phrases
from .startup import startup
from .step import scaling, step

ACTIONS: dict[str, Callable[..., None]] = {
    "step": step,
    "scaling": scaling,
    "memory": memory,
    "explain": explain,
    "evaluate": evaluate,
    "loader": loader,
    "phrases": phrases,
    "startup": startup,
}


def main(arguments: list[str]) -> int:
    """Run one action; the exit code of a command line that cannot be understood is 2."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("-h", "--help"):
        print(__doc__)
        for action, function in ACTIONS.items():
            print(f"{action} {usage(function)}\n    {(function.__doc__ or '').splitlines()[0]}")
        return 0
    try:
        if name not in ACTIONS:
            raise ConfigurationError(f"there is no action {name}; {suggest(name, ACTIONS)}")
        call(ACTIONS[name], rest)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return CONFIGURATION_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
