"""Fuzzing of shards and samples: whatever is in them, batches come, and counting agrees."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import random
from functools import cache
from pathlib import Path

from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from gradeclip_ft.data.captions import KEY, Batches, sample_keys
from gradeclip_ft.data.order import Place
from gradeclip_ft.data.shards import RawSample, Skips, read_shard
from gradeclip_ft.models.clip import ImageTransform, Preprocessing
from gradeclip_ft.models.tokenizer import Tokenizer
from gradeclip_ft.text.phrases import RULE
from tools import mutate
from tools.damage import DAMAGES, good, pack, png_of

RECORD = {
    "captions": ["a dog", "a cat"],
    KEY: {
        "rule": RULE,
        "tagger": "textblob",
        "max_phrases": 5,
        "found": {"a dog": ["dog"], "a cat": ["black cat", "tail"]},
    },
}
PLACE = Place(0, 0, 0, 1, 0, 1)
BATCH = 6
SUFFIXES = (
    "jpg",
    "png",
    "webp",
    "jpeg",
    "txt",
    "text",
    "json",
    "cls",
    "pyd",
    "pkl",
    "JPG",
    "x.jpg",
)


@cache
def batches() -> Batches:
    """As in training: CLIP's tokenizer, phrases, captions from JSON as well."""
    return Batches(
        tokenizer=Tokenizer(SimpleTokenizer(), 77),
        transform=ImageTransform((16, 16), Preprocessing(), train=True),
        batch_size=BATCH,
        prompt="This is a photo of the {}",
        caption="any",
        tagger="textblob",
        max_phrases=5,
    )


def shard_input(rng: random.Random, folder: Path) -> Path:
    """A small shard, damaged in its bytes or headers."""
    path = folder / "input.tar"
    rows = []
    for number in range(rng.randint(1, 5)):
        damage = rng.choice(DAMAGES) if rng.random() < 0.3 else None
        files = {**good(number), "json": json.dumps({"captions": ["a dog"]}).encode()}
        files = damage.break_(files) if damage else files
        rows.append((f"{number:04d}", files, damage.header if damage else None))
    pack(path, rows)
    data = path.read_bytes()
    data = mutate.tar_changed(data, rng) if rng.random() < 0.6 else mutate.bytes_changed(data, rng)
    if rng.random() < 0.15:
        data = gzip.compress(data, 1)
        data = mutate.bytes_changed(data, rng) if rng.random() < 0.7 else data
    path.write_bytes(data)
    return path


def run_shard(path: Path) -> str:
    """Read it as training does; count it as the splitter does."""
    skips = Skips(tell=lambda *_: None)
    raws = list(read_shard(str(path), skips))
    counted = list(sample_keys(path))
    if counted != [raw["__key__"] for raw in raws]:
        raise AssertionError(f"counted {counted}, read {[raw['__key__'] for raw in raws]}")
    return _batch(raws, skips)


def sample_input(rng: random.Random, folder: Path) -> Path:
    """One sample as a folder of its files would hold it, in one JSON of hexadecimal strings."""
    files = {"jpg": image(rng), "txt": mutate.text(rng).encode("utf-8", "surrogatepass")}
    if rng.random() < 0.5:
        record = mutate.changed(RECORD, rng)
        files["json"] = json.dumps(record).encode()
    if rng.random() < 0.3:
        files["txt"] = mutate.bytes_changed(files["txt"], rng)
    if rng.random() < 0.2:
        files["json"] = mutate.bytes_changed(files.get("json", b'{"captions": []}'), rng)
    if rng.random() < 0.2:
        files[rng.choice(SUFFIXES)] = rng.randbytes(rng.randrange(200))
    path = folder / "input.json"
    path.write_text(json.dumps({name: data.hex() for name, data in files.items()}))
    return path


def run_sample(path: Path) -> str:
    """The sample among good ones."""
    files = {name: bytes.fromhex(data) for name, data in json.loads(path.read_text()).items()}
    return _batch(
        [{"__key__": "input", "__url__": "input.tar", **files}], Skips(tell=lambda *_: None)
    )


def image(rng: random.Random) -> bytes:
    """An image file, most of them damaged."""
    kind = rng.choice(("jpeg", "png", "webp", "gif", "bmp", "tiff", "claim"))
    if kind == "claim":
        width, height = (rng.choice((0, 1, 7, 4000, 70_000, 2**31 - 1)) for _ in range(2))
        name = rng.choice((b"tEXt", b"zTXt", b"iCCP", b"tRNS", b"gAMA", b"eXIf", b"acTL", b"PLTE"))
        return png_of(width, height, (name, rng.randbytes(rng.randrange(300))), pixels=False)
    mode = rng.choice(
        (
            "RGB",
            "L",
            "CMYK" if kind in ("jpeg", "tiff") else "RGB",
            "1" if kind in ("png", "tiff") else "L",
        )
    )
    picture = Image.effect_noise((rng.randint(1, 40), rng.randint(1, 40)), 50).convert(mode)
    content = io.BytesIO()
    options = {"progressive": True} if kind == "jpeg" and rng.random() < 0.5 else {}
    picture.save(content, kind, **options)
    data = content.getvalue()
    return mutate.bytes_changed(data, rng) if rng.random() < 0.9 else data


def _batch(raws: list[RawSample], skips: Skips) -> str:
    """One batch of all usable samples, filled up with good ones."""
    fill: list[RawSample] = [
        {"__key__": f"fill{number}", "__url__": "fill.tar", **good(number)}
        for number in range(BATCH)
    ]
    (batch,) = batches()(itertools.chain(iter(raws), fill), PLACE, skips, first=0, count=1)
    used = sum(not key.startswith("fill.tar") for key in batch.keys)
    if not (batch.images.isfinite().all() and len(batch.keys) == BATCH == len(batch.captions)):
        raise AssertionError(f"a broken batch: {batch}")
    return f"{'all' if used == len(raws) else 'some' if used else 'none'} usable"
