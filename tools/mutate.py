"""Random changes to bytes, tar headers, texts and containers, each decided by a generator alone."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Callable
from typing import Any

BLOCK = tarfile.BLOCKSIZE
SIZES = (b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"00000000000\0", b"9bad size!!\0")
FIELDS = (
    (0, 100),
    (100, 8),
    (124, 12),
    (136, 12),
    (148, 8),
    (156, 1),
    (157, 100),
    (257, 8),
    (345, 155),
)
NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    1e308,
    float("nan"),
    float("inf"),
    0.5,
)
WORDS = (
    *("", " ", "dog", "the red car", "\0", "\ud800", "é" * 50, "<script>", "../../etc"),
    *("{}", "${seed}", "${oc.env:HOME}", "a\nb", "\u202e", "[", "'", '"', "null", "[1,2]", "{a:1}"),
    "x" * 9000,
)


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """One to four random changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(CHANGES)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 32)) if changed else 0):
        changed[rng.randrange(len(changed))] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randint(0, len(data))]


def _without_start(data: bytes, rng: random.Random) -> bytes:
    return data[rng.randint(0, min(len(data), 2000)) :]


def _hole(data: bytes, rng: random.Random) -> bytes:
    start, size = rng.randint(0, len(data)), rng.choice((1, 16, 512, 4096))
    fill = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), b""))
    return data[:start] + fill + data[start + size :]


def _inserted(data: bytes, rng: random.Random) -> bytes:
    start, size = rng.randint(0, len(data)), rng.choice((1, 3, 512, 5000))
    return data[:start] + rng.randbytes(size) + data[start:]


def _repeated(data: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(data))
    piece = data[start : start + rng.choice((8, 512, 4096))]
    return data[:start] + piece * rng.randint(2, 20) + data[start:]


CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _flip,
    _cut,
    _without_start,
    _hole,
    _inserted,
    _repeated,
)


def tar_changed(data: bytes, rng: random.Random) -> bytes:
    """Fields of headers changed, most with a checksum that is right again."""
    changed = bytearray(data)
    starts = [
        at for at in range(0, len(data) - BLOCK, BLOCK) if data[at + 257 : at + 262] == b"ustar"
    ]
    for _ in range(rng.choice((1, 1, 2, 5)) if starts else 0):
        at = rng.choice(starts)
        start, size = rng.choice(FIELDS)
        value = rng.choice((rng.randbytes(size), bytes(size), rng.choice(SIZES), b"../" * 60))
        if start == 156:
            value = rng.choice(b"0\x001234567xgLKSDVMNX").to_bytes(1, "big")
        changed[at + start : at + start + size] = value[:size].ljust(size, b"\0")
        if rng.random() < 0.85:
            _sign(changed, at)
    return bytes(changed)


def _sign(data: bytearray, at: int) -> None:
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])


def text(rng: random.Random) -> str:
    """Some text, more often a strange one."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(WORDS)
    if kind == 1:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(60)))
    if kind == 2:
        return rng.choice(
            ("a dog ", "the ", "(", "I ", "-", "0", "\u0301", "of the red ", "x")
        ) * rng.choice((10, 400, 2000))
    letters = "".join(
        rng.choices("abc  .,-'\"()/&;:!?#\t\u00e9\u4e2d\U0001f600", k=rng.randrange(300))
    )
    return letters if kind == 3 else f"a photo of a dog and {letters}"


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything JSON or YAML can say."""
    kind = rng.randrange(6 if depth < 4 else 3)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice((None, True, False))
    if kind == 2:
        return text(rng)
    if kind == 3:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    names = ("captions", "phrases", "_target_", "_args_", "_partial_", "name", "tagger", "max", "x")
    return {rng.choice(names): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def changed(node: Any, rng: random.Random) -> Any:
    """A copy of a container with something deleted, replaced or added somewhere inside."""
    node = json.loads(json.dumps(node))
    place = node
    while rng.random() < 0.75:
        inner = [
            v
            for v in (place.values() if isinstance(place, dict) else place)
            if v and isinstance(v, dict | list)
        ]
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
