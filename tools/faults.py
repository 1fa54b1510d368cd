"""Injects every fault that runs are meant to survive, and prints what happened.

    python -m tools.faults                           all, in a minute or two
    python -m tools.faults data out=table.md         one part: data, remote, numbers (with the
                                                     tracker), runs or safety

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
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import open_clip
import torch
import wandb
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from gradeclip_ft.__main__ import COMMANDS
from gradeclip_ft.batch import CaptionBatch
from gradeclip_ft.commands import runs
from gradeclip_ft.commands.build import make
from gradeclip_ft.commands.cli import call, run
from gradeclip_ft.commands.config import perform, wants_traceback
from gradeclip_ft.data.shards import Patience, Skips, expand_shards, read_shard
from gradeclip_ft.explain.grad_eclip import GradEclip
from gradeclip_ft.models.clip import Clip
from gradeclip_ft.models.weights import load_state, read_state
from gradeclip_ft.objectives.global_local import GlobalLocal
from gradeclip_ft.report.content import Case, Page
from gradeclip_ft.report.page import write_page
from gradeclip_ft.results.table import Table
from gradeclip_ft.training import loggers
from gradeclip_ft.training.callbacks import DUMP, NonFiniteError
from gradeclip_ft.training.data_module import CaptionDataModule
from gradeclip_ft.training.module import FineTuneModule
from gradeclip_ft.training.optim import adamw, warmup_cosine
from gradeclip_ft.training.run_files import read_lines
from gradeclip_ft.training.trainer import make_trainer
from tools.damage import BLOCK, DAMAGES, Damage, good, pack, source, tar_header

LONGEST = 150
SHARDS, SIZE = 4, 10
HIT = SIZE + SIZE // 2  # the sixth sample of the second shard
BOMB = 300 * 2**20


@dataclass(frozen=True)
class Row:
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
                lines.append(as_line(row, place))
                print(lines[-1], flush=True)
        lines.append("")
    lines.append(f"{total} faults, {unhandled} unhandled.")
    print(f"{lines[-1]} {time.perf_counter() - begun:.0f} s")
    if out is not None:
        out.write_text("\n".join(["# Injected faults", "", *lines]) + "\n", encoding="utf-8")
    return 1 if unhandled else 0


def as_line(row: Row, place: str) -> str:
    """Of a Markdown table."""
    message = " ".join(row.message.replace(place, "...").split()).replace("|", "\\|")
    message = message.replace("<", "&lt;")
    message = message if len(message) <= LONGEST else f"{message[: LONGEST - 3]}..."
    outcome = row.outcome if row.handled else f"**UNHANDLED** ({row.outcome})"
    return f"| {row.fault.replace('<', '&lt;')} | {outcome} | {row.lost} | {message} |"


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """Messages of the package."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("gradeclip_ft")
    log.addHandler(handler)
    log.propagate = False
    try:
        yield lines
    finally:
        log.removeHandler(handler)
        log.propagate = True


# Data: one broken thing among good samples, read by the loader of training.


def data_rows(folder: Path) -> Iterator[Row]:
    """Samples, then shards, then too much of it."""
    for damage in DAMAGES:
        write(folder, damage)
        seen, counts, message = read(folder)
        lost = set(range(SHARDS * SIZE)) - seen
        # slices are filled up by reading on from the start: a sample that comes twice counts twice
        handled = lost == (set() if damage.usable else {HIT}) and set(counts) == set(damage.causes)
        yield Row(damage.name, "survived", in_words(lost), message, handled)
    for name, change, lost in SHARD_FAULTS:
        path = write(folder)[1]
        before = [*folder.parent.iterdir(), *folder.parent.parent.glob("escaped*")]
        # late: after the loader has counted, as it happens in a run of days
        late = partial(damaged, path, change)
        if change is escape:
            late()
        seen, counts, message = read(folder, None if change is escape else late)
        gone = set(range(SHARDS * SIZE)) - seen
        told = bool(counts) == bool(message) and bool(message or not lost)
        around = [*folder.parent.iterdir(), *folder.parent.parent.glob("escaped*")] == before
        yield Row(name, "survived", in_words(gone), message, gone == lost and told and around)
    yield too_many(folder)


def write(folder: Path, damage: Damage | None = None) -> list[Path]:
    """Four shards of ten; one sample of the second is damaged."""
    paths = [folder / f"part-{shard}.tar" for shard in range(SHARDS)]
    for shard, path in enumerate(paths):
        numbers = range(shard * SIZE, (shard + 1) * SIZE)
        pack(path, ((f"{n:04d}", good(n), damage if n == HIT else None) for n in numbers))
    return paths


def read(
    folder: Path, before: Callable[[], object] | None = None
) -> tuple[set[int], Counter[str], str]:
    """Samples that came, counts by cause, and the first line of the log."""
    loader = source(str(folder)).loader(seed=0, epoch=0, rank=0, world_size=1)
    if before is not None:
        before()
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    with logged() as lines:
        for batch in loader:
            counts.update(batch.skipped)
            seen.update(int(key.split(":")[1]) for key in batch.keys)
    return seen, counts, lines[0] if lines else ""


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


def cut(content: bytes, at: int) -> bytes:
    """In the caption of the seventh sample."""
    return content[: content.index(b"0016.txt") + BLOCK + 5]


def bomb(content: bytes, at: int) -> bytes:
    """Packed zeros, as a file before the sixth sample."""
    parts = (content[:at] + tar_header("bomb.jpg", BOMB), bytes(BOMB), content[at:])
    return b"".join(gzip.compress(part, 1) for part in parts)


def escape(content: bytes, at: int) -> bytes:
    """An image and a pickle that would be written elsewhere."""
    body = good(15)["jpg"]
    image = tar_header("../../../escaped/0015.jpg", len(body)) + body + bytes(-len(body) % BLOCK)
    return image + tar_header("../evil.pkl", 4) + b"cos\n" + bytes(BLOCK - 4) + content


def claim(content: bytes, at: int) -> bytes:
    """A header of two terabytes before the sixth sample."""
    return content[:at] + tar_header("bomb.jpg", 2 * 10**12) + content[at:]


TAIL, ALL, ONE = set(range(16, 20)), set(range(10, 20)), {HIT}
SHARD_FAULTS: tuple[tuple[str, Callable[[bytes, int], bytes] | None, set[int]], ...] = (
    ("shard cut in the 7th of 10 samples", cut, TAIL),
    ("empty shard", lambda x, at: b"", ALL),
    ("shard of zeros", lambda x, at: bytes(20 * BLOCK), ALL),
    ("HTML instead of a shard", lambda x, at: b"<html>404</html>" * 99, ALL),
    ("shard that vanishes during the run", None, ALL),
    ("damaged tar header of an image", lambda x, at: x[:at] + b"\xcf" + x[at + 1 :], ONE),
    (
        "hole of zeros over an image",
        lambda x, at: x[:at] + bytes(3 * BLOCK) + x[at + 3 * BLOCK :],
        ONE,
    ),
    ("tar header that claims 2 TB", claim, set()),
    ("packed bomb: 300 MB of zeros in 1.3 MB", bomb, set()),
    (
        "the same sample twice in a row",
        lambda x, at: x[: x.index(b"0016.jpg")] + x[at:],
        set(),
    ),
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
    ("server that drips its headers", "drips", 0),
    ("connection that breaks off twice", "breaks", SIZE),
    ("redirect to a file of this machine", "away", 0),
)


class Server(http.server.BaseHTTPRequestHandler):
    """Behaves as the path says."""

    content = b""
    requests: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        """Answer."""
        self.requests[self.path] += 1
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        match self.path:
            case "/gone.tar":
                self._send(b"", 404)
            case "/busy.tar":
                self._send(self.content, 503 if self.requests[self.path] < 3 else 200)
            case "/down.tar":
                self._send(b"", 500)
            case "/silent.tar":
                time.sleep(1.0)
            case "/drips.tar":
                self.wfile.write(b"HTTP/1.0 200 OK\r\n")
                with contextlib.suppress(OSError):
                    for _ in range(100):
                        self.wfile.write(b"X-Drop: 1\r\n")
                        time.sleep(0.05)
            case "/breaks.tar":
                rest = self.content[start:]
                part = rest[: len(self.content) // 3 + 1]
                self._send(part, 206 if start else 200, len(rest), f"bytes {start}-")
                self.close_connection = True
            case "/away.tar":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()

    def _send(self, data: bytes, code: int, claimed: int | None = None, span: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data) if claimed is None else claimed))
        self.send_header("Content-Range", span)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def remote_rows(folder: Path) -> Iterator[Row]:
    """One shard from each server."""
    Server.content = write(folder)[0].read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        for name, path, wanted in REMOTE_FAULTS:
            with logged() as lines:
                url = f"http://127.0.0.1:{server.server_port}/{path}.tar"
                got = len(list(read_shard(url, Skips(), QUICK)))
            message = lines[0].replace(f":{server.server_port}", "") if lines else ""
            lost = "none" if got == SIZE else "all of that shard"
            yield Row(name, "survived", lost, message, got == wanted and bool(lines) == (got == 0))
        server.shutdown()
        thread.join()


# Numbers and the tracker, in runs of a CLIP of one layer.

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
STEPS, IMAGES = 6, 4


@dataclass
class Batches:
    """Random batches by number; some are broken."""

    broken: tuple[int, ...] = ()
    start: int = 0
    resampled: bool = False
    workers: int = 0
    batch_size: int = IMAGES

    def prepare(self) -> dict[str, Any]:
        """Nothing to do."""
        return {}

    def loader(
        self, *, seed: int, epoch: int, rank: int, world_size: int, start: int = 0
    ) -> Batches:
        """The batches from `start` on."""
        return replace(self, start=start)

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[CaptionBatch]:
        for number in range(self.start, STEPS):
            draw = torch.Generator().manual_seed(number)
            texts = torch.randint(1, 38, (IMAGES + 3, 8), generator=draw)
            texts[:, -1] = 39
            images = torch.randn(IMAGES, 3, 16, 16, generator=draw)
            images[0] += torch.nan if number in self.broken else 0.0
            yield CaptionBatch(
                images=images,
                captions=texts[:IMAGES],
                distinct=texts[IMAGES:],
                identity=torch.arange(3),
                phrase=torch.tensor([0, 1, 2]),
                owner=torch.tensor([0, 0, 2]),
                keys=tuple(f"batch{number}-{row}" for row in range(IMAGES)),
            )


class BrokenGradient(pl.Callback):
    """A finite loss with a gradient that is not."""

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At the third step."""
        gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
        if trainer.global_step == 2:
            gradient.view(-1)[0] = torch.inf


class Kill(pl.Callback):
    """Kills the processes that wandb started, after the second step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """When it is time."""
        if trainer.global_step == 2:
            for number, command in children(os.getpid()):
                if "wandb" in command:
                    os.kill(number, signal.SIGKILL)


def children(parent: int) -> list[tuple[int, str]]:
    """Processes below this one, with their command lines."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
        except (OSError, ValueError):
            continue
        if above == parent:
            found += [(int(entry.name), command), *children(int(entry.name))]
    return found


def train(
    folder: Path,
    *,
    broken: tuple[int, ...] = (),
    callbacks: tuple[pl.Callback, ...] = (),
    receivers: list[Logger] | None = None,
    checkpoint: Path | None = None,
    **options: Any,
) -> pl.Trainer:
    """Six steps."""
    torch.manual_seed(0)
    module = FineTuneModule(
        Clip(open_clip.CLIP(8, VISION, TEXT)),
        GlobalLocal(GradEclip()),
        optimizer=partial(adamw, lr=1e-3),
        schedule=partial(warmup_cosine, warmup=1, steps=STEPS),
    )
    receivers = loggers.files(folder, {}) if receivers is None else receivers
    settings = {"max_steps": STEPS, "log_every": 1, "checkpoint_every": 2, **options}
    trainer = make_trainer(folder, receivers, callbacks, **settings)
    data = CaptionDataModule(Batches(broken), seed=0)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer


def numbers_rows(folder: Path) -> Iterator[Row]:
    """Losses and gradients that are not finite, then every end of a tracker."""
    gradient = (BrokenGradient(),)
    yield number(folder / "a", "a batch whose loss is NaN", broken=(2,), most=1)
    yield number(folder / "b", "a gradient that is infinite", callbacks=gradient, most=1)
    yield number(folder / "c", "more such steps than max_non_finite", broken=(2, 3), most=1)
    yield number(folder / "d", "bf16-mixed", precision="bf16-mixed", most=0)
    with fake_wandb(start=ConnectionError("api_key=0123456789abcdef was refused")):
        yield tracker(folder / "f", "wandb cannot start, and says the key")
    with fake_wandb(log=ConnectionError("no route to host")):
        yield tracker(folder / "g", "wandb fails in the middle")
    yield tracker(folder / "h", "wandb offline")
    yield tracker(folder / "i", "wandb's own process is killed in the middle", kill=True)


def number(folder: Path, fault: str, *, most: int, **options: Any) -> Row:
    """A run with this fault."""
    message, outcome = "", "survived"
    with logged() as lines:
        try:
            trainer = train(folder, max_non_finite=most, **options)
            state = trainer.lightning_module.state_dict()
        except NonFiniteError as error:
            message, outcome = str(error).splitlines()[0], "stopped"
            state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    message = message or next((line for line in lines if "finite" in line), "")
    finite = all(bool(value.isfinite().all()) for value in state.values())
    dumped = (folder / DUMP).exists() == bool(message)
    handled = finite and dumped and (outcome == "stopped") == ("more such" in fault)
    lost = "none" if not message else "that step" if outcome == "survived" else "none: saved before"
    return Row(fault, outcome, lost, message.replace(str(folder), "runs/name"), handled)


def tracker(folder: Path, fault: str, *, kill: bool = False) -> Row:
    """A run that sends its numbers; they must be in its files whatever the tracker does."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        receivers = loggers.files_and_wandb(folder, {}, mode="offline")
        train(folder, receivers=receivers, callbacks=(Kill(),) if kill else ())
    said = [str(entry.message) for entry in seen if "sent" in str(entry.message)]
    steps = [line["step"] for line in read_lines(folder / "metrics.jsonl")]
    leaked = "0123456789abcdef" in "".join(said)
    handled = steps == [*range(1, STEPS + 1)] and len(said) <= 1 and not leaked
    return Row(fault, "survived", "none", said[0] if said else "", handled)


def fake_wandb(start: Exception | None = None, log: Exception | None = None) -> Any:
    """A tracker that fails in starting, or from the third step on."""
    calls = iter(range(1000))

    def fail(metrics: Mapping[str, float]) -> None:
        if log is not None and next(calls) >= 2:
            raise log

    def begin(**settings: Any) -> Any:
        if start is not None:
            raise start
        return SimpleNamespace(log=fail, finish=lambda exit_code: None)

    return mock.patch.object(wandb, "init", begin)


# Runs: what a crash leaves of their files, and a second process.

CRASHES: tuple[tuple[str, str, Callable[[bytes], bytes]], ...] = (
    ("an empty config.yaml", "config.yaml", lambda content: b""),
    ("a cut config.yaml", "config.yaml", lambda content: b"optim: {lr: 1.0e-0"),
    ("zeros for environment.json", "environment.json", lambda content: bytes(len(content))),
    ("a broken last line of metrics.jsonl", "metrics.jsonl", lambda content: content[:-9] + b"\n"),
    ("an empty metrics.csv", "metrics.csv", lambda content: b""),
    ("a cut last.ckpt", "last.ckpt", lambda content: content[:-100]),
    ("a flipped bit in last.ckpt", "last.ckpt", lambda content: flipped(content)),
    ("cut weights.safetensors", "weights.safetensors", lambda content: content[:-1]),
)


def flipped(content: bytes) -> bytes:
    """One bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def runs_rows(folder: Path) -> Iterator[Row]:
    """Each run is stopped after step 4 of 6, harmed, and resumed."""
    settings = {"optim": {"lr": 1e-3}}
    for number, (fault, name, harm) in enumerate(CRASHES):
        home = folder / str(number)
        runs.claim(home, settings)
        train(home, stop_at=4)
        (home / name).write_bytes(harm((home / name).read_bytes()))
        with logged() as lines:
            checkpoint = runs.claim(home, settings, resume="auto")
            train(home, checkpoint=checkpoint)
        steps = [line["step"] for line in read_lines(home / "metrics.jsonl")]
        lost = "none" if checkpoint == home / "last.ckpt" else "none: steps taken again"
        whole = [*range(1, STEPS + 1)]
        if name == "metrics.jsonl":  # the checkpoint has that step, so it is not taken again
            lost = "that line"
            whole.remove(4)
        handled = steps == whole and runs.resolve_weights(home).is_file()
        yield Row(fault, "survived", lost, "; ".join(lines), handled)
    home = folder / "busy"
    ready, done = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(home, done))
    holder.start()
    ready.recv()

    def second() -> None:
        with runs.locked(home):
            pass

    yield refused("a second process that resumes the run", second)
    holder.kill()
    holder.join()
    with runs.locked(home):
        yield Row("a killed process that held the run", "survived", "none", "", handled=True)


def hold(home: Path, done: Connection) -> None:
    """Hold a run until killed."""
    with runs.locked(home):
        done.send(True)
        time.sleep(600)


# Safety: attacks through files, addresses and configurations, and leaks of secrets.

MARK = "attacked"
SCRIPT = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
SECRETS = {"STORE_SECRET": "correct-horse-battery", "WANDB_API_KEY": "0123456789abcdef0123"}
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
    handled = stopped and not Path(MARK).exists()
    return Row(fault, "refused" if stopped else "survived", "none", message.strip(), handled)


def weights(content: object, name: str = "weights.pt") -> dict[str, Any]:
    """Written as torch writes it, then read."""
    torch.save(content, name)
    return read_state(name)


def script() -> object:
    """A TorchScript archive."""
    torch.jit.script(torch.nn.Linear(2, 2)).save("script.pt")  # type: ignore[no-untyped-call]
    return read_state("script.pt")


def resume() -> None:
    """A checkpoint with code."""
    torch.save({"state_dict": {}, "loops": Attack()}, "last.ckpt")
    train(Path("run"), checkpoint=Path("last.ckpt"))


def wide() -> None:
    """A few bytes that claim four terabytes, with the names of a model."""
    model: Any = open_clip.CLIP(8, VISION, TEXT)
    state = {**model.state_dict(), "visual.proj": torch.zeros(1).expand(10**12)}
    load_state(model, state, "wide.pt")


def command(*overrides: str) -> Callable[[], int]:
    """`train +exp=smoke` with these."""
    return lambda: run(COMMANDS, ["train", "+exp=smoke", "name=x", *overrides])


def record(target: str, **arguments: Any) -> Callable[[], object]:
    """A run's record whose objective asks for another target inside."""
    node = {"_target_": "gradeclip_ft.losses.AlignmentOptions"}
    return lambda: make(
        OmegaConf.create({**node, "kind": {"_target_": target, **arguments}}), "alignment"
    )


def metacharacters() -> int:
    """No program of that name is installed, or it gets the address as one word."""
    skips = Skips(tell=lambda cause, where, error: print(f"{where}: {error}", file=sys.stderr))
    with mock.patch.dict(os.environ, {"PATH": ""}):
        list(read_shard(f"s3://b/$(touch {MARK});`touch {MARK}`.tar", skips))
    return skips.total["unreadable_shard"]


SWEEP = ("+hydra.callbacks.x._target_=os.system", f"+hydra.callbacks.x.command='touch {MARK}'")
ATTEMPTS: dict[str, Callable[[], object]] = {
    "weights that run a command when unpickled": lambda: weights({"state_dict": Attack()}),
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
    "os.system in the record of a run": record("os.system", command=f"touch {MARK}"),
    "builtins.eval in the record of a run": record("builtins.eval", _args_=["1"]),
}


def markup() -> Row:
    """Captions, phrases, names and notes that are HTML, on both kinds of pages."""
    heat = np.ones((1, 2, 2), dtype=np.float32)
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    case = Case(image=image, phrases=(SCRIPT,), heat={SCRIPT: heat}, caption=SCRIPT)
    table = Table((SCRIPT,), (SCRIPT,), ({SCRIPT: SCRIPT},), (SCRIPT,), (SCRIPT,))
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
        runs.claim(Path("leaky"), OmegaConf.create(cfg))
        runs.record(Path("leaky"), {"data": {"where": URL}})
        with contextlib.redirect_stderr(said):
            perform(fail, full=False)
            perform(fail, full=True)
    text = said.getvalue() + "".join(path.read_text() for path in Path("leaky").iterdir())
    found = [word for word in (*SECRETS.values(), "tiger77", "5167beef", "k-12345") if word in text]
    shown = json.loads(Path("leaky/environment.json").read_text())["command"]
    fault = "passwords in addresses, keys and variables"
    return Row(fault, "survived", "none", shown, not found)


PARTS: dict[str, tuple[str, Callable[[Path], Iterator[Row]]]] = {
    "data": ("Data", data_rows),
    "remote": ("Remote shards", remote_rows),
    "numbers": ("Numbers and tracker", numbers_rows),
    "runs": ("Runs after a crash", runs_rows),
    "safety": ("Safety", safety_rows),
}

if __name__ == "__main__":
    sys.exit(perform(lambda: call(faults, sys.argv[1:]), full=wants_traceback()))
