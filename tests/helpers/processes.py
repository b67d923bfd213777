# SPDX-License-Identifier: Apache-2.0
"""Several processes on one machine that talk over gloo, as several devices would."""

import datetime
import functools
import gc
import multiprocessing
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from helpers.server_process import free_port


# what every process would import; the server does it once and forks
PRELOADED = [
    *("torch.distributed.tensor", "torch.distributed.fsdp", "transformers.trainer", "datasets"),
    *("modeling_moma", "modeling_moma.training.pretraining"),
]
# so often a group of processes may crash, by one of these, before its test fails
CRASHES = 2
CRASH_SIGNALS = ("SIGABRT", "SIGSEGV")


def again_after_a_crash(start):
    """Start anew where a signal has ended a process.

    Now and then, in one of some hundred groups, the collectives of torch 2.13 on CPUs find the heap corrupted. What a
    test checks is raised in the process, and comes as another exception.
    """

    @functools.wraps(start)
    def started(*args, **kwargs):
        for crashes in range(CRASHES + 1):
            try:
                return start(*args, **kwargs)
            except mp.ProcessExitedException as error:
                if error.signal_name not in CRASH_SIGNALS or crashes == CRASHES:
                    raise
                warnings.warn(f"started anew: {error}", stacklevel=2)

    return started


@again_after_a_crash
def start_processes(work, *args, num_processes: int = 2):
    """Call `work(rank, *args)` in processes of their own, and raise what one of them raises.

    Args:
        work: a function of a module, so that processes can import it.
        num_processes: how many.
    """
    _start_all(work, args, num_processes)


def start_process(work, *args) -> multiprocessing.Process:
    """Call `work(*args)`, a function of a module, in a process of its own, which may be killed."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    process = multiprocessing.get_context("forkserver").Process(target=work, args=args)
    process.start()
    return process


def start_script(main, arguments: list[str], log: str | Path) -> multiprocessing.Process:
    """Call a script's `main(arguments)` in a process of its own, which may be killed.

    Args:
        main: a function of a module, so that the process can import it.
        arguments: its own.
        log: file for what the process prints.
    """
    return start_process(_run_script, main, arguments, log)


def start_scripts(
    main, arguments: list[str], log: str | Path, num_processes: int = 2
) -> list[multiprocessing.Process]:
    """As [`start_script`], in as many processes as `torchrun` would start, which find each other by its variables."""
    port = free_port()
    return [start_process(_run_rank, main, arguments, log, rank, num_processes, port) for rank in range(num_processes)]


@again_after_a_crash
def run_group(work, *args, num_processes: int = 2, timeout: float = 60):
    """As [`start_processes`], in processes that form a group.

    Args:
        timeout: seconds that one process waits for another.
    """
    with tempfile.TemporaryDirectory() as folder:
        _start_all(_join, (f"file://{folder}/rendezvous", num_processes, timeout, work, args), num_processes)


def _start_all(work, args, num_processes):
    multiprocessing.set_forkserver_preload(PRELOADED)
    # daemons: a process that hangs in its own exit must not keep the test run from ending
    mp.start_processes(_start, args=(work, args), nprocs=num_processes, daemon=True, start_method="forkserver")


def _begin():
    torch.set_num_threads(1)
    # what the server has imported is no garbage
    gc.freeze()


def _start(rank, work, args):
    _begin()
    work(rank, *args)
    sys.stdout.flush()
    # gloo's threads now and then wait for each other for ever when they are taken down in order
    os._exit(0)


def _run_script(main, arguments, log):
    _begin()
    with open(log, "a") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    main(arguments)


def _run_rank(main, arguments, log, rank, num_processes, port):
    rank_variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
    variables = {**rank_variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    _run_script(main, arguments, log)


def _join(rank, rendezvous, num_processes, timeout, work, args):
    dist.init_process_group(
        "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=num_processes,
        timeout=datetime.timedelta(seconds=timeout),
    )
    work(rank, *args)
    dist.barrier()
