"""Mutated shards, samples, weights files and configurations: no unhandled error, no hang.

    python -m tools.fuzz cases=20000 seed=0
    python -m tools.fuzz only=4711 seed=0         one case again, with its traceback

A case depends on seed and number alone. It passes if the input is read, or refused by an error
that this package raises on purpose. It fails by any other error, by more than a minute of time or
1 GB of memory, by starting a program, and by opening a file outside its folder for writing. Inputs
of failed cases are kept in `out`. Exit code 1 if any failed.
"""

from __future__ import annotations

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
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from omegaconf import OmegaConf
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save as to_safetensors

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
from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.models.weights import load_state, read_state
from gradeclip_ft.text.phrases import RULE, load_tagger
from tools.damage import BLOCK, DAMAGES, good, pack, png_of, source

# Random changes: each is decided by a generator alone.

SIZES = (b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"00000000000\0", b"9bad size!!\0")
# Start and length of the fields of a tar header; 156 is its type.
FIELDS = ((0, 100), (100, 8), (124, 12), (136, 12), (148, 8), (156, 1), (157, 100), (257, 8))
TYPES = b"0\x001234567xgLKSDVMNX"
SCALARS = (None, True, 0, -1, 2**31, 2**63, -(2**63), 1e308, float("nan"), float("inf"), 0.5)
WORDS = (
    *("", " ", "dog", "the red car", "\0", "\ud800", "é" * 50, "<script>", "../../etc", "x" * 9000),
    *("{}", "${seed}", "${oc.env:HOME}", "a\nb", "\u202e", "[", "'", '"', "null", "[1,2]", "{a:1}"),
    *("a dog " * 2000, "(" * 400, "\u0301" * 400, "of the red " * 400),
)
# What nobody's configuration may build.
FOREIGN = (
    *("os.system", "os.remove", "builtins.eval", "subprocess.Popen", "pathlib.Path.write_text"),
    *("gradeclip_ft.data.shapes.make_shapes", "gradeclip_ft.results.record.write_atomically"),
    *("gradeclip_ft.data.captions.shard_sizes", "gradeclip_ft.training.run_files.sweep"),
)
NAMES = ("captions", "phrases", "_target_", "_args_", "_partial_", "defaults", "tagger", "max", "x")
LETTERS = "abc  .,-'\"()/&;:!?#\t\u00e9\u4e2d\U0001f600"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four stretches replaced, inserted, repeated or cut."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start, size = rng.randint(0, len(data)), rng.choice((1, 1, 3, 16, 512, 5000))
        repeated = data[start : start + size] * rng.randint(2, 20)
        fills = (
            b"",
            bytes(size),
            b"\xff" * size,
            rng.randbytes(size),
            rng.randbytes(size),
            repeated,
        )
        end = start + rng.choice((0, size, size, len(data)))
        data = data[:start] + rng.choice(fills) + data[end:]
    return data


def tar_mutated(data: bytes, rng: random.Random) -> bytes:
    """Fields of headers changed, most with a checksum that is right again."""
    changed = bytearray(data)
    headers = range(0, len(data) - BLOCK, BLOCK)
    starts = [at for at in headers if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, (start, size) = rng.choice(starts), rng.choice(FIELDS)
        value = rng.choice((rng.randbytes(size), bytes(size), rng.choice(SIZES), b"../" * 60))
        value = bytes([rng.choice(TYPES)]) if start == 156 else value
        changed[at + start : at + start + size] = value[:size].ljust(size, b"\0")
        if rng.random() < 0.85:
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + BLOCK])
    return bytes(changed)


def text(rng: random.Random) -> str:
    """Some text, more often a strange one."""
    strange = "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(60)))
    plain = "".join(rng.choices(LETTERS, k=rng.randrange(300)))
    return rng.choice((rng.choice(WORDS), strange, plain, f"a photo of a dog and {plain}"))


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything JSON or YAML can say; some of it asks to be built."""
    match rng.randrange(6 if depth < 4 else 2):
        case 0:
            return rng.choice(SCALARS)
        case 1:
            return text(rng)
        case 2:
            return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 3:
            target = {"_target_": rng.choice((*FOREIGN, *targets()))}
            return target | {rng.choice(NAMES): value(rng, depth + 1)}
    return {rng.choice(NAMES): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def node_changed(node: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy with something deleted, replaced or added somewhere inside."""
    place: Any
    node = place = json.loads(json.dumps(node))
    while rng.random() < 0.75:
        children = place.values() if isinstance(place, dict) else place
        inner = [child for child in children if child and isinstance(child, dict | list)]
        if not inner:
            break
        place = rng.choice(inner)
    keys = list(place if isinstance(place, dict) else range(len(place)))
    if keys and rng.random() < 0.3:
        del place[rng.choice(keys)]
    elif keys and rng.random() < 0.7:
        place[rng.choice(keys)] = value(rng)
    elif isinstance(place, dict):
        place[rng.choice((*NAMES, *WORDS[2:8]))] = value(rng)
    else:
        place.append(value(rng))
    return node


# Shards and samples: whatever is in them, batches come, and counting agrees.

FOUND = {"a dog": ["dog"], "a cat": ["black cat", "tail"]}
STORED = {"rule": RULE, "tagger": "textblob", "max_phrases": 5, "found": FOUND}
RECORD = {"captions": ["a dog", "a cat"], KEY: STORED}
BATCH = 6
SUFFIXES = ("jpg", "png", "webp", "txt", "text", "json", "cls", "pyd", "pkl", "JPG", "x.jpg")


@cache
def settings() -> CaptionTrainData:
    """As in training: CLIP's tokenizer, phrases, captions from JSON as well."""
    plain = source("input.tar", batch_size=BATCH, caption="any")
    return replace(plain, tokenizer=Tokenizer(SimpleTokenizer(), 77))


def shard_input(rng: random.Random, folder: Path) -> Path:
    """A small shard, damaged in its bytes or headers, some of them packed."""
    path = folder / "input.tar"
    rows = []
    for number in range(rng.randint(1, 5)):
        files = {**good(number), "json": b'{"captions": ["a dog"]}'}
        rows.append((f"{number:04d}", files, rng.choice(DAMAGES) if rng.random() < 0.3 else None))
    pack(path, rows)
    data = (tar_mutated if rng.random() < 0.6 else mutated)(path.read_bytes(), rng)
    if rng.random() < 0.15:
        data = mutated(gzip.compress(data, 1), rng)
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
        files["json"] = json.dumps(node_changed(RECORD, rng)).encode()
    if rng.random() < 0.3:
        name = rng.choice(list(files))
        files[name] = mutated(files[name], rng)
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
        return png_of(width, height, (name, rng.randbytes(rng.randrange(300))))
    modes = {"jpeg": ("RGB", "L", "CMYK"), "png": ("RGB", "L", "1"), "tiff": ("L", "CMYK", "1")}
    picture = Image.effect_noise((rng.randint(1, 40), rng.randint(1, 40)), 50)
    content = io.BytesIO()
    progressive = {"progressive": True} if kind == "jpeg" and rng.random() < 0.5 else {}
    picture.convert(rng.choice(modes.get(kind, ("RGB", "L")))).save(content, kind, **progressive)
    return mutated(content.getvalue(), rng) if rng.random() < 0.9 else content.getvalue()


def one_batch(raws: list[RawSample], skips: Skips) -> str:
    """One batch of all usable samples, filled up with good ones."""
    fill = ({"__key__": f"{n}", "__url__": "fill.tar", **good(n)} for n in range(BATCH))
    stream, worker = itertools.chain(raws, fill), LoaderWorker(0, 0, 0, 1, 0, 1)
    (batch,) = read_batches(settings(), "textblob", stream, worker, skips, first=0, count=1)
    used = sum(not key.startswith("fill.tar") for key in batch.keys)
    if not (batch.images.isfinite().all() and len(batch.keys) == BATCH == len(batch.captions)):
        raise AssertionError(f"a broken batch: {batch}")
    return f"{'all' if used == len(raws) else 'some' if used else 'none'} usable"


# Weights files: they load, or one documented error says why not.

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
NESTED = ("state_dict", "model", "module", "epoch", "vision_model.embeddings.class_embedding")
CALLS: tuple[tuple[Callable[..., object], tuple[Any, ...]], ...] = (
    (os.system, ("touch fuzz-was-here",)),
    (eval, ("open('fuzz-was-here', 'w')",)),
    (torch.load, ("/etc/passwd",)),
    (torch.zeros, ((2**40,),)),
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
    state: dict[Any, Any] = {key: tensor.clone() for key, tensor in model().state_dict().items()}
    if rng.random() < 0.4:
        tensors = {key: tensor.contiguous() for key, tensor in state.items()}
        path, data = folder / "input.safetensors", to_safetensors(tensors)
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(node_changed(json.loads(data[8 : 8 + size]), rng)).encode()
        claimed = rng.choice((*[len(header)] * 9, 0, 2**40, 2**64 - 1))
        data = claimed.to_bytes(8, "little") + header + data[8 + size :]
    else:
        for key in rng.sample(list(state), rng.choice((0, 0, 1, 2))):
            state_changed(state, key, rng)
        path, data = folder / rng.choice(("input.pt", "input.ckpt", "input.bin")), saved(state, rng)
    path.write_bytes(mutated(data, rng) if rng.random() < 0.6 else data)
    return path


def state_changed(state: dict[Any, Any], key: str, rng: random.Random) -> None:
    """One entry becomes another one, gets another name, or goes."""
    old = state.pop(key)
    others = (
        *(old.to(kind) for kind in (torch.half, torch.int8, torch.complex64, torch.bool)),
        *(torch.zeros(1).expand(size, 16) for size in (10**9, 10**12)),
        *(torch.full(size, torch.nan) for size in ((), (0,), (5,), (5, 5), (1, 1, 1))),
        *(torch.eye(4).to_sparse(), torch.full((2, 2), torch.inf), 1, "x", None, [old], {"a": old}),
    )
    match rng.randrange(4):
        case 0 | 1:
            state[key] = rng.choice(others)
        case 2:
            state[rng.choice((*NESTED, 3, None, key + ".x"))] = old


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
        chosen = rng.choice([name for name in old.namelist() if "data/" not in name])
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, mutated(data, rng) if name == chosen else data)
    return out.getvalue()


def run_checkpoint(path: Path) -> str:
    """Read and load; whoever is refused must leave the model as it was."""
    load_state(model(), read_state(path), str(path))
    if any(not tensor.isfinite().all() for tensor in model().state_dict().values()):
        raise AssertionError("values that are not finite were loaded")
    return "loaded"


# Configurations: those of a run, as somebody else may have written them, and command lines.


@cache
def known() -> dict[str, Any]:
    """A good one."""
    return recorded(compose("train", ["name=a"]))


def config_input(rng: random.Random, folder: Path) -> Path:
    """Up to four changes."""
    node = known()
    for _ in range(rng.choice((1, 1, 2, 4))):
        node = node_changed(node, rng)
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
    for key in ("data", "objective", "optim", "logger", "trainer"):  # a model would be fetched
        make(cfg[key], key)
    return "accepted"


def override_input(rng: random.Random, folder: Path) -> Path:
    """Arguments of a command line."""
    inner = [
        f"{key}.{name}" for key, node in known().items() if isinstance(node, dict) for name in node
    ]
    chosen = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice((*known(), *inner, "exp", "hydra.run.dir", "data._target_"))
        if rng.random() < 0.3:
            key = mutated(key.encode(), rng).decode("utf-8", "replace")
        key += rng.choice(("", "", "", "", ".x", "._target_", "@y", "[0]"))
        chosen.append(f"{rng.choice(('', '', '', '+', '++', '~'))}{key}={str(value(rng))[:200]}")
    path = folder / "input.json"
    path.write_text(json.dumps(chosen))
    return path


def run_override(path: Path) -> str:
    """Compose and check."""
    check(compose("train", ["name=a", *json.loads(path.read_text())]), "train")
    return "accepted"


# The campaign.

FORBIDDEN = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
)
MOST_SECONDS, MOST_GROWTH, MOST_MEMORY = 60, 10**9, 6 * 10**9  # a case; bytes it needs, and claims
# How inputs of a kind are made, and what is done with them.
KINDS: dict[str, tuple[Callable[[random.Random, Path], Path], Callable[[Path], str]]] = {
    "sample": (sample_input, run_sample),
    "shard": (shard_input, run_shard),
    "checkpoint": (checkpoint_input, run_checkpoint),
    "config": (config_input, run_config),
    "override": (override_input, run_override),
}
DECK = [*["sample"] * 14, *["shard"] * 12, *["checkpoint"] * 9, *["config"] * 4, "override"]
watched: list[Path] = []  # the folder of the case that runs


class BreachError(BaseException):
    """A case does what no input may cause, or hangs; no `except Exception` can hold it up."""


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Programs started, connections, and files opened for writing elsewhere are breaches."""
    if not watched:
        return
    if event in FORBIDDEN:
        raise BreachError(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        path = Path(str(arguments[0])).resolve()
        if not path.is_relative_to(watched[0]) and path.parts[:2] != ("/", "dev"):
            raise BreachError(f"opens {path} for writing")


def ring(*_: Any) -> None:
    """The time of a case is over."""
    raise BreachError(f"more than {MOST_SECONDS} s")


def peak() -> int:
    """Most bytes that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(
    *,
    cases: int = 20_000,
    seed: int = 0,
    only: int | None = None,
    out: Path = Path("fuzz_failures"),
) -> int:
    """Run the cases and print what became of them; see the module.

    cases=20000          how many
    seed=0               of all of them
    only=                number of one case to run again
    out=fuzz_failures    for inputs of failed cases
    """
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    failed, slowest, begun = 0, (0.0, 0), time.perf_counter()
    settings(), model(), load_tagger("textblob")  # before the clock of a case runs
    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, ring)
    with tempfile.TemporaryDirectory() as place:
        for number in range(cases) if only is None else (only,):
            started, kind = time.perf_counter(), DECK[number % len(DECK)]
            outcome, report = one(kind, f"{seed}/{number}", Path(place).resolve())
            slowest = max(slowest, (time.perf_counter() - started, number))
            outcomes[kind][outcome] += 1
            if report:
                failed += 1
                kept = out / f"{number}-{kind}"
                shutil.copytree(place, kept, dirs_exist_ok=True)
                (kept / "report.txt").write_text(report)
                print(f"case {number} ({kind}): {outcome}\n{report}", flush=True)
    for kind, counts in outcomes.items():
        words = ", ".join(f"{outcome} {times:,}" for outcome, times in counts.most_common())
        print(f"{kind:<11}{counts.total():>7,}  {words}")
    total = sum(counts.total() for counts in outcomes.values())
    print(f"{total:,} cases, seed {seed}, {time.perf_counter() - begun:.0f} s; {failed} failed")
    print(f"slowest: {slowest[0]:.1f} s, case {slowest[1]}")
    return 1 if failed else 0


def one(kind: str, seed: str, folder: Path) -> tuple[str, str]:
    """Outcome, and a report if it failed."""
    make_input, run = KINDS[kind]
    for old in folder.iterdir():
        old.unlink()
    before, limits = peak(), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = make_input(random.Random(seed), folder)
        most = pages * resource.getpagesize() + MOST_MEMORY
        try:
            resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
            signal.alarm(MOST_SECONDS)
            watched.append(folder)
            outcome = run(path)
            if peak() - before > MOST_GROWTH:
                raise BreachError(f"needs {(peak() - before) / 1e9:.1f} GB")
            return outcome, ""
        except ConfigurationError:
            return "refused by ConfigurationError", ""
        except (Exception, BreachError) as error:
            if isinstance(error, Exception) and is_meant(error):
                return f"refused by {type(error).__name__}", ""
            return "FAILED", "".join(traceback.format_exception(error))
        finally:
            watched.clear()
            signal.alarm(0)
            resource.setrlimit(resource.RLIMIT_AS, limits)


if __name__ == "__main__":
    sys.exit(perform(lambda: call(fuzz, sys.argv[1:]), full=wants_traceback()))
