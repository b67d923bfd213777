# SPDX-License-Identifier: Apache-2.0
"""Runs a tokenization: in one process, in several of this machine, or as a step of datatrove on a cluster."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .jobs import Job, Task, read_job
from .tokenizing import tokenize_shard


def run_tasks(folder: str | Path, job: Job, processes: int, threads: int = 1, strict: bool = False) -> None:
    """
    Writes every shard that is missing, each by one process.

    Args:
        folder: of all tokens, begun by `write_job`.
        job: what to do.
        processes: of this machine that work side by side; with 1 it is this one.
        threads: of each process.
        strict: stop at the first row that cannot be used.

    Raises:
        ValueError: what a shard raised.
    """
    tasks = [task for task in job.tasks() if not (Path(folder) / task.report_name()).is_file()]
    progress = tqdm(total=len(job.tasks()), initial=len(job.tasks()) - len(tasks), desc="shards", unit="shard")
    if processes == 1 or len(tasks) < 2:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for task in tasks:
                tokenize_shard(folder, job, task, strict)
                progress.update()
        finally:
            torch.set_num_threads(before)
        progress.close()
        return
    # a forked process would share the locks of threads that it does not have
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(tasks)), context, _begin_worker, (threads,)) as pool:
        futures = [pool.submit(_run_one, str(folder), task, strict) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
                progress.update()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    progress.close()


def _begin_worker(threads: int) -> None:
    # the text tokenizer would start a thread for every core
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)


def _run_one(folder: str, task: Task, strict: bool) -> bool:
    return tokenize_shard(folder, read_job(folder), task, strict)


__all__ = ["run_tasks"]
