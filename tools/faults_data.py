"""Faults of data: one broken thing among good samples, read by the loader of training."""

from __future__ import annotations

import gzip
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradeclip_ft.data.captions import CaptionShards
from gradeclip_ft.models.clip import ImageTransform, Preprocessing
from gradeclip_ft.models.tokenizer import Tokenizer, WordTokenizer
from tools.damage import BLOCK, DAMAGES, WORDS, Damage, good, pack, tar_header

SHARDS, SIZE = 4, 10
TOTAL = SHARDS * SIZE
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


def rows(folder: Path) -> Iterator[Row]:
    """All of them."""
    for damage in DAMAGES:
        yield _sample_row(folder, damage)
    for name, change, lost in SHARD_FAULTS:
        yield _shard_row(folder, name, change, lost)
    yield _too_many(folder)


def source(place: str, **options: object) -> CaptionShards:
    """The loader's settings: 8-pixel images, phrases by TextBlob."""
    words = tuple(dict.fromkeys(("a", "black", "near", "house", "photo", *WORDS)))
    settings = {"batch_size": 1, "resampled": False, "shuffle": 0, "workers": 0, **options}
    return CaptionShards(
        shards=place,
        tokenizer=Tokenizer(WordTokenizer(words, 24), 24),
        transform=ImageTransform((8, 8), Preprocessing(), train=True),
        tagger="textblob",
        **settings,  # type: ignore[arg-type]
    )


def write(folder: Path, damage: Damage | None = None) -> list[Path]:
    """Four shards of ten; one sample of the second is damaged."""
    paths = []
    for shard in range(SHARDS):
        samples = []
        for number in range(shard * SIZE, (shard + 1) * SIZE):
            hit = damage if number == SIZE + SIZE // 2 else None
            files = hit.break_(good(number)) if hit else good(number)
            samples.append((f"{number:04d}", files, hit.header if hit else None))
        paths.append(folder / f"part-{shard}.tar")
        pack(paths[-1], samples)
    return paths


def read(
    place: str, before: Callable[[], object] | None = None
) -> tuple[list[int], Counter[str], str]:
    """Samples that came, counts by cause, and the first line of the log."""
    data = source(place)
    loader = data.loader(seed=0, epoch=0, rank=0, world_size=1)
    if before is not None:
        before()
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    with logged() as lines:
        for batch in loader:
            counts.update(batch.skipped)
            seen.update(int(key.split(":")[1]) for key in batch.keys)
    return sorted(seen), counts, lines[0] if lines else ""


@contextmanager
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


def _sample_row(folder: Path, damage: Damage) -> Row:
    write(folder, damage)
    seen, counts, message = read(str(folder))
    lost = sorted(set(range(TOTAL)) - set(seen))
    wanted = [] if damage.usable else [SIZE + SIZE // 2]
    # slices are filled up by reading on from the start: a second look at the same sample counts too
    handled = lost == wanted and set(counts) == set(damage.causes)
    return Row(damage.name, "survived", _lost(lost), message, handled)


def _lost(samples: list[int]) -> str:
    if not samples:
        return "none"
    return "that sample" if len(samples) == 1 else f"{len(samples)} samples"


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"0016.txt") + BLOCK + 5])


def _header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(b"0015.jpg")
    content[at + 2] ^= 0xFF
    path.write_bytes(content)


def _hole(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(b"0015.jpg")
    content[at : at + 3 * BLOCK] = bytes(3 * BLOCK)
    path.write_bytes(content)


def _claim(path: Path) -> None:
    content = path.read_bytes()
    at = content.index(b"0015.jpg")
    path.write_bytes(content[:at] + tar_header("bomb.jpg", 2 * 10**12) + content[at:])


def _bomb(path: Path) -> None:
    content = path.read_bytes()
    at = content.index(b"0015.jpg")
    size = BOMB
    packed = gzip.compress(content[:at] + tar_header("bomb.jpg", size), 1)
    path.write_bytes(packed + gzip.compress(bytes(size), 1) + gzip.compress(content[at:], 1))


def _twice(path: Path) -> None:
    content = path.read_bytes()
    at, end = content.index(b"0015.jpg"), content.index(b"0016.jpg")
    path.write_bytes(content[:end] + content[at:end] + content[end:])


def _traversal(path: Path) -> None:
    content = bytearray(path.read_bytes())
    body = good(15)["jpg"]
    evil = (
        tar_header("../../../../tmp/escaped/0015.jpg", len(body)) + body + bytes(-len(body) % BLOCK)
    )
    evil += tar_header("../evil.pkl", 4) + b"cos\n" + bytes(BLOCK - 4)
    path.write_bytes(evil + content)


TAIL, ALL, ONE = set(range(16, 20)), set(range(10, 20)), {15}
SHARD_FAULTS: tuple[tuple[str, Callable[[Path], object], set[int]], ...] = (
    ("shard cut in the 7th of 10 samples", _cut, TAIL),
    ("empty shard", lambda path: path.write_bytes(b""), ALL),
    ("shard of zeros", lambda path: path.write_bytes(bytes(20 * BLOCK)), ALL),
    ("HTML instead of a shard", lambda path: path.write_bytes(b"<html>404</html>" * 99), ALL),
    ("shard that vanishes during the run", Path.unlink, ALL),
    ("damaged tar header of an image", _header, ONE),
    ("hole of zeros over an image", _hole, ONE),
    ("tar header that claims 2 TB", _claim, set()),
    ("packed bomb: 300 MB of zeros in 1.3 MB", _bomb, set()),
    ("the same sample twice in a row", _twice, set()),
    ("paths that lead out, and a pickle, in a shard", _traversal, set()),
)


def _shard_row(folder: Path, name: str, change: Callable[[Path], object], lost: set[int]) -> Row:
    paths = write(folder)
    around = set(folder.parent.iterdir())
    if change is _traversal:
        change(paths[1])
    # other damage comes after the loader has counted, as it does in a run of days
    late = None if change is _traversal else lambda: change(paths[1])
    seen, counts, message = read(str(folder), before=late)
    gone = set(range(TOTAL)) - set(seen)
    handled = gone == lost and bool(counts) == bool(message) and bool(message or not lost)
    handled = handled and set(folder.parent.iterdir()) == around
    shown = (
        "all of that shard" if gone == ALL else "its tail" if gone == TAIL else _lost(sorted(gone))
    )
    return Row(name, "survived", shown, message.replace(str(folder), "..."), handled)


def _too_many(folder: Path) -> Row:
    for path in folder.iterdir():
        path.unlink()
    samples = []
    for number in range(1200):
        files = good(number)
        samples.append((f"{number:04d}", files if number % 3 else {**files, "jpg": b""}, None))
    pack(folder / "part-0.tar", samples)
    try:
        read(str(folder))
    except RuntimeError as error:
        return Row(
            "every third sample broken", "stopped", "none", str(error), "max_dropped" in str(error)
        )
    return Row("every third sample broken", "survived", "all broken ones", "", False)
