"""Table of commands: `python -m gradeclip_ft <command> [overrides]`. Nothing else."""

from __future__ import annotations

import sys

from gradeclip_ft.commands.cli import Command, run

COMMANDS = {
    "train": Command("train", config="train"),
    "evaluate": Command("evaluate", config="evaluate"),
    "explain": Command("explain", config="explain", plain=(("explainer", "methods"),)),
    "export": Command("export", config="export"),
    "doctor": Command("doctor", config="train", preset=("name=doctor",)),
    "compare": Command("compare", config=None),
    "report": Command("report", config=None),
    "data": Command("data", config=None),
    "list": Command("list", config=None),
}


def main() -> None:
    """Entry point of the installed script."""
    sys.exit(run(COMMANDS, sys.argv[1:]))


if __name__ == "__main__":
    main()
