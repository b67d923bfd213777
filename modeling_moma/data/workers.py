# SPDX-License-Identifier: Apache-2.0
"""Runs a tokenization on this machine, in one process or in several."""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..utils.errors import KilledProcessError
from .encoding import loaded_encoder
from .jobs import Job, Task, done_report, read_job
from .tokenizing import open_rows, tokenize_shard


# between two looks at what the other processes have done
POLL_SECONDS = 0.5
# of a worker: images that all of them have coded
_coded: Any = None


class Workers:
    """Processes that work beside this one.

    Each is started once and loads the processor once; while the first one does, this one may find out what there is to
    do.
    """

    def __init__(self, number: int, threads: int, processor: str):
        # a forked process would share the locks of threads that it does not have
        context = multiprocessing.get_context("spawn")
        self.coded = context.Value("q", 0)
        self.pool = ProcessPoolExecutor(number, context, _begin_worker, (threads, processor, self.coded))
        self.others = set(multiprocessing.active_children())
        # the first one starts now, the others as there are shards for them
        self._submit(os.getpid)
        self.idle = self._processes()

    def __enter__(self) -> "Workers":
        return self

    def submit(self, *call: Any) -> Future:
        """Hand a function and its arguments to a process, see `concurrent.futures.Executor.submit`."""
        self.idle = set()
        return self._submit(*call)

    def __exit__(self, error: type[BaseException] | None, *rest: Any) -> None:
        is_stopped = error is not None and issubclass(error, KeyboardInterrupt)
        # what is wrong with the data is told at once, and not when a process has imported everything for nothing
        for process in self._processes() if is_stopped else self.idle if error is not None else ():
            process.terminate()
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, *call: Any) -> Future:
        """Hand over a call, with Ctrl-C ignored by a process that starts for it: this one ends it."""
        if threading.current_thread() is not threading.main_thread():
            return self.pool.submit(*call)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return self.pool.submit(*call)
        finally:
            signal.signal(signal.SIGINT, before)

    def _processes(self) -> set[Any]:
        """Return those of the pool."""
        return set(multiprocessing.active_children()) - self.others


def run_tasks(
    folder: str | Path,
    job: Job,
    processes: int,
    threads: int = 1,
    strict: bool = False,
    workers: Workers | None = None,
) -> None:
    """Write every shard that is missing, each by one process.

    Args:
        folder (`str | Path`):
            of all tokens, begun by `write_job`.
        job (`Job`):
            what to do.
        processes (`int`):
            of this machine that work side by side, this one among them.
        threads (`int`, *optional*, defaults to `1`):
            of each process.
        strict (`bool`, *optional*, defaults to `False`):
            stop at the first row that cannot be used.
        workers (`Workers`, *optional*):
            those beside this one; by default they are started where there are shards for them.

    Raises:
        ValueError: what a shard raised.
        RuntimeError: a process was killed.
    """
    tasks = [task for task in job.tasks() if done_report(folder, task) is None]
    # of an earlier job of this process
    open_rows.cache_clear()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with Progress(folder, job) as progress:
            number = min(processes, len(tasks)) - 1
            if number < 1:
                for task in tasks:
                    tokenize_shard(folder, job, task, strict, progress.add)
                    progress.show()
                return
            beside = nullcontext(workers) if workers is not None else Workers(number, threads, job.processor)
            with beside as workers:
                try:
                    _share(folder, job, tasks, strict, workers, progress)
                except BrokenProcessPool as error:
                    raise KilledProcessError(
                        "a process of `--processes` was killed, perhaps for want of memory. The shards that are done "
                        "are whole; the same command, with fewer `--processes`, goes on."
                    ) from error
    finally:
        torch.set_num_threads(before)


def _share(
    folder: str | Path, job: Job, tasks: list[Task], strict: bool, workers: Workers, progress: "Progress"
) -> None:
    progress.coded = workers.coded
    futures = [workers.submit(_run_one, str(folder), task, strict) for task in tasks]
    # from the other end, whatever the workers have not begun, and at once: they may still be starting
    for task, future in zip(reversed(tasks), reversed(futures)):
        _raise_first(futures)
        if future.cancel():
            tokenize_shard(folder, job, task, strict, progress.add)
            progress.show()
    remaining: set[Future] = {future for future in futures if not future.cancelled()}
    while remaining:
        _, remaining = wait(remaining, timeout=POLL_SECONDS)
        progress.show()
        _raise_first(futures)


def _raise_first(futures: list[Future]) -> None:
    for future in futures:
        if future.done() and not future.cancelled():
            future.result()


class Progress:
    """A bar of all images of a job, or of its shards where nothing has images or nobody knows how many."""

    def __init__(self, folder: str | Path, job: Job):
        self.folder, self.job, self.own = Path(folder), job, 0
        # what other processes have coded, where there are any
        self.coded: Any = None
        plans = [plan for splits in job.splits.values() for plan in splits.values()]
        has_images = any(job.source(name).kind.has_images for name in job.sources)
        is_known = has_images and all(plan["images"] is not None for plan in plans)
        self.total = sum(plan["images"] for plan in plans) if is_known else len(job.tasks())
        self.counts_images = is_known
        self.done = self._done()

    def __enter__(self) -> "Progress":
        unit = " images" if self.counts_images else " shards"
        self.bar = tqdm(total=self.total, initial=self.done, desc="tokenizing", unit=unit)
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            # some were left out, and some may have been an estimate
            self.bar.n = self.bar.total = self._done()
        self.bar.close()

    def add(self, images: int) -> None:
        """Count images that this process has coded."""
        self.own += images
        self.show()

    def show(self) -> None:
        """Move the bar."""
        others = 0 if self.coded is None else self.coded.value
        self.bar.n = self.done + self.own + others if self.counts_images else self._done()
        self.bar.total = max(self.total, self.bar.n)
        self.bar.refresh()

    def _done(self) -> int:
        if not self.counts_images:
            # asked again and again
            return sum((self.folder / task.report_name()).is_file() for task in self.job.tasks())
        found = [report for task in self.job.tasks() if (report := done_report(self.folder, task)) is not None]
        return sum(report["images"] for report in found)


def _begin_worker(threads: int, processor: str, coded: Any) -> None:
    global _coded
    _coded = coded
    # the text tokenizer would start a thread for every core
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # what a shard has begun to write is removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # one that cannot be loaded is told of by whoever needs it; here it would be a broken pool
    with suppress(Exception):
        loaded_encoder(processor)


def _end_with_parent() -> None:
    # a parent that is killed tells nobody
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _add_coded(images: int) -> None:
    with _coded.get_lock():
        _coded.value += images


def _run_one(folder: str, task: Task, strict: bool) -> bool:
    return tokenize_shard(folder, read_job(folder), task, strict, _add_coded)
