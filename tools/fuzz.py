"""Mutated shards, samples, weights files and configurations: no unhandled error, no hang.

    python -m tools.fuzz cases=20000 seed=0
    python -m tools.fuzz only=4711 seed=0         one case again, with its traceback

A case depends on seed and number alone. It passes if the input is read, or refused by an error
that this package raises on purpose. It fails by any other error, by more than `seconds` of time or
1 GB of memory, by starting a program, and by opening a file outside its folder for writing. Inputs
of failed cases are kept in `out`. Exit code 1 if any failed.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from omegaconf import OmegaConf
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save as to_safetensors
from torch import Tensor

from gradeclip_ft.commands.build import make
from gradeclip_ft.commands.cli import call
from gradeclip_ft.commands.config import (
    ConfigurationError,
    check,
    compose,
    is_meant,
    perform,
    recorded,
    targets,
    wants_traceback,
)
from gradeclip_ft.data.captions import KEY, CaptionTrainData, read_batches
from gradeclip_ft.data.order import LoaderWorker
from gradeclip_ft.data.shards import RawSample, Skips, read_shard, sample_keys
from gradeclip_ft.models.clip import ImageTransform, Preprocessing
from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.models.weights import load_state, read_state
from gradeclip_ft.text.phrases import RULE, load_tagger
from tools.damage import BLOCK, DAMAGES, good, pack, png_of

# Random changes: each is decided by a generator alone.

SIZES = (b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"00000000000\0", b"9bad size!!\0")
# Start and length of the fields of a tar header; 156 is its type.
FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8))
TYPES = b"0\x001234567xgLKSDVMNX"
NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 1e308, float("nan"), float("inf"), 0.5)
WORDS = (
    *("", " ", "dog", "the red car", "\0", "\ud800", "é" * 50, "<script>", "../../etc"),
    *("{}", "${seed}", "${oc.env:HOME}", "a\nb", "\u202e", "[", "'", '"', "null", "[1,2]", "{a:1}"),
    "x" * 9000,
)
# What nobody's configuration may build.
FOREIGN = (
    *("os.system", "os.remove", "builtins.eval", "subprocess.Popen", "pathlib.Path.write_text"),
    *("gradeclip_ft.data.shapes.make_shapes", "gradeclip_ft.results.record.write_atomically"),
    *("gradeclip_ft.data.captions.shard_sizes", "gradeclip_ft.training.run_files.sweep"),
)
BUILT = ("data", "objective", "optim", "logger", "trainer")  # nodes; a model would be fetched
NAMES = ("captions", "phrases", "_target_", "_args_", "_partial_", "name", "tagger", "max", "x")
PIECES = ("a dog ", "the ", "(", "I ", "-", "0", "\u0301", "of the red ", "x")
LETTERS = "abc  .,-'\"()/&;:!?#\t\u00e9\u4e2d\U0001f600"


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """One to four random changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start, size = rng.randint(0, len(data)), rng.choice((1, 3, 16, 512, 5000))
        match rng.randrange(7):
            case 0 | 1:
                changed = bytearray(data)
                for _ in range(rng.choice((1, 2, 8, 32)) if data else 0):
                    where = rng.randrange(len(data))
                    changed[where] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
                data = bytes(changed)
            case 2:
                data = data[:start]
            case 3:
                data = data[min(start, 2000) :]
            case 4:  # a hole
                fill = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), b""))
                data = data[:start] + fill + data[start + size :]
            case 5:
                data = data[:start] + rng.randbytes(size) + data[start:]
            case _:
                data = data[:start] + data[start : start + size] * rng.randint(2, 20) + data[start:]
    return data


def tar_changed(data: bytes, rng: random.Random) -> bytes:
    """Fields of headers changed, most with a checksum that is right again."""
    changed = bytearray(data)
    headers = range(0, len(data) - BLOCK, BLOCK)
    starts = [at for at in headers if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 2, 5)) if starts else 0):
        at = rng.choice(starts)
        start, size = rng.choice(FIELDS)
        value = rng.choice((rng.randbytes(size), bytes(size), rng.choice(SIZES), b"../" * 60))
        value = bytes([rng.choice(TYPES)]) if start == 156 else value
        changed[at + start : at + start + size] = value[:size].ljust(size, b"\0")
        if rng.random() < 0.85:
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + BLOCK])
    return bytes(changed)


def text(rng: random.Random) -> str:
    """Some text, more often a strange one."""
    match rng.randrange(5):
        case 0:
            return rng.choice(WORDS)
        case 1:
            return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(60)))
        case 2:
            return rng.choice(PIECES) * rng.choice((10, 400, 2000))
        case kind:
            start = "a photo of a dog and " if kind == 3 else ""
            return start + "".join(rng.choices(LETTERS, k=rng.randrange(300)))


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything JSON or YAML can say."""
    match rng.randrange(6 if depth < 4 else 3):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice((None, True, False))
        case 2:
            return text(rng)
        case 3:
            return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(NAMES): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def changed(node: Any, rng: random.Random) -> Any:
    """A copy of a container with something deleted, replaced or added somewhere inside."""
    node = place = json.loads(json.dumps(node))
    while rng.random() < 0.75:
        children = place.values() if isinstance(place, dict) else place
        inner = [child for child in children if child and isinstance(child, dict | list)]
        if not inner:
            break
        place = rng.choice(inner)
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if keys and rng.random() < 0.3:
        del place[rng.choice(keys)]
    elif keys and rng.random() < 0.7:
        place[rng.choice(keys)] = value(rng)
    elif isinstance(place, dict):
        place[rng.choice((*WORDS[2:8], "_target_", "_args_", "defaults"))] = value(rng)
    else:
        place.append(value(rng))
    return node


# Shards and samples: whatever is in them, batches come, and counting agrees.

FOUND = {"a dog": ["dog"], "a cat": ["black cat", "tail"]}
STORED = {"rule": RULE, "tagger": "textblob", "max_phrases": 5, "found": FOUND}
RECORD = {"captions": ["a dog", "a cat"], KEY: STORED}
WORKER, BATCH = LoaderWorker(0, 0, 0, 1, 0, 1), 6
SUFFIXES = ("jpg", "png", "webp", "txt", "text", "json", "cls", "pyd", "pkl", "JPG", "x.jpg")


@cache
def settings() -> CaptionTrainData:
    """As in training: CLIP's tokenizer, phrases, captions from JSON as well."""
    return CaptionTrainData(
        shards="input.tar",
        tokenizer=Tokenizer(SimpleTokenizer(), 77),
        transform=ImageTransform((16, 16), Preprocessing(), train=True),
        batch_size=BATCH,
        caption="any",
        tagger="textblob",
    )


def shard_input(rng: random.Random, folder: Path) -> Path:
    """A small shard, damaged in its bytes or headers."""
    path = folder / "input.tar"
    rows = []
    for number in range(rng.randint(1, 5)):
        files = {**good(number), "json": b'{"captions": ["a dog"]}'}
        rows.append((f"{number:04d}", files, rng.choice(DAMAGES) if rng.random() < 0.3 else None))
    pack(path, rows)
    data = (tar_changed if rng.random() < 0.6 else bytes_changed)(path.read_bytes(), rng)
    if rng.random() < 0.15:
        data = gzip.compress(data, 1)
        data = bytes_changed(data, rng) if rng.random() < 0.7 else data
    path.write_bytes(data)
    return path


def run_shard(path: Path) -> str:
    """Read it as training does; count it as the splitter does."""
    skips = Skips(tell=lambda *_: None)
    raws = list(read_shard(str(path), skips))
    counted, keys = sample_keys(str(path)), [raw["__key__"] for raw in raws]
    if counted != keys:
        raise AssertionError(f"counted {counted}, read {keys}")
    return one_batch(raws, skips)


def sample_input(rng: random.Random, folder: Path) -> Path:
    """One sample as a folder of its files would hold it, in one JSON of hexadecimal strings."""
    files = {"jpg": image(rng), "txt": text(rng).encode("utf-8", "surrogatepass")}
    if rng.random() < 0.5:
        files["json"] = json.dumps(changed(RECORD, rng)).encode()
    if rng.random() < 0.3:
        files["txt"] = bytes_changed(files["txt"], rng)
    if rng.random() < 0.2:
        files["json"] = bytes_changed(files.get("json", b'{"captions": []}'), rng)
    if rng.random() < 0.2:
        files[rng.choice(SUFFIXES)] = rng.randbytes(rng.randrange(200))
    path = folder / "input.json"
    path.write_text(json.dumps({name: data.hex() for name, data in files.items()}))
    return path


def run_sample(path: Path) -> str:
    """The sample among good ones."""
    files = {name: bytes.fromhex(data) for name, data in json.loads(path.read_text()).items()}
    raw = {"__key__": "input", "__url__": "input.tar", **files}
    return one_batch([raw], Skips(tell=lambda *_: None))


def image(rng: random.Random) -> bytes:
    """An image file, most of them damaged."""
    kind = rng.choice(("jpeg", "png", "webp", "gif", "bmp", "tiff", "claim"))
    if kind == "claim":
        width, height = (rng.choice((0, 1, 7, 4000, 70_000, 2**31 - 1)) for _ in range(2))
        name = rng.choice((b"tEXt", b"zTXt", b"iCCP", b"tRNS", b"gAMA", b"eXIf", b"acTL", b"PLTE"))
        return png_of(width, height, (name, rng.randbytes(rng.randrange(300))), pixels=False)
    modes = {"jpeg": ("RGB", "L", "CMYK"), "png": ("RGB", "L", "1"), "tiff": ("L", "CMYK", "1")}
    picture = Image.effect_noise((rng.randint(1, 40), rng.randint(1, 40)), 50)
    content = io.BytesIO()
    options = {"progressive": True} if kind == "jpeg" and rng.random() < 0.5 else {}
    picture.convert(rng.choice(modes.get(kind, ("RGB", "L")))).save(content, kind, **options)
    return bytes_changed(content.getvalue(), rng) if rng.random() < 0.9 else content.getvalue()


def one_batch(raws: list[RawSample], skips: Skips) -> str:
    """One batch of all usable samples, filled up with good ones."""
    fill: list[RawSample] = [
        {"__key__": f"fill{number}", "__url__": "fill.tar", **good(number)}
        for number in range(BATCH)
    ]
    stream = itertools.chain(raws, fill)
    (batch,) = read_batches(settings(), "textblob", stream, WORKER, skips, first=0, count=1)
    used = sum(not key.startswith("fill.tar") for key in batch.keys)
    if not (batch.images.isfinite().all() and len(batch.keys) == BATCH == len(batch.captions)):
        raise AssertionError(f"a broken batch: {batch}")
    return f"{'all' if used == len(raws) else 'some' if used else 'none'} usable"


# Weights files: they load, or one documented error says why not.

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
NESTED = (
    *("state_dict", "model", "module", "epoch", "visual.blocks.0.x"),
    "vision_model.embeddings.class_embedding",
)
CALLS: tuple[tuple[Callable[..., object], tuple[Any, ...]], ...] = (
    (os.system, ("touch fuzz-was-here",)),
    (eval, ("open('fuzz-was-here', 'w')",)),
    (exec, ("import os; os.system('touch fuzz-was-here')",)),
    (torch.load, ("/etc/passwd",)),
    (torch.zeros, ((2**40,),)),
    (OrderedDict, (5,)),
    (bytearray, (2**45,)),
)


@cache
def model() -> Any:
    """A CLIP of one layer."""
    torch.manual_seed(0)
    return open_clip.CLIP(8, VISION, TEXT)


class Hostile:
    """Unpickles to a call."""

    def __init__(self, rng: random.Random) -> None:
        self.call = rng.choice(CALLS)

    def __reduce__(self) -> Any:
        return self.call


def checkpoint_input(rng: random.Random, folder: Path) -> Path:
    """A weights file with other content, a damaged one, or one that attacks."""
    state = state_changed(rng)
    tensors = {
        key: x.contiguous().clone() if x.numel() < 10**6 else torch.zeros(1)
        for key, x in state.items()
        if isinstance(key, str) and isinstance(x, Tensor) and x.layout == torch.strided
    }
    if len(tensors) == len(state) and rng.random() < 0.45:
        path, data = folder / "input.safetensors", to_safetensors(tensors)
        if rng.random() < 0.4:
            size = int.from_bytes(data[:8], "little")
            header = json.dumps(changed(json.loads(data[8 : 8 + size]), rng)).encode()
            claims = (0, 2**40, 2**64 - 1, 10**8)
            claimed = len(header) if rng.random() < 0.9 else rng.choice(claims)
            data = claimed.to_bytes(8, "little") + header + data[8 + size :]
    else:
        path, data = folder / rng.choice(("input.pt", "input.ckpt", "input.bin")), saved(state, rng)
    path.write_bytes(bytes_changed(data, rng) if rng.random() < 0.6 else data)
    return path


def state_changed(rng: random.Random) -> dict[Any, Any]:
    """The model's, with up to two entries changed."""
    state: dict[Any, Any] = {key: value.clone() for key, value in model().state_dict().items()}
    for _ in range(rng.choice((0, 0, 1, 2))):
        key = rng.choice(list(state))
        old = state[key]
        if isinstance(old, Tensor) and old.numel() > 10**6:
            continue  # claims terabytes already
        kinds = (torch.half, torch.int8, torch.complex64, torch.bool)
        match rng.randrange(8):
            case 0:
                del state[key]
            case 1:
                state[rng.choice((*NESTED, 3, None, key + ".x"))] = state.pop(key)
            case 2:
                state[key] = torch.full((rng.choice((0, 1, 5)),) * rng.randrange(4), torch.nan)
            case 3:
                state[key] = torch.zeros(1).expand(rng.choice((10**9, 10**12)), 16)
            case 4 if isinstance(old, Tensor):
                state[key] = old.to(rng.choice(kinds))
            case 5:
                state[key] = rng.choice((1, "x", None, [old], {"a": old}))
            case 6:
                state[key] = torch.eye(4).to_sparse()
            case _:
                state[key] = torch.full((2, 2), torch.inf)
    return state


def saved(state: dict[Any, Any], rng: random.Random) -> bytes:
    """As torch or pickle writes it; some with damage inside, packed again with right checksums."""
    content: Any = {rng.choice(NESTED): state, "epoch": 3} if rng.random() < 0.4 else state
    if rng.random() < 0.2:
        content = {**content, "hyper_parameters": Hostile(rng)}
    if rng.random() < 0.1:
        return pickle.dumps(content, protocol=rng.choice((0, 2, 4)))
    file, out = io.BytesIO(), io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    if not zipfile.is_zipfile(file) or rng.random() < 0.5:
        return file.getvalue()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = rng.choice([name for name in names if name.endswith("data.pkl")] + names[:3])
        for name in names:
            data = old.read(name)
            new.writestr(name, bytes_changed(data, rng) if name == chosen else data)
    return out.getvalue()


def run_checkpoint(path: Path) -> str:
    """Read and load; whoever is refused must leave the model as it was."""
    load_state(model(), read_state(path), str(path))
    if any(not value.isfinite().all() for value in model().state_dict().values()):
        raise AssertionError("values that are not finite were loaded")
    return "loaded"


# Configurations: those of a run, as somebody else may have written them, and command lines.


@cache
def known() -> dict[str, Any]:
    """A good one."""
    return recorded(compose("train", ["name=a"]))


def config_input(rng: random.Random, folder: Path) -> Path:
    """Up to four changes; in every second one a node that builds something is hidden."""
    node = known()
    for _ in range(rng.choice((1, 1, 2, 4))):
        node = changed(node, rng)
    if rng.random() < 0.5:
        place = node[rng.choice([key for key in node if isinstance(node[key], dict)] or ["x"])]
        while (inner := [x for x in place.values() if x and isinstance(x, dict)]) and (
            rng.random() < 0.5
        ):
            place = rng.choice(inner)
        hidden = {"_target_": rng.choice((*FOREIGN, *targets())), "_partial_": rng.random() < 0.3}
        place[rng.choice([*place, "x"])] = hidden | {rng.choice(NAMES): value(rng)}
    path = folder / "input.yaml"
    path.write_text(json.dumps(node))
    return path


def run_config(path: Path) -> str:
    """Read, check, write into a record, and build what commands build from the record of a run."""
    try:
        cfg = OmegaConf.create(json.loads(path.read_text()))
    except Exception as error:  # not ours: it is not a configuration at all
        return f"no yaml: {type(error).__name__}"
    check(cfg, "train")
    recorded(cfg)
    for key in BUILT:
        make(cfg[key], key)
    return "accepted"


def override_input(rng: random.Random, folder: Path) -> Path:
    """Arguments of a command line."""
    keys = [*dotted(known()), "exp", "data", "hydra.run.dir", "model", "trainer", "data._target_"]
    chosen = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(keys)
        if rng.random() < 0.3:
            key = bytes_changed(key.encode(), rng).decode("utf-8", "replace")
        if rng.random() < 0.2:
            key += rng.choice((".x", "._target_", "@y", "[0]"))
        word = str(value(rng)) if rng.random() < 0.7 else text(rng)
        chosen.append(f"{rng.choice(('', '', '', '+', '++', '~'))}{key}={word[:200]}")
    path = folder / "input.json"
    path.write_text(json.dumps(chosen))
    return path


def run_override(path: Path) -> str:
    """Compose and check."""
    check(compose("train", ["name=a", *json.loads(path.read_text())]), "train")
    return "accepted"


def dotted(node: dict[str, Any], start: str = "") -> Iterator[str]:
    """All keys, with those above them."""
    for key, child in node.items():
        yield start + key
        if isinstance(child, dict):
            yield from dotted(child, f"{start}{key}.")


# The campaign.

PROGRAMS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork")
FORBIDDEN = (*PROGRAMS, "socket.connect")
IDLE = 10  # times as much of the clock as of the processor: the machine may be busy
MOST_GROWTH, MOST_MEMORY = 10**9, 6 * 10**9  # bytes: of one case, and of what it may claim


class Kind(NamedTuple):
    """How inputs of a kind are made, and what is done with them."""

    name: str
    share: int
    make: Callable[[random.Random, Path], Path]
    run: Callable[[Path], str]


DECK = tuple(
    kind
    for kind in (
        Kind("sample", 14, sample_input, run_sample),
        Kind("shard", 12, shard_input, run_shard),
        Kind("checkpoint", 9, checkpoint_input, run_checkpoint),
        Kind("config", 4, config_input, run_config),
        Kind("override", 1, override_input, run_override),
    )
    for _ in range(kind.share)
)


class BreachError(BaseException):
    """A case does what no input may cause, or hangs; no `except Exception` can hold it up."""


def fuzz(
    *,
    cases: int = 20_000,
    seed: int = 0,
    seconds: float = 10.0,
    only: int | None = None,
    out: Path = Path("fuzz_failures"),
) -> int:
    """Run the cases and print what became of them; see the module.

    cases=20000          how many
    seed=0               of all of them
    seconds=10           of the processor a case may take, and ten times as many of the clock
    only=                number of one case to run again
    out=fuzz_failures    for inputs of failed cases
    """
    watch = _Watch()
    outcomes: dict[str, Counter[str]] = {kind.name: Counter() for kind in DECK}
    failed, slowest, begun = 0, (0.0, 0), time.perf_counter()
    settings(), model(), load_tagger("textblob")  # before the clock of a case runs
    with tempfile.TemporaryDirectory() as place:
        for number in range(cases) if only is None else (only,):
            started, kind = time.perf_counter(), DECK[number % len(DECK)]
            outcome, report = one(kind, f"{seed}/{number}", Path(place), watch, seconds)
            slowest = max(slowest, (time.perf_counter() - started, number))
            outcomes[kind.name][outcome] += 1
            if report is not None:
                failed += 1
                kept = out / f"{number}-{kind.name}"
                shutil.copytree(place, kept, dirs_exist_ok=True)
                (kept / "report.txt").write_text(report)
                print(f"case {number} ({kind.name}): {outcome}\n{report}", flush=True)
    for name, counts in outcomes.items():
        words = ", ".join(f"{outcome} {times:,}" for outcome, times in counts.most_common())
        print(f"{name:<11}{counts.total():>7,}  {words}")
    total = sum(counts.total() for counts in outcomes.values())
    print(f"{total:,} cases, seed {seed}, {time.perf_counter() - begun:.0f} s; {failed} failed")
    print(f"slowest: {slowest[0]:.1f} s, case {slowest[1]}")
    return 1 if failed else 0


def one(
    kind: Kind, seed: str, folder: Path, watch: _Watch, seconds: float
) -> tuple[str, str | None]:
    """Outcome, and a report if it failed."""
    for old in folder.iterdir():
        old.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = kind.make(random.Random(seed), folder)
        try:
            with watch(folder), limited(seconds), frugal():
                return kind.run(path), None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if isinstance(error, Exception) and (
                isinstance(error, ConfigurationError) or is_meant(error)
            ):
                return f"refused by {type(error).__name__}", None
            return "FAILED", "".join(traceback.format_exception(error))


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """At most so many of the processor, and ten times as many of the clock."""

    def ring(*_: Any) -> None:
        raise BreachError(f"more than {seconds:g} s")

    clocks = {signal.SIGPROF: signal.ITIMER_PROF, signal.SIGALRM: signal.ITIMER_REAL}
    before = {number: signal.signal(number, ring) for number in clocks}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, IDLE * seconds)
    try:
        yield
    finally:
        for number, clock in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])


@contextlib.contextmanager
def frugal() -> Iterator[None]:
    """The largest memory of the process must not grow by much; claims beyond all reason fail."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before, (soft, hard) = peak(), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if peak() - before > MOST_GROWTH:
        raise BreachError(f"needs {(peak() - before) / 1e9:.1f} GB")


class _Watch:
    """Programs started, connections, and files opened for writing elsewhere are breaches."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        sys.addaudithook(self._hook)  # for good: it cannot be taken off, only look away

    @contextlib.contextmanager
    def __call__(self, folder: Path) -> Iterator[None]:
        """Look, while an input in this folder is read."""
        self._folder = folder.resolve()
        try:
            yield
        finally:
            self._folder = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        folder = self._folder
        if folder is None:
            return
        if event in FORBIDDEN:
            raise BreachError(f"{event} {arguments}")
        if event != "open" or not isinstance(arguments[1], str):
            return
        path = Path(str(arguments[0]))
        if set(arguments[1]) & set("wax+") and path.parts[:2] != ("/", "dev"):
            self._folder = None  # resolving must not be watched
            inside = path.resolve().is_relative_to(folder)
            self._folder = folder
            if not inside:
                raise BreachError(f"opens {path} for writing")


if __name__ == "__main__":
    sys.exit(perform(lambda: call(fuzz, sys.argv[1:]), full=wants_traceback()))
