# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own: until it answers, and its end."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(
    command: Sequence[str],
    log: Path,
    seconds: float = 120,
    cwd: str | Path | None = None,
    variables: Mapping[str, str | None] | None = None,
) -> Iterator[tuple[str, subprocess.Popen]]:
    """
    Address and process of a server of this machine, which ends with the context.

    Args:
        command: that starts it; `--port` and a free one are added, and another one where that was taken meanwhile.
        log: file for what it prints.
        seconds: to wait until `/health` answers, at most.
        cwd: its working folder.
        variables: of its environment, beside those of this process; `None` for one that it is not to have.

    Raises:
        RuntimeError: the server ended, or took longer.
    """
    environment = {**os.environ, **(variables or {})}
    given = {name: value for name, value in environment.items() if value is not None}
    for is_last in (False, True):
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        with log.open("w") as output:
            server = subprocess.Popen(
                [*command, "--port", str(port)], cwd=cwd, env=given, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            try:
                _wait_until_healthy(server, f"{address}/health", log, seconds)
            except RuntimeError:
                if is_last or "address already in use" not in log.read_text().lower():
                    raise
                continue
            yield address, server
            return
        finally:
            stop(server)


def _wait_until_healthy(server: subprocess.Popen, address: str, log: Path, seconds: float):
    # an empty ProxyHandler keeps proxies of the environment out
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + seconds
    while True:
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the server of {address} ended or took too long: {log.read_text()[-6000:]}")
        try:
            with opener.open(address, timeout=1) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)


def stop(server: subprocess.Popen, seconds: float = 30) -> None:
    """End a server, by force where it takes longer."""
    server.terminate()
    try:
        server.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
