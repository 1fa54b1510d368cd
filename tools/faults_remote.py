"""Faults of a server that shards come from: absent, busy, silent, breaking off, misleading."""

from __future__ import annotations

import http.server
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from gradeclip_ft.data.shards import Patience, Skips, read_shard
from tools.faults_data import SIZE, Row, logged, write

QUICK = Patience(seconds=0.4, attempts=3, pause=0.02)  # a run waits a minute, five times


class _Handler(http.server.BaseHTTPRequestHandler):
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
            case "/breaks.tar":
                rest = self.content[start:]
                self._send(rest[: len(self.content) // 3 + 1], 206 if start else 200, len(rest))
                self.close_connection = True
            case "/away.tar":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()

    def _send(self, content: bytes, code: int, claimed: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content) if claimed is None else claimed))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing."""


REMOTE_FAULTS = (
    ("remote shard that is not there (404)", "gone", 0),
    ("server that is busy twice (503)", "busy", SIZE),
    ("server that fails always (500)", "down", 0),
    ("server that never answers", "silent", 0),
    ("connection that breaks off twice", "breaks", SIZE),
    ("redirect to a file of this machine", "away", 0),
)


def rows(folder: Path) -> Iterator[Row]:
    """All of them."""
    _Handler.content = write(folder)[0].read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
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
