# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces with addresses of their own, joined by one cable: what two machines are to a launcher."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


# of each node, on its side of the cable
INTERFACE = "cable"
SECONDS = 240


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class TwoNodes:
    """Namespaces `0` and `1`; nothing in them reaches anything but the other.

    Args:
        name: of the pair, one for each process of the tests.
    """

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self, name: str):
        self.namespaces = (f"{name}-0", f"{name}-1")

    def lay_cable(self) -> None:
        for namespace in self.namespaces:
            _ip("netns", "add", namespace)
        first, second = self.namespaces
        _ip("-n", first, "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for namespace, address in zip(self.namespaces, self.addresses):
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _ip("-n", namespace, "link", "set", device, "up")

    def remove(self) -> None:
        for namespace in self.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    def drop_packets(self, drops: bool) -> None:
        """Let each node send to an address that no card has, so that nothing arrives and nothing is refused."""
        for namespace, other in zip(self.namespaces, reversed(self.addresses)):
            if drops:
                neighbour = ["lladdr", "02:00:00:00:00:01", "nud", "permanent"]
                _ip("-n", namespace, "neigh", "replace", other, *neighbour, "dev", INTERFACE)
            else:
                _ip("-n", namespace, "neigh", "del", other, "dev", INTERFACE)

    def start(
        self, node: int, command: Sequence[str], log: Path, environment: Mapping[str, str] = {}
    ) -> subprocess.Popen:
        """Start a command on a node, as the leader of a group of processes.

        Args:
            node: 0 or 1.
            command: its arguments.
            log: file for what it prints.
            environment: beside this process's own.
        """
        with open(log, "a") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespaces[node], *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE, **environment},
                start_new_session=True,
            )


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """The pair, which is gone afterwards; skips a test where it cannot be made."""
    if shutil.which("ip") is None:
        pytest.skip("two network namespaces need `ip` (Debian: iproute2)")
    nodes = TwoNodes(f"moma-{os.getpid()}")
    try:
        nodes.lay_cable()
    except subprocess.CalledProcessError as error:
        nodes.remove()
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    try:
        yield nodes
    finally:
        nodes.remove()


def wait_for(processes: Sequence[subprocess.Popen], logs: Sequence[Path]) -> None:
    """Wait until all have ended well, and raise with the last lines of both logs where one has not."""
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
