"""Attacks through files, addresses and configurations, and leaks of secrets."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from omegaconf import OmegaConf

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.commands import runs
from gradeclip_ft.commands.build import make
from gradeclip_ft.commands.cli import run
from gradeclip_ft.commands.config import perform
from gradeclip_ft.data.shards import Skips, expand_shards, read_shard
from gradeclip_ft.models.weights import read_state
from gradeclip_ft.report.content import Case, Page
from gradeclip_ft.report.page import render
from gradeclip_ft.results.table import Table, to_html
from tools.faults_data import Row
from tools.faults_training import train

MARK = "attacked"
SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
SECRETS = {"STORE_SECRET": "correct-horse-battery", "WANDB_API_KEY": "0123456789abcdef0123"}
URL = "https://me:tiger77@host/part-{0..3}.tar?X-Amz-Signature=5167beef"


class Attack:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {MARK}",)


def rows(folder: Path) -> Iterator[Row]:
    """All of them; the working directory is `folder` meanwhile."""
    folder.mkdir()
    with contextlib.chdir(folder):
        for fault, attempt in ATTEMPTS:
            yield _refused(fault, attempt)
        yield _markup()
        yield _leaks()


def _refused(fault: str, attempt: Callable[[], object]) -> Row:
    """An attempt must end with an error, and without its mark."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            code = attempt()
    except Exception as error:
        message, refused = str(error), True
    else:
        message, refused = said.getvalue().removeprefix("error: "), code not in (None, 0)
    clean = not Path(MARK).exists()
    return Row(
        fault, "refused" if refused else "survived", "none", message.strip(), refused and clean
    )


def _weights() -> None:
    torch.save({"state_dict": Attack()}, "weights.pt")
    read_state("weights.pt")


def _script() -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save("script.pt")  # type: ignore[no-untyped-call]
    read_state("script.pt")


def _resume() -> None:
    torch.save({"state_dict": {}, "loops": Attack()}, "last.ckpt")
    train(Path("run"), checkpoint=Path("last.ckpt"))


def _wide() -> None:
    """A few bytes that claim four terabytes, with the names of a model."""
    from gradeclip_ft.models.weights import load_state
    from tools.fuzz_files import model

    state = dict(model().state_dict())
    state["visual.proj"] = torch.zeros(1).expand(10**12)
    load_state(model(), state, "wide.pt")


def _train(*overrides: str) -> Callable[[], int]:
    return lambda: run(COMMANDS, ["train", "+exp=smoke", "name=x", *overrides])


def _sweep() -> int:
    hostile = (
        "+hydra.callbacks.x._target_=os.system",
        f"+hydra.callbacks.x.command='touch {MARK}'",
    )
    return run(COMMANDS, ["train", "-m", "+exp=smoke", "name=x", "seed=0,1", *hostile])


def _record(target: str, **arguments: Any) -> Callable[[], object]:
    node = {"_target_": "gradeclip_ft.losses.AlignmentOptions"}
    return lambda: make(OmegaConf.create({**node, "kind": {"_target_": target, **arguments}}))


def _metacharacters() -> int:
    """No program of that name is installed, or it gets the address as one word."""
    skips = Skips(tell=lambda cause, where, error: print(f"{where}: {error}", file=sys.stderr))
    with mock.patch.dict(os.environ, {"PATH": ""}):
        list(read_shard(f"s3://b/$(touch {MARK});`touch {MARK}`.tar", skips))
    return skips.total["unreadable_shard"]


ATTEMPTS: tuple[tuple[str, Callable[[], object]], ...] = (
    ("weights that run a command when unpickled", _weights),
    ("weights as TorchScript", _script),
    ("checkpoint to resume from that runs a command", _resume),
    ("weights of a few bytes that claim 4 TB", _wide),
    ("shards=pipe:COMMAND", lambda: expand_shards(f"pipe:touch {MARK}")),
    ("an address with $(...) and backquotes", _metacharacters),
    ("model._target_=os.system", _train("model._target_=os.system")),
    ("a nested _target_", _train("objective.explainer._target_=os.system")),
    (
        "_target_ of a function of ours that writes",
        _train("model._target_=gradeclip_ft.results.record.write_atomically"),
    ),
    ("hydra.callbacks in a sweep", _sweep),
    ("os.system in the record of a run", _record("os.system", command=f"touch {MARK}")),
    ("builtins.eval in the record of a run", _record("builtins.eval", _args_=["1"])),
)


def _markup() -> Row:
    """Captions, phrases, names and notes that are HTML, on both kinds of pages."""
    heat = np.ones((1, 2, 2), dtype=np.float32)
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    case = Case(image=image, phrases=(SCRIPT,), heat={SCRIPT: heat}, caption=SCRIPT)
    page = Page(SCRIPT, SCRIPT, (SCRIPT,), cases=[case], facts={SCRIPT: {SCRIPT: SCRIPT}})
    text = render(page, Path("page.html")).read_text()
    text += to_html(Table((SCRIPT,), (SCRIPT,), ({SCRIPT: SCRIPT},), (SCRIPT,), (SCRIPT,)))
    shown = text.count("&lt;script&gt;alert(1)")
    clean = "<script>alert" not in text and "<img src=x" not in text
    message = f"shown {shown} times as text"
    return Row(
        "captions, phrases, file names with <script>",
        "survived",
        "none",
        message,
        clean and shown > 9,
    )


def _leaks() -> Row:
    """A run's record, an error and a traceback with passwords in their material."""
    said = io.StringIO()
    cfg = {
        "data": {"shards": URL},
        "extra": {"api_key": "k-1234567"},
        "x": "${oc.env:STORE_SECRET}",
    }

    def fail() -> None:
        raise ValueError(f"cannot read {URL} with {SECRETS['WANDB_API_KEY']}")

    arguments = ["x", "train", f"data.shards={URL}"]
    with mock.patch.dict(os.environ, SECRETS), mock.patch.object(sys, "argv", arguments):
        runs.claim(Path("leaky"), OmegaConf.create(cfg))
        runs.record(Path("leaky"), {"data": {"where": URL}})
        with contextlib.redirect_stderr(said):
            perform(fail, full=False)
            perform(fail, full=True)
    text = said.getvalue() + "".join(path.read_text() for path in Path("leaky").iterdir())
    found = [
        word for word in (*SECRETS.values(), "tiger77", "5167beef", "k-1234567") if word in text
    ]
    recorded = json.loads(Path("leaky/environment.json").read_text())["command"]
    return Row(
        "passwords in addresses, keys and variables", "survived", "none", recorded, not found
    )
