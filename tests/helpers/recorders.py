# SPDX-License-Identifier: Apache-2.0
"""Web servers of this machine that stand for hosts elsewhere, and write down what they are asked."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from benchmarks.serving_requests import disc, png


class Recorder(ThreadingHTTPServer):
    """Answers `/redirect?ADDRESS`, `/trickle`, `/large` and `/missing` as they say, and all else with an image."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str]] = []
        self.image = png(disc("red"))


class _Handler(BaseHTTPRequestHandler):
    server: Recorder

    def do_GET(self):
        self.server.asked.append((self.headers["host"], self.path))
        action, _, target = self.path.partition("?")
        if action == "/redirect":
            self._answer(302, b"", location=target)
        elif action == "/missing":
            self._answer(404, b"")
        elif action == "/large":
            self._answer(200, bytes(17 << 20))
        elif action == "/trickle":
            self._trickle()
        else:
            self._answer(200, self.server.image)

    def _answer(self, status: int, content: bytes, **headers: str):
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:
            pass

    def _trickle(self):
        self.send_response(200)
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b"a")
                time.sleep(0.5)
        except OSError:
            pass

    def log_message(self, format, *args):
        pass


@contextmanager
def recorder() -> Iterator[Recorder]:
    """A recorder that answers until the context ends."""
    with Recorder() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
