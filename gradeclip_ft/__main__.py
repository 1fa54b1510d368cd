"""Table of commands: `python -m gradeclip_ft <command> [overrides]`. Nothing else."""

from __future__ import annotations

import sys

from gradeclip_ft.commands.cli import Command, run

COMMANDS = {
    "train": Command("train", config="train"),
    "evaluate": Command("evaluate", config="evaluate"),
    "explain": Command(
        "explain",
        config="explain",
        several="explainer",
        default="grad_eclip",
        never={
            "grad_eclip_text": "it is for words, and comes with grad_eclip",
            "uniform": "it gives every place the same weight, which shows nothing",
        },
    ),
    "detect": Command("detect", config="detect"),
    "export": Command("export", config="export"),
    "doctor": Command("doctor", config="train"),
    "compare": Command("compare", config=None),
    "report": Command("report", config=None),
    "data": Command("data", config=None, actions=True),
    "list": Command("list", config=None, calls="list_options"),
}


def main() -> None:
    """Entry point of the installed script."""
    sys.exit(run(COMMANDS, sys.argv[1:]))


if __name__ == "__main__":
    main()
