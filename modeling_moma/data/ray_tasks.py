# SPDX-License-Identifier: Apache-2.0
"""A tokenization as tasks of Ray, which starts them on this machine or on the nodes of a Ray cluster."""

import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..errors_moma import InputError
from ..utils.errors import needs_extra
from .jobs import JOB_FILE, Job, Task, done_report, read_job
from .tokenizing import tokenize_shard
from .workers import POLL_SECONDS, Progress


# so often a shard is begun anew after its worker, or the node of it, has died
RETRIES = 3
# the least that Ray takes is 75 MiB; a number for each shard is all that comes back
OBJECT_STORE_BYTES = 80 * 2**20
# longest wait for a cluster to answer at its address, for which Ray itself waits many minutes
CONNECT_SECONDS = 10
# of a Ray that this command starts for itself; `setdefault` leaves what the user has set
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's name for listening on the loopback address alone, on any system
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # workers see the GPUs that the processes of `--engine processes` would
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def run_on_ray(
    folder: str | Path,
    job: Job,
    processes: int,
    threads: int = 1,
    strict: bool = False,
    address: str | None = None,
) -> None:
    """Write every shard that is missing, each by a task of Ray.

    Ray keeps the processes of its tasks, so that each of them loads the processor once. A shard whose worker or node
    dies is begun anew elsewhere, up to 3 times; nothing else is.
    """
    tasks = [task for task in job.tasks() if done_report(folder, task) is None]
    if not tasks:
        return
    with _ray(address, min(processes, len(tasks)), threads) as ray, Progress(folder, job) as progress:
        write = ray.remote(num_cpus=threads, max_retries=RETRIES)(write_shard)
        given = (str(Path(folder).absolute()), str(Path.cwd()), strict, threads)
        running = {write.remote(task, *given): task for task in tasks}
        while running:
            done, _ = ray.wait(list(running), num_returns=len(running), timeout=POLL_SECONDS)
            for reference in done:
                progress.add(_images_of(ray, reference, running.pop(reference), folder))


def write_shard(task: Task, folder: str, home: str, strict: bool, threads: int) -> int:
    """Write one shard in a worker, unless it is there."""
    for name in (home, os.path.join(folder, JOB_FILE)):
        if not os.path.exists(name):
            raise InputError(
                f"--output {folder!r}: the node {platform.node()!r} has no {name!r}. Data, processor and tokens have "
                "to lie on a disk that all nodes of the Ray cluster share, at the same place."
            )
    os.chdir(home)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)
    # Ray shows what workers print in the middle of this command's own bar
    logging.disable_progress_bar()
    images: list[int] = []
    tokenize_shard(folder, read_job(folder), task, strict, images.append)
    return sum(images)


def _images_of(ray: Any, reference: Any, task: Task, folder: str | Path) -> int:
    """Return the images of a shard that is done, or raise what its task did."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # as the worker raised it; its traceback over there is that of the cause
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise InputError(
            f"--output {str(folder)!r}: the worker of the shard {task.report_name()!r} died {RETRIES + 1} times "
            f"({type(error).__name__}). Is there too little memory for so many at a time (`--processes`)? Start again "
            "to go on."
        ) from error


@contextmanager
def _ray(address: str | None, processes: int, threads: int) -> Iterator[Any]:
    """Connect to a cluster, or start a Ray that nothing is left of in the end."""
    if address is None:
        # read when Ray is imported, by this process and by those that it starts
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
    with needs_extra("--engine ray needs Ray", "ray"):
        import ray
    # with what workers print comes Ray's word of those that died
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": "ERROR"}
    try:
        if address is None:
            cores = processes * threads
            own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES, "num_cpus": cores}
            ray.init(address="local", **own, **options)
        else:
            _connect(ray, address, options)
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str, options: dict[str, Any]) -> None:
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal() and "/" not in host:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, **options)
    # of the socket, and of Ray: an address of another form, another version of Ray or Python over there
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--address {address!r}: no Ray cluster can be joined there ({error}). `ray start --head` on one node "
            "prints the address, HOST:PORT. All nodes need the same versions of Ray and Python and, where the head "
            "asks for a token, RAY_AUTH_MODE=token and the token of `ray get-auth-token`."
        ) from error
