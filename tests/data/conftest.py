"""Small shards, and the parts of a model that a loader needs."""

import functools
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gradeclip_ft.data.captions import CaptionTrainData
from gradeclip_ft.models.clip import ImageTransform, Preprocessing
from gradeclip_ft.models.tokenizer import Tokenizer, WordTokenizer

Files = Mapping[str, bytes]
WriteShard = Callable[[Path, Sequence[Files]], Path]
MakeShards = Callable[..., list[Path]]
Source = Callable[..., CaptionTrainData]
ANIMALS = ["dog", "cat", "horse", "bird", "cow", "sheep"]


@pytest.fixture(scope="session")
def jpeg() -> Callable[[int], bytes]:
    """A different small picture for each number."""

    def draw(number: int) -> bytes:
        image = Image.linear_gradient("L").resize((24 + number % 5, 20)).rotate(number * 7)
        colour = (number * 37 % 256, number * 91 % 256, number * 13 % 256)
        image = Image.composite(image.convert("RGB"), Image.new("RGB", image.size, colour), image)
        content = io.BytesIO()
        image.save(content, "jpeg")
        return content.getvalue()

    return draw


@pytest.fixture(scope="session")
def sample(jpeg: Callable[[int], bytes]) -> Callable[..., dict[str, bytes]]:
    """Files of one good sample."""

    def files(number: int, caption: str | None = None, **record: Any) -> dict[str, bytes]:
        animal = ANIMALS[number % len(ANIMALS)]
        text = f"a black {animal} near house {number}" if caption is None else caption
        name = f"{number:09d}"
        return {
            f"{name}.jpg": jpeg(number),
            f"{name}.txt": text.encode(),
            f"{name}.json": json.dumps({"caption": text, "key": name, **record}).encode(),
        }

    return files


@pytest.fixture(scope="session")
def write_shard() -> WriteShard:
    """Writes a tar of the given samples."""

    def write(path: Path, samples: Sequence[Files]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for files in samples:
                for name, content in files.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        return path

    return write


@pytest.fixture(scope="session")
def make_shards(sample: Callable[..., dict[str, bytes]], write_shard: WriteShard) -> MakeShards:
    """Shards of good samples with running numbers; returns their paths."""

    def make(folder: Path, *, sizes: Sequence[int], broken: Sequence[int] = ()) -> list[Path]:
        paths, number = [], 0
        for index, size in enumerate(sizes):
            rows = [sample(number + row) for row in range(size)]
            for row, files in enumerate(rows):
                if number + row in broken:  # cut in its picture's data: opens, but does not decode
                    (name,) = [name for name in files if name.endswith(".jpg")]
                    files[name] = files[name][: len(files[name]) - 60]
            paths.append(write_shard(folder / f"part-{index:04d}.tar", rows))
            number += size
        return paths

    return make


@pytest.fixture(scope="session")
def source() -> Source:
    """`CaptionTrainData` with a small model's tokenizer and training transform."""
    words = [*ANIMALS, "a", "black", "near", "house", "this", "is", "photo", "of", "the", "red"]
    tokenizer = Tokenizer(WordTokenizer(tuple(words), 24), 24)
    transform = ImageTransform((16, 16), Preprocessing(), train=True)

    def build(shards: Any, **options: Any) -> CaptionTrainData:
        given = {"batch_size": 4, "workers": 0, "tagger": "textblob", "shuffle": 6, **options}
        return CaptionTrainData(shards=shards, tokenizer=tokenizer, transform=transform, **given)

    return build


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address at which the test's folder is served, without ranges."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
