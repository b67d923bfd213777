# SPDX-License-Identifier: Apache-2.0
"""One shard of a tokenization: rows in, token ids and codes of images out."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset
from datasets.arrow_writer import ArrowWriter

from ..errors_moma import InputError
from ..utils.atomic_files import path_aside
from .encoding import DocumentEncoder, loaded_encoder
from .jobs import Job, Task, done_report, read_job
from .kinds.base import BATCH, Shard
from .reports import write_report
from .sources import TRAIN, VALIDATION, Source, read_sources, row_place, undecoded_rows


def load_encoder(folder: str, fingerprint: str) -> DocumentEncoder:
    """Return the encoder of a job."""
    encoder, found = loaded_encoder(folder)
    if found != fingerprint:
        # of an earlier job of this process
        loaded_encoder.cache_clear()
        encoder, found = loaded_encoder(folder)
    if found != fingerprint:
        raise InputError(f"--processor {folder!r} has changed since these tokens were begun; give a new `--output`.")
    return encoder


@functools.lru_cache(maxsize=8)
def open_rows(name: str, fields: str, split: str) -> Dataset | IterableDataset:
    """Return a split of a source, opened once in every process: its files may take long to list."""
    return read_sources({name: json.loads(fields)})[0].open(split)


def tokenize_shard(
    folder: str | Path, job: Job, task: Task, strict: bool = False, on_work: Callable[[int], object] | None = None
) -> bool:
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
        on_work (`Callable[[int], object]`, *optional*):
            is called with numbers of images that have been coded.

    Returns:
        Whether there was anything to do.

    Raises:
        ValueError: with `strict`, names the row and what is wrong with it; or the job is of another version, which
            drew other held-out rows.
    """
    folder = Path(folder)
    if done_report(folder, task) is not None:
        return False
    shard = SourceShard(job, task, load_encoder(job.processor, job.fingerprint), strict, on_work)
    kind = shard.source.kind
    with ShardFiles(folder, task, job.output_splits(task), kind.features(shard)) as files:
        for split, document in kind.documents(shard):
            files.write(split, document)
    write_report(folder / task.report_name(), shard.report)
    return True


class ShardFiles:
    """The Arrow files of a shard, one for each split, which are there whole or not at all."""

    def __init__(self, folder: Path, task: Task, splits: list[str], features: Features):
        self.paths = {split: folder / task.file_name(split) for split in splits}
        self.features = features

    def __enter__(self) -> "ShardFiles":
        self.aside = {split: path_aside(path) for split, path in self.paths.items()}
        self.writers = {
            split: ArrowWriter(path=str(path), features=self.features, writer_batch_size=BATCH)
            for split, path in self.aside.items()
        }
        self.counts = dict.fromkeys(self.paths, 0)
        return self

    def write(self, split: str, document: dict[str, Any]) -> None:
        """Add a document to the file of a split."""
        self.writers[split].write(document)
        self.counts[split] += 1

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            for split, writer in self.writers.items():
                if self.counts[split] and kind is None:
                    writer.finalize()
                # writes what it still holds, for which a full disk has no room
                with suppress(OSError) if kind is not None else nullcontext():
                    writer.close()
                if kind is None and self.counts[split]:
                    os.replace(self.aside[split], self.paths[split])
        finally:
            for aside in self.aside.values():
                aside.unlink(missing_ok=True)


class SourceShard(Shard):
    """A shard whose rows are read from its source."""

    def __init__(
        self,
        job: Job,
        task: Task,
        encoder: DocumentEncoder,
        strict: bool,
        on_work: Callable[[int], object] | None = None,
    ):
        self.job, self.task = job, task
        self.source: Source = job.source(task.source)
        self.plan = plan = job.splits[task.source][task.split]
        self.holds_out = job.holds_out(task)
        super().__init__(
            encoder=encoder,
            packed=job.packed,
            sequence_length=job.sequence_length,
            list_columns=plan["list_columns"],
            is_training=task.split == TRAIN,
            start=task.shard * (plan["rows_per_shard"] or 0),
            # where rows are streamed, nobody knows how many stand before a shard
            seed=job.seed if plan["rows"] is not None else job.seed + task.shard,
            root=self.source.image_root(),
            where=f"sources: {self.source.name!r}, split {plan['split']!r}",
            is_strict=strict,
            on_work=on_work,
        )

    def rows(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yield number, split and columns of every row that can be read."""
        fields = json.dumps(self.job.sources[self.task.source])
        rows = open_rows(self.task.source, fields, self.plan["split"])
        if isinstance(rows, Dataset):
            end = min(self.start + self.plan["rows_per_shard"], len(rows))
            part = undecoded_rows(rows.select(range(self.start, end)))
        else:
            part = undecoded_rows(rows.shard(num_shards=self.task.shards, index=self.task.shard))
        file = self.task.shard if self.plan["rows"] is None and self.task.shards > 1 else None
        for index, row in enumerate(part):
            place = row_place(self.start + index, file)
            split = VALIDATION if self.holds_out and self.source.is_held_out(place) else self.task.split
            self.report.rows += 1
            yield self.start + index, split, row


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
