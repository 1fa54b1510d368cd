"""What things cost: `python -m tools.bench ACTION [key=value ...]`; `out=results/speed` keeps it.

Every action prints a table with the machine, the threads and the versions.
"""

from __future__ import annotations

import sys

from gradeclip_ft.commands.cli import call, usage
from gradeclip_ft.commands.config import perform, wants_traceback

from .parts import evaluate, explain, loader, phrases, startup
from .step import memory, scaling, step

ACTIONS = {
    action.__name__: action
    for action in (step, scaling, memory, explain, evaluate, loader, phrases, startup)
}


def main(arguments: list[str]) -> int:
    """Run one action, or show them all."""
    if arguments and arguments[0] in ACTIONS:
        action = ACTIONS[arguments[0]]
        return perform(lambda: call(action, arguments[1:]), full=wants_traceback())
    print(__doc__)
    for name, action in ACTIONS.items():
        print(f"{name} {usage(action)}\n    {(action.__doc__ or '').splitlines()[0]}")
    return 0 if arguments in ([], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
