"""Shards at addresses that fail, drip, break off, change and need a password.

Servers that are silent or busy, or mislead, are in tools/faults.py, which tests/tools runs.
"""

import base64
import contextlib
import http.server
import io
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest

from gradeclip_ft.data.shards import (
    AllowedCommand,
    Patience,
    Skips,
    expand_shards,
    open_shard,
    read_shard,
)

QUICK = Patience(seconds=0.4, attempts=3, pause=0.01)
CONTENT = bytes(range(256)) * 20_000  # 5 MB: more than one buffer
Answer = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the test says; keeps requests."""

    answers: dict[str, Answer]
    requests: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers.get("Authorization")))
        self.answers[self.path](self)

    def send(
        self, content: bytes, code: int = 200, claimed: int | None = None, **headers: object
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content) if claimed is None else claimed))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Handler]]]:
    monkeypatch.setenv("no_proxy", "*")
    handler = type("OneTest", (Handler,), {"answers": {}, "requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


Web = tuple[str, type[Handler]]


def read(url: str) -> bytes:
    with open_shard(url, QUICK) as stream:
        return stream.read()


@pytest.mark.parametrize("content", [CONTENT, CONTENT[:3000]])
def test_a_broken_connection_goes_on_where_it_stopped(web: Web, content: bytes) -> None:
    host, handler = web
    starts = []

    def answer(request: Handler) -> None:
        """Ranges, but no more than two fifths at a time."""
        start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
        starts.append(start)
        rest, span = content[start:], f"bytes {start}-{len(content) - 1}/{len(content)}"
        code = 206 if start else 200
        request.send(rest[: len(content) * 2 // 5], code, len(rest), Content_Range=span)
        request.close_connection = True

    handler.answers["/a"] = answer
    assert read(f"http://{host}/a") == content
    part = len(content) * 2 // 5
    if len(content) == 3000:
        assert starts == [0, part, 2 * part]
    else:  # what was on its way when the connection broke may be asked for again
        assert starts[0] == 0
        assert all(0 < two - one <= part for one, two in pairwise(starts))


def test_a_server_without_ranges_is_read_again_from_its_beginning(web: Web) -> None:
    host, handler = web
    sizes = iter([2_000_000, len(CONTENT)])
    handler.answers["/a"] = lambda request: request.send(
        CONTENT[: next(sizes)], claimed=len(CONTENT)
    )
    assert read(f"http://{host}/a") == CONTENT


def test_a_file_that_changes_in_between_is_not_glued_together(web: Web) -> None:
    host, handler = web

    def changing(request: Handler) -> None:
        request.send(CONTENT[:1_000_000], claimed=5_000_000, ETag=len(request.requests))

    handler.answers["/a"] = changing
    with pytest.raises(OSError, match="changed on the server"):
        read(f"http://{host}/a")


@pytest.mark.parametrize(
    ("code", "requests"), [(404, 1), (403, 1), (410, 1), (500, 3), (503, 3), (429, 3)]
)
def test_attempts_are_bounded_and_final_answers_believed(
    web: Web, code: int, requests: int
) -> None:
    host, handler = web
    handler.answers["/a"] = lambda request: request.send(b"sorry", code)
    with pytest.raises(OSError, match=f"the server says {code} "):
        read(f"http://{host}/a")
    assert len(handler.requests) == requests
    codes = iter([503, code if requests > 1 else 502, 200])  # a failure that passes is not seen
    handler.answers["/a"] = lambda request: request.send(CONTENT, next(codes))
    assert read(f"http://{host}/a") == CONTENT


def test_a_server_that_drips_is_left(web: Web) -> None:
    """Would hang the loader, and with it every process of a job."""

    def drips(request: Handler) -> None:
        request.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                request.wfile.write(b"x")
                time.sleep(0.05)

    host, handler = web
    handler.answers["/a.tar"] = drips
    skips, begun = Skips(tell=lambda *_: None), time.monotonic()
    assert list(read_shard(f"http://{host}/a.tar", skips, QUICK)) == []
    assert time.monotonic() - begun < 4
    assert skips.total == {"unreadable_shard": 1}


def test_credentials_reach_their_host_and_nobody_else(web: Web) -> None:
    host, handler = web
    other = host.replace("127.0.0.1", "localhost")
    handler.answers = {
        "/a": lambda request: request.send(b"", 302, Location=f"http://{other}/b"),
        "/b": lambda request: request.send(CONTENT),
    }
    assert read(f"http://me:p%40ss@{host}/a") == CONTENT
    expected = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert handler.requests == [("/a", expected), ("/b", None)]


@pytest.mark.parametrize("path", ["/a?Signature=a%2Fb%3D&t=1", "/caf%C3%A9"])
def test_an_address_arrives_as_it_was_signed(web: Web, path: str) -> None:
    host, handler = web
    handler.answers[path] = lambda request: request.send(CONTENT)
    assert read(f"http://{host}{path}") == CONTENT


def test_files_of_object_stores_go_on_where_they_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a store whose files are cut off once."""
    opened = []

    class File(io.BytesIO):
        def open(self) -> "File":
            opened.append(self)
            return self

        def read(self, size: int | None = -1) -> bytes:
            if len(opened) == 1 and self.tell() > 1_000_000:
                raise ConnectionResetError("reset")
            return super().read(size)

    monkeypatch.setattr(fsspec, "open", lambda url, **_: File(CONTENT))
    assert read("s3://bucket/a.tar") == CONTENT
    assert len(opened) == 2


def test_a_store_whose_library_is_missing_is_named() -> None:
    with pytest.raises(OSError, match="s3fs"):
        read("s3://bucket/a.tar")


def test_commands_run_only_where_they_were_allowed(tmp_path: Path) -> None:
    """A run's record could name one as its data; checking lists of shards alone let it through."""
    command = f"pipe:touch {tmp_path}/hacked"
    for url in (command, str(AllowedCommand(command))):
        with pytest.raises(ValueError, match="allow_pipe=true"):
            open_shard(url)
    skips = Skips(tell=lambda *_: None)
    assert list(read_shard(command, skips)) == []
    assert skips.total == {"unreadable_shard": 1}
    assert not (tmp_path / "hacked").exists()


def test_a_command_that_prints_and_fails_is_started_again(tmp_path: Path) -> None:
    content, mark = tmp_path / "content", tmp_path / "mark"
    content.write_bytes(CONTENT)
    command = f"head -c 3000000 {content}; [ -e {mark} ] || {{ touch {mark}; exit 7; }}; "
    command += f"tail -c +3000001 {content}"
    (url,) = expand_shards(f"pipe:{command}", allow_pipe=True)
    assert read(url) == CONTENT


@pytest.mark.parametrize(
    ("command", "message"), [("sleep 30", "printed nothing"), ("exit 3", "ended with 3")]
)
def test_a_command_that_hangs_or_fails_is_given_up(command: str, message: str) -> None:
    with pytest.raises(OSError, match=message):
        read(AllowedCommand(f"pipe:{command}"))


def test_errors_and_logs_do_not_show_secrets(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    host, _ = web
    url = f"http://user:word@{host}/x.tar?X-Amz-Signature=5167&t=1"
    with pytest.raises(ValueError, match="listed twice") as caught:
        expand_shards([url, url])
    list(read_shard(url, Skips(), Patience(0.1, 1, 0.0)))
    shown = str(caught.value) + caplog.text
    assert not [word for word in ("word", "5167") if word in shown]
    assert "x.tar" in shown
