"""Injects every fault that runs are meant to survive, and prints what happened.

    python -m tools.faults                           all, in a minute or two
    python -m tools.faults data out=table.md         one part: data, remote, runs or safety

Exit code 1 if a fault is not handled: lost more than it must, stopped what should go on, or was let
through.
"""

from __future__ import annotations

import contextlib
import gzip
import http.server
import io
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.commands import runs
from gradeclip_ft.commands.build import make
from gradeclip_ft.commands.cli import call, run
from gradeclip_ft.commands.config import compose, perform, recorded, wants_traceback
from gradeclip_ft.data.coco import read_captions
from gradeclip_ft.data.shards import Patience, Skips, expand_shards, read_shard
from gradeclip_ft.images import read_image
from gradeclip_ft.models.load import load_clip
from gradeclip_ft.models.weights import load_state, read_state
from gradeclip_ft.report.content import Case, Page
from gradeclip_ft.report.page import write_page
from gradeclip_ft.results.masking import masked_output, secrets_of_environment
from gradeclip_ft.results.table import Table
from gradeclip_ft.text.phrases import PhraseFinder, load_tagger
from gradeclip_ft.training.callbacks import DUMP
from gradeclip_ft.training.module import FineTuneModule
from gradeclip_ft.training.run_files import read_lines
from tools.damage import BLOCK, DAMAGES, EPS, Damage, good, pack, source, tar_header

LONGEST = 150
ROOT = Path(__file__).resolve().parents[1]
SHARDS, SIZE = 4, 10
HIT = SIZE + SIZE // 2  # the sixth sample of the second shard
BOMB, MOST_KIB = 300 * 2**20, 150 * 2**10


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        fault: What was injected.
        outcome: "survived", "refused" before anything happened, or "stopped" with a message.
        lost: Which samples are lost.
        message: What the user reads.
        handled: Whether this is what should happen.
    """

    fault: str
    outcome: str
    lost: str
    message: str
    handled: bool


def faults(*parts: str, out: Path | None = None) -> int:
    """Inject and print; see the module.

    out=   also write the table to this file
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"{unknown[0]}: there is {', '.join(PARTS)}")
    lines: list[str] = []
    total = unhandled = 0
    begun = time.perf_counter()
    for title, rows in (PARTS[part] for part in parts or PARTS):
        lines += [
            f"## {title}",
            "",
            "| fault | outcome | lost samples | message |",
            "|--|--|--|--|",
        ]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "f"
            folder.mkdir()
            for row in rows(folder):
                total, unhandled = total + 1, unhandled + (not row.handled)
                message = " ".join(row.message.replace(place, "...").split()).replace("|", "\\|")
                message = message if len(message) <= LONGEST else f"{message[: LONGEST - 3]}..."
                outcome = row.outcome if row.handled else f"**UNHANDLED** ({row.outcome})"
                line = f"| {row.fault} | {outcome} | {row.lost} | {message} |"
                lines.append(line.replace("<", "&lt;"))
                print(lines[-1], flush=True)
        lines.append("")
    lines.append(f"{total} faults, {unhandled} unhandled.")
    print(f"{lines[-1]} {time.perf_counter() - begun:.0f} s")
    if out is not None:
        out.write_text("\n".join(["# Injected faults", "", *lines]) + "\n", encoding="utf-8")
    return 1 if unhandled else 0


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """Messages of the package."""
    lines: list[str] = []
    handler = logging.Handler()
    log = logging.getLogger("gradeclip_ft")
    with (
        mock.patch.object(handler, "emit", lambda record: lines.append(record.getMessage())),
        mock.patch.object(log, "handlers", [handler]),
        mock.patch.object(log, "propagate", False),
    ):
        yield lines


# Data: one broken thing among good samples, read by the loader of training.


def data_rows(folder: Path) -> Iterator[Row]:
    """Samples, then shards, then too much of it."""
    for damage in DAMAGES:
        write(folder, damage)
        lost, counts, message = read(folder)
        # slices are filled up by reading on from the start: a sample that comes twice counts twice
        handled = lost == (set() if damage.usable else ONE) and set(counts) == set(damage.causes)
        yield Row(damage.name, "survived", in_words(lost), message, handled)
    for name, change, expected in SHARD_FAULTS:
        path = write(folder)[1]
        before = [*folder.parent.iterdir(), *folder.parent.parent.glob("escaped*")]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if change is escape:  # further samples: the loader must count them
            damaged(path, change)
            lost, counts, message = read(folder)
        else:
            lost, counts, message = read(folder, partial(damaged, path, change))
        frugal = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MOST_KIB
        told = bool(counts) == bool(message) and bool(message or not expected)
        around = [*folder.parent.iterdir(), *folder.parent.parent.glob("escaped*")] == before
        handled = lost == expected and told and around and frugal
        yield Row(name, "survived", in_words(lost), message, handled)
    yield too_many(folder)
    marked = "<b>A dog</b> &amp; a red cat.Two birds<br/> https://x.org/a.html"
    found = PhraseFinder(load_tagger("textblob"), 5)(marked)
    clean = found == ["dog", "red cat", "birds"]
    yield Row("markup, entities and an address in a caption", "survived", "none", f"{found}", clean)


def write(folder: Path, damage: Damage | None = None) -> list[Path]:
    """Four shards of ten; one sample of the second is damaged."""
    paths = [folder / f"part-{shard}.tar" for shard in range(SHARDS)]
    for shard, path in enumerate(paths):
        numbers = range(shard * SIZE, (shard + 1) * SIZE)
        pack(path, ((f"{n:04d}", good(n), damage if n == HIT else None) for n in numbers))
    return paths


def read(
    folder: Path, before: Callable[[], object] = lambda: None
) -> tuple[set[int], Counter[str], str]:
    """Samples that did not come, counts by cause, and the first line of the log.

    `before` runs when the loader has counted: faults may come during a run of days.
    """
    loader = source(str(folder)).loader(seed=0, epoch=0, rank=0, world_size=1)
    before()
    counts: Counter[str] = Counter()
    lost = set(range(SHARDS * SIZE))
    with logged() as lines:
        for batch in loader:
            counts.update(batch.skipped)
            lost -= {int(key.split(":")[1]) for key in batch.keys}
    return lost, counts, lines[0] if lines else ""


def in_words(lost: set[int]) -> str:
    """Which samples are lost."""
    names = {frozenset(): "none", frozenset(ALL): "all of that shard", frozenset(TAIL): "its tail"}
    single = "that sample" if len(lost) == 1 else f"{len(lost)} samples"
    return names.get(frozenset(lost), single)


def damaged(path: Path, change: Callable[[bytes, int], bytes] | None) -> None:
    """The content becomes another one, made of the old one and the place of the sixth sample."""
    if change is None:
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(change(content, content.index(b"0015.jpg")))


def bomb(content: bytes, at: int, name: str = "bomb.jpg", files: int = 1) -> bytes:
    """Packed zeros, as files before those of the sixth sample."""
    out = io.BytesIO()
    part = bytes(BOMB // files // 20 // BLOCK * BLOCK)  # whole blocks, as in a tar
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as packed:
        packed.write(content[:at])
        for number in range(files):
            packed.write(tar_header(name.format(number), 20 * len(part)))
            for _ in range(20):
                packed.write(part)
        packed.write(content[at:])
    return out.getvalue()


def escape(content: bytes, at: int) -> bytes:
    """An image and a pickle that would be written elsewhere."""
    body = good(15)["jpg"]
    image = tar_header("../../../escaped/0015.jpg", len(body)) + body + bytes(-len(body) % BLOCK)
    return image + tar_header("../evil.pkl", 4) + b"cos\n" + bytes(BLOCK - 4) + content


TAIL, ALL, ONE = set(range(16, 20)), set(range(10, 20)), {HIT}
# Name, what becomes of the content, and which samples that costs.
SHARD_FAULTS: tuple[tuple[str, Callable[[bytes, int], bytes] | None, set[int]], ...] = (
    ("shard cut in the 7th of 10 samples", lambda x, at: x[: x.index(b"0016.txt") + 517], TAIL),
    ("empty shard", lambda x, at: b"", ALL),
    ("shard of zeros", lambda x, at: bytes(20 * BLOCK), ALL),
    ("HTML instead of a shard", lambda x, at: b"<html>404</html>" * 99, ALL),
    ("shard that vanishes during the run", None, ALL),
    ("damaged tar header of an image", lambda x, at: x[:at] + b"\xcf" + x[at + 1 :], ONE),
    ("hole of zeros over an image", lambda x, at: x[:at] + bytes(1536) + x[at + 1536 :], ONE),
    (
        "tar header that claims 2 TB",
        lambda x, at: x[:at] + tar_header("bomb.jpg", 2 * 10**12) + x[at:],
        set(),
    ),
    ("packed bomb: 300 MB of zeros in 1.3 MB", bomb, set()),
    ("packed bomb in a sample: 30 files of 10 MB", partial(bomb, name="0015.{}", files=30), set()),
    ("the same sample twice in a row", lambda x, at: x[: x.index(b"0016.jpg")] + x[at:], set()),
    ("paths that lead out, and a pickle, in a shard", escape, set()),
)


def too_many(folder: Path) -> Row:
    """Every third sample of a large shard."""
    for path in folder.iterdir():
        path.unlink()
    empty = Damage("", lambda files: {**files, "jpg": b""}, {})
    samples = ((f"{n:04d}", good(n), None if n % 3 else empty) for n in range(1200))
    pack(folder / "part-0.tar", samples)
    fault = "every third sample broken"
    try:
        read(folder)
    except RuntimeError as error:
        return Row(fault, "stopped", "none", str(error), "max_dropped" in str(error))
    return Row(fault, "survived", "all broken ones", "", False)


# Servers that shards come from: absent, busy, silent, breaking off, misleading.

QUICK = Patience(seconds=0.4, attempts=3, pause=0.02)  # a run waits a minute, five times
REMOTE_FAULTS = (
    ("remote shard that is not there (404)", "gone", 0),
    ("server that is busy twice (503)", "busy", SIZE),
    ("server that fails always (500)", "down", 0),
    ("server that never answers", "silent", 0),
    ("connection that breaks off twice", "breaks", SIZE),
    ("redirect to a file of this machine", "away", 0),
    ("server that drips its headers", "drips", 0),
    ("resumed stream that begins elsewhere", "elsewhere", 0),
)


class Server(http.server.BaseHTTPRequestHandler):
    """Behaves as the path says."""

    content = b""
    requests: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        """Answer."""
        self.requests[self.path] += 1
        content = self.content
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        match self.path:
            case "/gone.tar":
                self._send(404)
            case "/busy.tar":
                self._send(503 if self.requests[self.path] < 3 else 200, content)
            case "/down.tar":
                self._send(500)
            case "/silent.tar":
                time.sleep(1.0)
            case "/drips.tar":
                with contextlib.suppress(OSError):
                    for letter in b"HTTP/1.1 200 OK\r\n" + b"X-More: 1\r\n" * 20:
                        self.wfile.write(bytes([letter]))
                        time.sleep(0.02)
            case "/elsewhere.tar" | "/breaks.tar":
                rest = content[start:] if self.path == "/breaks.tar" else content
                span = f"bytes {len(content) - len(rest)}-"
                self._send(206 if start else 200, rest[: len(content) // 3 + 1], len(rest), span)
                time.sleep(0.1)
                self.close_connection = True
            case "/away.tar":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()

    def _send(self, code: int, data: bytes = b"", claimed: int = 0, span: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(claimed or len(data)))
        self.send_header("Content-Range", span)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def remote_rows(folder: Path) -> Iterator[Row]:
    """One shard from each server."""
    Server.content = write(folder)[0].read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        for name, path, wanted in REMOTE_FAULTS:
            with logged() as lines:
                url = f"http://127.0.0.1:{server.server_port}/{path}.tar"
                got = len(list(read_shard(url, Skips(), QUICK)))
            message = lines[0].replace(f":{server.server_port}", "") if lines else ""
            lost = "none" if got == SIZE else "its rest" if got else "all of that shard"
            handled = got == wanted and bool(lines) == (got != SIZE)
            yield Row(name, "survived", lost, message, handled)
        server.shutdown()


# Runs of +exp=smoke in this process: numbers, the tracker, files that a kill left, two at once.

QUIET = ("evaluation.before=false", "evaluation.after=false", "data.workers=0")
SMOKE = ("train", "+exp=smoke", *QUIET)
LONG = ("trainer.max_steps=40", "optim.schedule.steps=40")
KEY = "0123456789abcdef0123"
NATIVE_STEP = FineTuneModule.training_step


def smoke(name: str, *words: str, step: Callable[..., Any] = NATIVE_STEP) -> tuple[int, list[str]]:
    """Exit code, and the lines that the user reads; `step` in place of the training step."""
    said = io.StringIO()
    with (
        logged() as lines,
        warnings.catch_warnings(record=True) as seen,
        mock.patch.object(sys, "argv", ["gradeclip_ft"]),
        mock.patch.object(FineTuneModule, "training_step", step),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
    ):
        code = run(COMMANDS, [*SMOKE, f"name={name}", *words])
    warned = [str(entry.message) for entry in seen if "gradeclip_ft" in entry.filename]
    return code, [*lines, *warned, *said.getvalue().splitlines()]


def first(said: list[str], word: str) -> str:
    """The first line with a word."""
    return next((line for line in said if word in line), "")


def spoilt(*batches: int, infinite: bool = False) -> Callable[..., Any]:
    """A training step whose loss is NaN in some batches, or finite with an infinite gradient."""

    def step(module: FineTuneModule, batch: CaptionBatch, number: int) -> dict[str, Any]:
        found = NATIVE_STEP(module, batch, number)
        scale = module.clip.log_scale
        if number in batches:
            nothing = (scale - scale.detach()) * 3e38 * 10 if infinite else torch.nan
            found = {**found, "loss": found["loss"] + nothing}
        return found

    return step


def runs_rows(folder: Path) -> Iterator[Row]:
    """All of them; the working directory is `folder` meanwhile."""
    most = "trainer.max_non_finite=1"
    with contextlib.chdir(folder):
        yield number("a batch whose loss is NaN", "a", most, step=spoilt(2))
        yield number("a gradient that is infinite", "b", most, step=spoilt(2, infinite=True))
        yield number("more such steps than max_non_finite", "c", most, step=spoilt(2, 3))
        yield number("bf16-mixed", "d", "trainer.precision=bf16-mixed")
        refused = mock.Mock(side_effect=ConnectionError(f"api_key={KEY} was refused"))
        with mock.patch("wandb.init", refused):
            yield tracker("wandb cannot start, and says the key", "e")
        failing = mock.MagicMock()
        failing.log.side_effect = [None, None, *[ConnectionError("no route to host")] * 99]
        with mock.patch("wandb.init", return_value=failing):
            yield tracker("wandb fails in the middle", "f")
        yield tracker("wandb offline", "g")
        yield tracker("wandb's own process is killed in the middle", "h", step=kill_wandb)
        smoke("base", *LONG, "trainer.stop_at=4")
        for crash in CRASHES:
            yield crashed(*crash)
        yield two_at_once()


def number(fault: str, name: str, *words: str, step: Callable[..., Any] = NATIVE_STEP) -> Row:
    """A run with this fault must end with finite weights, and say which step it left out."""
    code, said = smoke(name, *words, step=step)
    message = first(said, "finite")
    weights = load_file(Path("runs", name, "weights.safetensors"))
    finite = all(bool(value.isfinite().all()) for value in weights.values())
    dumped = Path("runs", name, DUMP).exists() == bool(message) == (step is not NATIVE_STEP)
    lost = "none" if not message else "none: saved before" if code else "that step"
    handled = finite and dumped and code == ("more such" in fault)
    return Row(fault, "stopped" if code else "survived", lost, message, handled)


def tracker(fault: str, name: str, step: Callable[..., Any] = NATIVE_STEP) -> Row:
    """The numbers must be in the run's files whatever the tracker does, and the key nowhere."""
    code, said = smoke(name, "logger=wandb", "logger.mode=offline", step=step)
    message = first(said, "Weights & Biases")
    whole = code == 0 and steps_of(Path("runs", name)) == [1, 2, 3, 4]
    handled = whole and not first(said, KEY) and (bool(message) or name == "g")
    return Row(fault, "survived", "none", message, handled)


def steps_of(run: Path) -> list[int]:
    """Steps in the metrics."""
    return [line["step"] for line in read_lines(run / "metrics.jsonl")]


def kill_wandb(module: FineTuneModule, batch: CaptionBatch, number: int) -> dict[str, Any]:
    """The processes that wandb started die in the third batch."""
    for process in descendants(os.getpid()) if number == 2 else ():
        if b"wandb" in Path(f"/proc/{process}/cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)
    return NATIVE_STEP(module, batch, number)


def descendants(parent: int) -> Iterator[int]:
    """Processes below this one."""
    for listed in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in map(int, listed.read_text().split()):
            yield from descendants(child)
            yield child


def flipped(content: bytes) -> bytes:
    """One bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


CRASHES: tuple[tuple[str, str, Callable[[bytes], bytes]], ...] = (
    ("an empty config.yaml", "config.yaml", lambda content: b""),
    ("a cut config.yaml", "config.yaml", lambda content: b"optim: {lr: 1.0e-0"),
    ("an empty environment.json", "environment.json", lambda content: b""),
    ("zeros for environment.json", "environment.json", lambda content: bytes(len(content))),
    ("a broken last line of metrics.jsonl", "metrics.jsonl", lambda content: content + b'{"st\n'),
    ("an empty metrics.csv", "metrics.csv", lambda content: b""),
    ("an empty last.ckpt", "last.ckpt", lambda content: b""),
    ("a cut last.ckpt", "last.ckpt", lambda content: content[:-100]),
    ("a flipped bit in last.ckpt", "last.ckpt", flipped),
    ("cut weights.safetensors", "weights.safetensors", lambda content: content[:-1]),
)


def crashed(fault: str, name: str, harm: Callable[[bytes], bytes]) -> Row:
    """A run that was stopped after step 4, harmed, and is continued to step 6."""
    copies = fault.replace(" ", "_")
    run = Path(shutil.copytree("runs/base", f"{copies}/base"))
    (run / name).write_bytes(harm((run / name).read_bytes()))
    code, said = smoke("base", *LONG, "trainer.stop_at=6", "resume=auto", f"runs_dir={copies}")
    handled = code == 0 and steps_of(run) == [*range(1, 7)] and not first(said, "Traceback")
    lost = "none: steps taken again" if name == "last.ckpt" else "none"
    return Row(fault, "stopped" if code else "survived", lost, first(said, name), handled)


def two_at_once() -> Row:
    """One of two processes that resume a run must be refused, the other one finish it."""
    line = [sys.executable, "-m", "gradeclip_ft", *SMOKE, "name=base", *LONG, "resume=auto"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    start = partial(subprocess.Popen, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    both = [start(line, env={**os.environ, "PYTHONPATH": path}) for _ in range(2)]
    said = "".join(process.communicate()[1] for process in both)
    codes = sorted(process.returncode for process in both)
    once = steps_of(Path("runs/base")) == [*range(1, 41)]
    handled = codes[0] == 0 and codes[1] != 0 and once and "Traceback" not in said
    return Row(
        "two processes resume one run",
        "refused",
        "none",
        first(said.splitlines(), "error"),
        handled,
    )


# Safety: attacks through files, addresses and configurations, and leaks of secrets.

MARK = "attacked"
SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
SECRETS = {"STORE_SECRET": "correct-horse-battery", "WANDB_API_KEY": KEY}
URL = "https://me:tiger77@host/part-{0..3}.tar?X-Amz-Signature=5167beef"


class Attack:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {MARK}",)


def safety_rows(folder: Path) -> Iterator[Row]:
    """All of them; the working directory is `folder` meanwhile."""
    with contextlib.chdir(folder):
        for fault, attempt in ATTEMPTS.items():
            yield refused(fault, attempt)
        yield markup()
        yield leaks()


def refused(fault: str, attempt: Callable[[], object]) -> Row:
    """An attempt must end with an error, and without its mark."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            code = attempt()
    except Exception as error:
        message, stopped = str(error), True
    else:
        message, stopped = said.getvalue().removeprefix("error: "), code not in (None, 0)
    handled = stopped and not Path(MARK).exists() and "Traceback" not in message
    return Row(fault, "refused" if stopped else "survived", "none", message.strip(), handled)


def weights() -> object:
    """An attack as torch writes it."""
    torch.save({"state_dict": Attack()}, "weights.pt")
    return read_state("weights.pt")


def script() -> object:
    """A TorchScript archive."""
    torch.jit.script(torch.nn.Linear(2, 2)).save("script.pt")  # type: ignore[no-untyped-call]
    return read_state("script.pt")


def resume() -> int:
    """A checkpoint with code."""
    smoke("sent", *LONG, "trainer.stop_at=2")
    torch.save({"state_dict": {}, "loops": Attack()}, "runs/sent/last.ckpt")
    code, said = smoke("sent", *LONG, "resume=auto")
    print(*said, file=sys.stderr)
    return code


def wide() -> None:
    """A few bytes that claim four terabytes, with the names of a model."""
    model: Any = load_clip("shapes_tiny").require_clip("filled").model
    state = {**model.state_dict(), "visual.proj": torch.zeros(1).expand(10**12)}
    load_state(model, state, "wide.pt")


def command(*overrides: str) -> Callable[[], int]:
    """`train +exp=smoke` with these."""
    return partial(run, COMMANDS, ["train", "+exp=smoke", "name=x", *overrides])


def record(target: str, **arguments: Any) -> Callable[[], object]:
    """A run's record whose objective asks for another target inside."""
    options = "gradeclip_ft.losses.AlignmentOptions"
    node = {"_target_": options, "kind": {"_target_": target, **arguments}}
    return partial(make, OmegaConf.create(node), "alignment")


def metacharacters() -> int:
    """No program of that name is installed, or it gets the address as one word."""
    skips = Skips(tell=lambda cause, where, error: print(f"{where}: {error}", file=sys.stderr))
    with mock.patch.dict(os.environ, {"PATH": ""}):
        list(read_shard(f"s3://b/$(touch {MARK});`touch {MARK}`.tar", skips))
    return skips.total["unreadable_shard"]


def coco(text: str) -> object:
    """A file of captions."""
    Path("captions.json").write_text(text)
    return read_captions(Path("captions.json"))


def postscript() -> object:
    """A program named as a photo, and something that is called Ghostscript."""
    Path("a.jpg").write_bytes(EPS)
    Path("gs").write_text(f"#!/bin/sh\ntouch {Path(MARK).resolve()}\n")
    Path("gs").chmod(0o755)
    with mock.patch.dict(os.environ, {"PATH": f"{Path.cwd()}:{os.environ['PATH']}"}):
        return read_image(Path("a.jpg"))


def sent(**node: Any) -> Callable[[], int]:
    """A run that somebody sent, with a node in its model; `evaluate` and `explain` read it."""

    def read_it() -> int:
        smoke("given", "trainer.max_steps=2")
        cfg = recorded(compose("train", ["+exp=smoke"]))
        cfg["model"]["name"] = node
        Path("runs/given/config.yaml").write_text(json.dumps(cfg))
        Image.new("RGB", (64, 64)).save("a.png")
        commands = (["evaluate", "run=given"], ["explain", "run=given", "images=a.png"])
        return min(run(COMMANDS, words) for words in commands)

    return read_it


TWICE = {"images": [{"id": 1, "file_name": f"{name}.jpg"} for name in "ab"], "annotations": []}
SWEEP = ("+hydra.callbacks.x._target_=os.system", f"+hydra.callbacks.x.command='touch {MARK}'")
ATTEMPTS: dict[str, Callable[[], object]] = {
    "weights that run a command when unpickled": weights,
    "weights as TorchScript": script,
    "checkpoint to resume from that runs a command": resume,
    "weights of a few bytes that claim 4 TB": wide,
    "shards=pipe:COMMAND": lambda: expand_shards(f"pipe:touch {MARK}"),
    "an address with $(...) and backquotes": metacharacters,
    "model._target_=os.system": command("model._target_=os.system"),
    "a nested _target_": command("objective.explainer._target_=os.system"),
    "_target_ of a function of ours that writes": command(
        "model._target_=gradeclip_ft.results.record.write_atomically"
    ),
    "hydra.callbacks in a sweep": command("-m", "seed=0,1", *SWEEP),
    "two images with one id in a COCO file": lambda: coco(json.dumps(TWICE)),
    "100,000 brackets as annotations": lambda: coco("[" * 100_000),
    "EPS named .jpg": postscript,
    "a run's model.name that runs a command": sent(
        _target_="gradeclip_ft.data.captions.shard_sizes", urls=[f"pipe:touch {MARK}"]
    ),
    "a run's model.name that writes a file": sent(
        _target_="gradeclip_ft.results.record.write_atomically", path=MARK, text=""
    ),
    "os.system in the record of a run": record("os.system", command=f"touch {MARK}"),
    "builtins.eval in the record of a run": record("builtins.eval", _args_=["1"]),
}


def markup() -> Row:
    """Captions, phrases, names and notes that are HTML, on both kinds of pages."""
    heat = np.ones((1, 2, 2), dtype=np.float32)
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    case = Case(image=image, phrases=(SCRIPT,), heat={SCRIPT: heat}, caption=SCRIPT)
    table = Table(("metric",), (SCRIPT,), ({"metric": SCRIPT, SCRIPT: 0.5},), (SCRIPT,), (SCRIPT,))
    facts = {SCRIPT: {SCRIPT: SCRIPT}}
    page = Page(SCRIPT, SCRIPT, (SCRIPT,), table=table, cases=[case], facts=facts)
    text = write_page(page, Path("page.html")).read_text()
    shown = text.count("&lt;script&gt;alert(1)")
    handled = "<script>alert" not in text and "<img src=x" not in text and shown > 9
    fault = "captions, phrases, file names with <script>"
    return Row(fault, "survived", "none", f"shown {shown} times as text", handled)


def leaks() -> Row:
    """A run's record, an error and a traceback with passwords in their material."""
    said = io.StringIO()
    cfg = {"data": {"shards": URL}, "extra": {"api_key": "k-12345"}, "x": "${oc.env:STORE_SECRET}"}

    def fail() -> None:
        raise ValueError(f"cannot read {URL} with {SECRETS['WANDB_API_KEY']}")

    arguments = ["x", "train", f"data.shards={URL}"]
    with mock.patch.dict(os.environ, SECRETS), mock.patch.object(sys, "argv", arguments):
        secrets_of_environment.cache_clear()  # as in a process that was started with them
        runs.claim(Path("leaky"), OmegaConf.create(cfg))
        runs.record(Path("leaky"), {"data": {"where": URL}})
        with contextlib.redirect_stderr(said), masked_output():
            perform(fail, full=False)
            perform(fail, full=True)
    secrets_of_environment.cache_clear()
    text = said.getvalue() + "".join(path.read_text() for path in Path("leaky").iterdir())
    found = [word for word in (*SECRETS.values(), "tiger77", "5167beef", "k-12345") if word in text]
    shown = json.loads(Path("leaky/environment.json").read_text())["command"]
    fault = "passwords in addresses, keys and variables"
    return Row(fault, "survived", "none", shown, not found)


PARTS: dict[str, tuple[str, Callable[[Path], Iterator[Row]]]] = {
    "data": ("Data", data_rows),
    "remote": ("Remote shards", remote_rows),
    "runs": ("Runs and their files", runs_rows),
    "safety": ("Safety", safety_rows),
}

if __name__ == "__main__":
    sys.exit(perform(lambda: call(faults, sys.argv[1:]), full=wants_traceback()))
