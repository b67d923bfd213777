# SPDX-License-Identifier: Apache-2.0
"""Web servers of this machine that stand for hosts elsewhere, and write down what they are asked."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Recorder(ThreadingHTTPServer):
    """Answers nothing but 404."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Recorder

    def do_GET(self):
        self.server.asked.append((self.headers["host"], self.path))
        self.send_error(404)

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
