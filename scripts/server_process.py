# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own, for benchmarks, pictures of pages and tests: until it answers, and its end."""

import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path


def wait_until_healthy(server: subprocess.Popen, address: str, log: Path, seconds: float) -> None:
    """
    Returns once an address answers with status 200.

    Args:
        server: the process.
        address: to ask, past all proxies.
        log: file with what the server prints.
        seconds: to wait at most.

    Raises:
        RuntimeError: the server ended, or took longer.
    """
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
