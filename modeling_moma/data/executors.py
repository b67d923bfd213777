# SPDX-License-Identifier: Apache-2.0
"""A tokenization as tasks of datatrove, which starts them on one machine or on the nodes of a Slurm cluster."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors_moma import InputError
from ..utils.errors import needs_extra
from .jobs import read_job
from .tokenizing import tokenize_shard


class TokenizeStep:
    """A step of a datatrove pipeline: each rank writes one in `world_size` shards of a folder of tokens."""

    # what datatrove calls it in its logs
    name = "tokenize shards"

    def __init__(self, folder: str | Path, strict: bool = False):
        self.folder, self.strict = str(folder), strict

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterable:
        """Write the shards of one rank, then pass on what the step before it gave."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)
        job = read_job(self.folder)
        for task in job.tasks()[rank::world_size]:
            tokenize_shard(self.folder, job, task, self.strict)
        yield from data or ()


def run_executor(
    folder: str | Path,
    engine: str,
    tasks: int,
    workers: int,
    strict: bool = False,
    partition: str | None = None,
    time: str = "24:00:00",
) -> None:
    """Start a tokenization in datatrove.

    A task that was killed is run again by the next start, and goes on.
    """
    with needs_extra(f"--engine {engine} needs datatrove", "scale"):
        import multiprocess
        from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    job = read_job(folder)
    tasks = min(tasks, len(job.tasks()))
    # of datatrove's own marks of what is done; whether a shard is there decides, so that nothing is taken on trust
    shared: dict[str, Any] = {
        "pipeline": [TokenizeStep(Path(folder).absolute(), strict)],
        "tasks": tasks,
        "workers": min(workers, tasks),
        "logging_dir": str(Path(folder).absolute() / "datatrove"),
        "skip_completed": False,
    }
    if engine == "slurm":
        name = f"moma-tokenize-{Path(folder).name}"
        SlurmPipelineExecutor(**shared, time=time, partition=str(partition), job_name=name, mem_per_cpu_gb=4).run()
        return
    # each worker would import for seconds; elsewhere what is imported may not survive a fork
    start_method = "forkserver" if sys.platform == "linux" else "spawn"
    multiprocess.set_forkserver_preload([__name__])  # pyright: ignore[reportAttributeAccessIssue]
    try:
        LocalPipelineExecutor(**shared, start_method=start_method).run()
    # a pool hands on whatever a task raised
    except Exception as error:
        raise InputError(f"{str(folder)!r}: a task of datatrove failed ({error}); start again to go on.") from error
