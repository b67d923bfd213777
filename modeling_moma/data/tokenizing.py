# SPDX-License-Identifier: Apache-2.0
"""The shards of a tokenization, rows in, token ids and codes of images out, in one process or in several."""

import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from ..errors_moma import InputError
from ..utils.atomic_files import atomic_write, path_aside
from ..utils.errors import KilledProcessError
from .encoding import loaded_encoder
from .jobs import Job, Task, done_report, read_job
from .kinds.base import BATCH, Shard
from .sources import TRAIN, VALIDATION, read_sources, row_place, undecoded_rows


@functools.lru_cache(maxsize=8)
def open_rows(name: str, fields: str, split: str) -> Dataset | IterableDataset:
    """Return a split of a source, opened once in every process: its files may take long to list."""
    return read_sources({name: json.loads(fields)})[0].open(split)


def tokenize_shard(folder: str | Path, job: Job, task: Task, strict: bool = False) -> bool:
    """Write one shard, unless it is there: its tokens aside and renamed, and its report last.

    Args:
        folder (`str | Path`):
            of all tokens.
        job (`Job`):
            from `plan_job`.
        task (`Task`):
            one of `job.tasks()`.
        strict (`bool`, *optional*, defaults to `False`):
            stop at the first row that cannot be used.

    Returns:
        Whether there was anything to do.

    Raises:
        ValueError: with `strict`, names the row and what is wrong with it; or the job is of another version, which
            drew other held-out rows.
    """
    folder = Path(folder)
    if done_report(folder, task) is not None:
        return False
    shard, kind = _open_shard(job, task, strict), job.source(task.source).kind
    paths = {split: folder / task.file_name(split) for split in job.output_splits(task)}
    with _shard_files(paths, kind.features(shard)) as write:
        for split, document in kind.documents(shard):
            write(split, document)
    report = json.dumps(vars(shard.report)) + "\n"
    # the sign that the shard is done
    atomic_write(folder / task.report_name(), lambda aside: aside.write_text(report, encoding="utf-8"))
    return True


@contextmanager
def _shard_files(paths: dict[str, Path], features: Features) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Yield what writes a document into the Arrow file of a split; all files are there whole or not at all."""
    aside = {split: path_aside(path) for split, path in paths.items()}
    writers = {
        split: ArrowWriter(path=str(path), features=features, writer_batch_size=BATCH) for split, path in aside.items()
    }
    counts = dict.fromkeys(paths, 0)

    def write(split: str, document: dict[str, Any]) -> None:
        writers[split].write(document)
        counts[split] += 1

    try:
        yield write
        for split in [split for split, count in counts.items() if count]:
            writers[split].finalize()
            os.replace(aside[split], paths[split])
    finally:
        for split, writer in writers.items():
            # writes what it still holds, for which a full disk has no room
            with suppress(OSError):
                writer.close()
            aside[split].unlink(missing_ok=True)


def _open_shard(job: Job, task: Task, strict: bool) -> Shard:
    """Return a shard whose rows are read from its source."""
    source, plan = job.source(task.source), job.splits[task.source][task.split]
    start = task.shard * (plan["rows_per_shard"] or 0)
    encoder, fingerprint = loaded_encoder(job.processor)
    if fingerprint != job.fingerprint:
        raise InputError(
            f"--processor {job.processor!r} has changed since these tokens were begun; give a new `--output`."
        )
    return Shard(
        source_rows=_source_rows(job, task, start),
        encoder=encoder,
        packed=job.packed,
        sequence_length=job.sequence_length,
        list_columns=plan["list_columns"],
        is_training=task.split == TRAIN,
        start=start,
        # where rows are streamed, nobody knows how many stand before a shard
        seed=job.seed if plan["rows"] is not None else job.seed + task.shard,
        root=source.image_root(),
        where=f"sources: {source.name!r}, split {plan['split']!r}",
        is_strict=strict,
    )


def _source_rows(job: Job, task: Task, start: int) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield number, split and columns of the rows of a shard."""
    source, plan, holds_out = job.source(task.source), job.splits[task.source][task.split], job.holds_out(task)
    rows = open_rows(task.source, json.dumps(job.sources[task.source]), plan["split"])
    if isinstance(rows, Dataset):
        part = undecoded_rows(rows.select(range(start, min(start + plan["rows_per_shard"], len(rows)))))
    else:
        part = undecoded_rows(rows.shard(num_shards=task.shards, index=task.shard))
    file = task.shard if plan["rows"] is None and task.shards > 1 else None
    for number, row in enumerate(part, start):
        is_held_out = holds_out and source.is_held_out(row_place(number, file))
        yield number, VALIDATION if is_held_out else task.split, row


def run_tasks(folder: str | Path, job: Job, processes: int, threads: int = 1, strict: bool = False) -> None:
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

    Raises:
        ValueError: what a shard raised.
        RuntimeError: a process was killed.
    """
    tasks = [task for task in job.tasks() if done_report(folder, task) is None]
    total = len(job.tasks())
    # of an earlier job of this process
    open_rows.cache_clear()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tqdm(total=total, initial=total - len(tasks), desc="tokenizing", unit=" shards") as bar:
            others = min(processes, len(tasks)) - 1
            if others > 0:
                _share(folder, job, tasks, others, threads, strict, bar)
            else:
                for task in tasks:
                    tokenize_shard(folder, job, task, strict)
                    bar.update()
    finally:
        torch.set_num_threads(before)


def _share(
    folder: str | Path,
    job: Job,
    tasks: list[Task],
    others: int,
    threads: int,
    strict: bool,
    bar: tqdm,
) -> None:
    """Write shards in so many other processes and in this one."""
    # a forked process would share the locks of threads that it does not have
    pool = ProcessPoolExecutor(others, multiprocessing.get_context("spawn"), _begin_worker, (threads,))
    strangers = set(multiprocessing.active_children())
    try:
        with _ctrl_c_ignored():
            waiting = {pool.submit(_run_one, str(folder), task, strict): task for task in tasks}
        # from the other end, whatever the workers have not begun, and at once: they may still be starting
        for future, task in reversed(list(waiting.items())):
            for ended in filter(Future.done, waiting):
                ended.result()
            if future.cancel():
                del waiting[future]
                tokenize_shard(folder, job, task, strict)
                bar.update()
        for future in as_completed(waiting):
            future.result()
            bar.update()
    except BaseException as error:
        for process in set(multiprocessing.active_children()) - strangers:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise KilledProcessError(
                "a process of `--processes` was killed, perhaps for want of memory. The shards that are done "
                "are whole; the same command, with fewer `--processes`, goes on."
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Start processes that ignore Ctrl-C: this one, which hears of it as well, ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin_worker(threads: int) -> None:
    # the text tokenizer would start a thread for every core
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # what a shard has begun to write is removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a parent that is killed tells nobody
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_one(folder: str, task: Task, strict: bool) -> bool:
    return tokenize_shard(folder, read_job(folder), task, strict)


class TokenizeStep:
    """A step of a [datatrove](https://github.com/huggingface/datatrove) pipeline that writes shards of tokens.

    Each rank of `LocalPipelineExecutor`, `SlurmPipelineExecutor` or `RayPipelineExecutor` writes one in `world_size`
    shards of what `moma tokenize --plan` has planned; those that are there are left as they are.

    Args:
        folder (`str`):
            of the tokens, on a disk that all machines share.
        strict (`bool`, *optional*, defaults to `False`):
            Stop at the first row that cannot be used.
    """

    # what datatrove calls it in its logs
    name = "tokenize shards"

    def __init__(self, folder: str, strict: bool = False):
        self.folder, self.strict = os.path.abspath(folder), strict
        self.home = os.getcwd()

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator:
        """Write the shards of one rank, then pass on what the step before it gave."""
        # paths of a recipe are those of where it was planned
        os.chdir(self.home)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        torch.set_num_threads(1)
        job = read_job(self.folder)
        for task in job.tasks()[rank::world_size]:
            tokenize_shard(self.folder, job, task, self.strict)
        yield from data or ()
