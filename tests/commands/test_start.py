"""Help, lists and errors answer at once: they import neither torch nor anything that needs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Processor seconds, so that a busy machine does not fail the test; measured 0.2 to 0.6 on one core.
# The promise to users is one second.
SECONDS = 2.0
HEAVY = ("torch", "webdataset", "nltk", "matplotlib")  # the rest imports torch

PROBE = f"""
import json, runpy, sys, time
sys.argv = ["gradeclip_ft", *sys.argv[1:]]
try:
    runpy.run_module("gradeclip_ft", run_name="__main__")
except SystemExit as end:
    code = end.code
heavy = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps([code, heavy, time.process_time()]))
"""


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("doctor --help", 0),
        ("data --help", 0),
        ("compare --help", 0),
        ("list experiments", 0),
        ("train --cfg job", 0),
        ("trian", 2),
        ("train model=folder", 2),
        ("train optim.lrr=1", 2),
        ("train objective.phrase_weight=mx", 2),
        ("train +exp=shpaes", 2),
        ("train -m name=a,b +exp=shapes,shpaes", 2),
        ("evaluate evaluator=[shapes_region]", 2),
        ("data mkae", 2),
    ],
)
def test_torch_is_not_imported_for(line: str, code: int, tmp_path: Path) -> None:
    """Would catch a heavy import at the top of a command: ten seconds for a help page."""
    command = [sys.executable, "-c", PROBE, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    got, heavy, seconds = json.loads(done.stdout.splitlines()[-1])
    assert (got, heavy) == (code, [])
    assert "Traceback" not in done.stderr
    assert seconds < SECONDS


def test_the_module_and_the_table_of_commands_agree() -> None:
    """Would catch a command in the table whose module or function has another name."""
    from gradeclip_ft.__main__ import COMMANDS

    for name, command in COMMANDS.items():
        assert command.name == name
        assert command.function().__name__ == (command.calls or name)
        assert command.function().__doc__
