"""Shards behind addresses that fail, stall, drip, break off, redirect and need a password."""

import base64
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gradeclip_ft.data.shards import Patience, Skips, expand_shards, open_shard, read_shard

QUICK = Patience(seconds=0.3, attempts=3, pause=0.01)
CONTENT = bytes(range(256)) * 20_000  # 5 MB: more than one buffer
Answer = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the test says; counts requests."""

    answers: dict[str, Answer]
    requests: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers.get("Authorization")))
        self.answers[self.path](self)

    def send(self, content: bytes, code: int = 200, claimed: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content) if claimed is None else claimed))
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


def start_of(handler: Handler) -> int:
    return int((handler.headers.get("Range") or "bytes=0-")[6:-1])


def test_a_broken_connection_goes_on_where_it_stopped(web: Web) -> None:
    host, handler = web
    starts = []

    def breaks(request: Handler) -> None:
        start = start_of(request)
        starts.append(start)
        rest = CONTENT[start:]
        request.send(rest[:1_500_000], 206 if start else 200, claimed=len(rest))
        request.close_connection = True

    handler.answers["/a"] = breaks
    assert open_shard(f"http://{host}/a", QUICK).read() == CONTENT
    assert starts == [0, 1_500_000, 3_000_000, 4_500_000]


def test_a_server_without_ranges_is_read_again_from_its_beginning(web: Web) -> None:
    host, handler = web
    sizes = iter([2_000_000, len(CONTENT)])
    handler.answers["/a"] = lambda request: request.send(
        CONTENT[: next(sizes)], claimed=len(CONTENT)
    )
    assert open_shard(f"http://{host}/a", QUICK).read() == CONTENT


def test_a_file_that_changes_in_between_is_not_glued_together(web: Web) -> None:
    host, handler = web

    def changing(request: Handler) -> None:
        request.send_response(206 if start_of(request) else 200)
        request.send_header("ETag", str(len(request.requests)))
        request.send_header("Content-Length", "5000000")
        request.end_headers()
        request.wfile.write(CONTENT[:1_000_000])

    handler.answers["/a"] = changing
    with pytest.raises(OSError, match="changed on the server"):
        open_shard(f"http://{host}/a", QUICK).read()


@pytest.mark.parametrize(
    ("code", "requests"), [(404, 1), (403, 1), (410, 1), (500, 3), (503, 3), (429, 3)]
)
def test_attempts_are_bounded_and_final_answers_believed(
    web: Web, code: int, requests: int
) -> None:
    host, handler = web
    handler.answers["/a"] = lambda request: request.send(b"sorry", code)
    with pytest.raises(OSError, match=str(code)):
        open_shard(f"http://{host}/a", QUICK).read()
    assert len(handler.requests) == requests


def test_a_failure_that_passes_is_not_seen(web: Web) -> None:
    host, handler = web
    codes = iter([503, 502, 200])
    handler.answers["/a"] = lambda request: request.send(CONTENT, next(codes))
    assert open_shard(f"http://{host}/a", QUICK).read() == CONTENT


def silent(request: Handler) -> None:
    time.sleep(1.0)


def drips(request: Handler) -> None:
    request.send_response(200)
    request.end_headers()
    for _ in range(100):
        try:
            request.wfile.write(b"x")
        except OSError:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("answer", [silent, drips])
def test_a_silent_or_dripping_server_is_left(web: Web, answer: Answer) -> None:
    """Would hang the loader, and with it every process of a job."""
    host, handler = web
    handler.answers["/a.tar"] = answer
    skips, begun = Skips(tell=lambda *_: None), time.monotonic()
    assert list(read_shard(f"http://{host}/a.tar", skips, QUICK)) == []
    assert time.monotonic() - begun < 10
    assert skips.total == {"unreadable_shard": 1}


def test_no_server_at_all(web: Web) -> None:
    with pytest.raises(OSError, match=r"refused.*3 attempts"):
        open_shard("http://127.0.0.1:9/a", QUICK).read()


def test_credentials_reach_their_host_and_nobody_else(web: Web) -> None:
    host, handler = web
    other = host.replace("127.0.0.1", "localhost")

    def redirects(request: Handler) -> None:
        request.send_response(302)
        request.send_header("Location", f"http://{other}/b")
        request.end_headers()

    handler.answers = {"/a": redirects, "/b": lambda request: request.send(CONTENT)}
    assert open_shard(f"http://me:p%40ss@{host}/a", QUICK).read() == CONTENT
    expected = "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert handler.requests == [("/a", expected), ("/b", None)]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "pipe:touch x"])
def test_a_redirect_cannot_leave_the_web(web: Web, target: str) -> None:
    host, handler = web

    def redirects(request: Handler) -> None:
        request.send_response(302)
        request.send_header("Location", target)
        request.end_headers()

    handler.answers["/a"] = redirects
    with pytest.raises(OSError, match=r"302|unknown url type|redirect"):
        open_shard(f"http://{host}/a", QUICK).read()


def test_a_program_that_prints_and_fails_is_started_again(tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.write_bytes(CONTENT)
    mark = tmp_path / "mark"
    command = f"head -c 3000000 {content}; [ -e {mark} ] || {{ touch {mark}; exit 7; }}; "
    command += f"tail -c +3000001 {content}"
    assert open_shard(f"pipe:{command}", QUICK).read() == CONTENT


@pytest.mark.parametrize(
    ("command", "message"),
    [("sleep 30", "printed nothing"), ("echo 'no bucket' >&2; exit 3", "ended with 3: no bucket")],
)
def test_a_program_that_hangs_or_fails_is_given_up(command: str, message: str) -> None:
    with pytest.raises(OSError, match=message):
        open_shard(f"pipe:{command}", QUICK).read()


def test_no_shell_sees_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of object stores get the address as one word."""
    program = tmp_path / "aws"
    program.write_text('#!/bin/sh\nprintf "%s" "$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    url = "s3://bucket/$(touch hacked);`touch hacked`|x.tar"
    assert open_shard(url, QUICK).read().decode() == url
    assert not (tmp_path / "hacked").exists()


def test_errors_and_logs_do_not_show_secrets(
    web: Web, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host, _ = web
    monkeypatch.setenv("SOME_API_KEY", "abcdef123456")
    url = f"http://user:word@{host}/x.tar?X-Amz-Signature=5167&t=1"
    with pytest.raises(ValueError, match="listed twice") as caught:
        expand_shards([url, url])
    list(read_shard(url, Skips(), Patience(0.1, 1, 0.0)))
    list(read_shard("pipe:echo abcdef123456 >&2; exit 1", Skips(), QUICK))
    shown = str(caught.value) + caplog.text
    assert not [word for word in ("word", "5167", "abcdef123456") if word in shown]
    assert "x.tar" in shown
