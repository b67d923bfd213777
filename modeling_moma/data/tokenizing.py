# SPDX-License-Identifier: Apache-2.0
"""One shard of a tokenization: rows in, token ids and codes of pictures out."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image

import modeling_moma  # noqa: F401, without it a processor that lies beside a model asks to run the model's code
from tokenization.augmentation_moma import NUM_DRAWS, augment_pictures

from ..errors_moma import InputError
from ..utils.atomic_files import path_aside
from ..utils.hardware import supports_bf16
from .encoding import DocumentEncoder, loaded_encoder
from .jobs import BATCH, Job, Task
from .json_lines import BROKEN_LINE
from .kinds import CaptionKind, InterleavedKind, TextKind
from .pictures import LeftOut, read_picture
from .reports import ShardReport, write_report
from .segments import PictureSegment, read_messages, read_segments
from .sources import TRAIN, VALIDATION, Source, read_sources, undecoded_rows
from .templates import Template


# random numbers that are passed over at once
_SKIPPED_DRAWS = 1 << 22


def load_encoder(folder: str, fingerprint: str) -> DocumentEncoder:
    """
    The encoder of a job.

    Raises:
        ValueError: the processor is another one than the job was begun with.
    """
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
    """A split of a source, opened once in every process: its files may take long to list.

    Args:
        name: of the source.
        fields: of it, as JSON.
        split: the data set's name of it.
    """
    return read_sources({name: json.loads(fields)})[0].open(split)


def tokenize_shard(
    folder: str | Path, job: Job, task: Task, strict: bool = False, on_work: Callable[[int], object] | None = None
) -> bool:
    """
    Writes one shard, unless it is there: its tokens aside and renamed, and its report last.

    Args:
        folder: of all tokens.
        job: from `plan_job`.
        task: one of `job.tasks()`.
        strict: stop at the first row that cannot be used.
        on_work: is called with numbers of pictures that have been coded.

    Returns:
        Whether there was anything to do.

    Raises:
        ValueError: with `strict`, names the row and what is wrong with it.
    """
    folder = Path(folder)
    if (folder / task.report_name()).is_file():
        return False
    writer = ShardWriter(job, task, load_encoder(job.processor, job.fingerprint), strict, on_work)
    splits = job.output_splits(task)
    documents = writer.documents()
    with ShardFiles(folder, task, splits, writer.features()) as files:
        for split, document in documents:
            files.write(split, document)
    write_report(folder / task.report_name(), writer.report)
    return True


class ShardFiles:
    """The Arrow files of a shard, one for each split, which are there whole or not at all.

    Args:
        folder: of all tokens.
        task: the shard.
        splits: that its rows go to.
        features: of its documents.
    """

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


class ShardWriter:
    """
    Reads the rows of a shard and makes documents of them.

    Args:
        job: see [`tokenize_shard`], as the others.
        task: see there.
        encoder: of the job's processor.
        strict: see there.
        on_work: see there.
    """

    def __init__(
        self,
        job: Job,
        task: Task,
        encoder: DocumentEncoder,
        strict: bool,
        on_work: Callable[[int], object] | None = None,
    ):
        self.job, self.task, self.encoder, self.strict = job, task, encoder, strict
        self.on_work = on_work
        self.source: Source = job.source(task.source)
        self.plan = job.splits[task.source][task.split]
        self.report = ShardReport()
        self.root = self.source.picture_root()
        self.holds_out = job.holds_out(task)
        self.processor = encoder.processor
        self.start = task.shard * (self.plan["rows_per_shard"] or 0)
        kind = self.source.kind
        self.codings = kind.codings if isinstance(kind, CaptionKind) and task.split == TRAIN else 1
        # where rows are streamed, nobody knows how many stand before a shard
        seed = job.seed if self.plan["rows"] is not None else job.seed + task.shard
        self.generator = augmentation_generator(seed, self.start * (self.codings - 1))

    def features(self) -> Features:
        """Types of a document's fields."""
        kind = self.source.kind
        if not isinstance(kind, CaptionKind):
            return Features({"row": Value("int64"), "input_ids": List(Value("int32"))})
        code = Value("uint16" if self.processor.codebook_size <= 1 << 16 else "int32")
        columns = {
            name: List(Value("string")) if name in self.plan["list_columns"] else Value("string")
            for name in kind.text_columns()
        }
        # held-out pictures are not changed
        codes = List(code, length=self.codings * self.processor.image_seq_length)
        return Features({"row": Value("int64"), "codes": codes, **columns})

    def documents(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields split and fields of every document."""
        kind = self.source.kind
        if isinstance(kind, CaptionKind):
            yield from self._captions(kind)
        elif isinstance(kind, InterleavedKind):
            yield from self._interleaved(kind)
        elif isinstance(kind, TextKind):
            yield from self._texts(kind)
        else:
            raise InputError(f"sources: {self.source.name!r} is of pictures alone, which no model reads.")

    def _rows(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        fields = json.dumps(self.job.sources[self.task.source])
        rows = open_rows(self.task.source, fields, self.plan["split"])
        if isinstance(rows, Dataset):
            end = min(self.start + self.plan["rows_per_shard"], len(rows))
            part = undecoded_rows(rows.select(range(self.start, end)))
        else:
            part = undecoded_rows(rows.shard(num_shards=self.task.shards, index=self.task.shard))
        for index, row in enumerate(part):
            place = str(self.start + index) if isinstance(rows, Dataset) else f"{self.task.shard}/{index}"
            split = VALIDATION if self.holds_out and self.source.is_held_out(place) else self.task.split
            self.report.rows += 1
            if row.get(BROKEN_LINE):
                self._leave_out(self.start + index, LeftOut("JSON broken", row[BROKEN_LINE]))
                continue
            yield self.start + index, split, row

    def _leave_out(self, row: int, error: LeftOut, is_whole: bool = True) -> None:
        if self.strict:
            raise InputError(
                f"sources: {self.source.name!r}, split {self.plan['split']!r}, row {row}: {error}. Without `--strict` "
                "such rows are left out."
            ) from error
        self.report.leave_out(row, error, is_whole)

    def _picture(self, value: Any, min_side: int) -> torch.Tensor:
        picture, changes = read_picture(value, self.root, min_side)
        self.report.changed.update(changes)
        return self._pixel_values(picture)

    def _pixel_values(self, picture: Image.Image) -> torch.Tensor:
        return self.processor.image_processor([picture], return_tensors="pt")["pixel_values"]

    def _captions(self, kind: CaptionKind) -> Iterator[tuple[str, dict[str, Any]]]:
        waiting: list[tuple[int, str, dict, int]] = []
        pictures: list[torch.Tensor] = []
        for index, split, row in self._rows():
            try:
                columns, length = self._caption_columns(kind, row)
                pixel_values = self._picture(row[kind.image], kind.min_side)
            except LeftOut as error:
                self._leave_out(index, error)
                continue
            pictures.append(pixel_values)
            waiting.append((index, split, columns, length))
            if len(waiting) == BATCH:
                yield from self._coded(waiting, pictures)
                waiting, pictures = [], []
        if waiting:
            yield from self._coded(waiting, pictures)

    def _caption_columns(self, kind: CaptionKind, row: dict[str, Any]) -> tuple[dict[str, Any], int]:
        columns = {name: _as_stored(row[name], name in self.plan["list_columns"]) for name in kind.text_columns()}
        templates = kind.templates()
        if not templates[0].is_full(columns):
            raise LeftOut("caption empty", f"nothing in {templates[0].columns}")
        lengths = [len(self.encoder.text_ids(entry.render(columns))) for entry in templates if entry.is_full(columns)]
        # beginning and end of the document and of the picture
        around = len(self.encoder.beginning) + 3
        longest = max(lengths) + self.processor.image_seq_length + around
        if longest > self.job.sequence_length:
            raise LeftOut("caption too long", f"{longest} tokens with its picture, over {self.job.sequence_length}")
        return columns, lengths[0] + around

    @torch.inference_mode()
    def _coded(self, waiting: list[tuple[int, str, dict, int]], pictures: list[torch.Tensor]) -> Iterator:
        batch = torch.cat(pictures)
        codings = [self._codes(batch)]
        device = self.processor.vq_model.device.type
        # codings of changed pictures are noise by intent, so the faster precision serves
        is_fast = torch.autocast(device, dtype=torch.bfloat16) if supports_bf16(device) else nullcontext()
        with is_fast:
            while len(codings) < self.codings:
                codings.append(self._codes(augment_pictures(batch, self.generator, 1.0)))
        codes = torch.stack(codings, dim=1).flatten(1)
        self._count(len(waiting))
        for (index, split, columns, length), row_codes in zip(waiting, codes.tolist(), strict=True):
            self.report.write_document(split, length, self.processor.image_seq_length)
            yield split, {"row": index, "codes": row_codes, **columns}

    def _count(self, pictures: int) -> None:
        self.report.pictures += pictures
        if self.on_work is not None:
            self.on_work(pictures)

    def _codes(self, pixel_values: torch.Tensor) -> torch.Tensor:
        model = self.processor.vq_model
        return model.get_image_tokens(pixel_values.to(model.device, torch.float32)).cpu()

    def _interleaved(self, kind: InterleavedKind) -> Iterator[tuple[str, dict[str, Any]]]:
        waiting: list[tuple[int, str, list[Any]]] = []
        num_pictures = 0
        for index, split, row in self._rows():
            try:
                parts = self._read_parts(kind, index, row)
            except LeftOut as error:
                self._leave_out(index, error)
                continue
            waiting.append((index, split, parts))
            num_pictures += sum(isinstance(part, torch.Tensor) for part in parts)
            if num_pictures >= BATCH or len(waiting) >= BATCH:
                yield from self._coded_documents(waiting)
                waiting, num_pictures = [], 0
        yield from self._coded_documents(waiting)

    def _read_parts(self, kind: InterleavedKind, index: int, row: dict[str, Any]) -> list[Any]:
        """Ids of texts, and pixel values wherever a picture stands."""
        if kind.messages is not None:
            return self._read_chat(kind, row)
        parts: list[Any] = []
        for part in read_segments(kind, row):
            if not isinstance(part, PictureSegment):
                parts.append(self.encoder.text_ids(part))
                continue
            try:
                parts.append(self._picture(part.value, kind.min_side))
            # the rest of the document makes sense without it
            except LeftOut as error:
                self._leave_out(index, error, is_whole=False)
        if not any(len(part) for part in parts):
            raise LeftOut("document empty", "neither texts nor pictures")
        return [self.encoder.beginning, *parts, [self.encoder.eos]]

    def _read_chat(self, kind: InterleavedKind, row: dict[str, Any]) -> list[Any]:
        text, values = read_messages(kind, row, self.processor)
        if not text:
            raise LeftOut("document empty", "no message")
        ids = self.processor.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
        pictures = iter([self._picture(value, kind.min_side) for value in values])
        parts: list[Any] = [[]]
        for token in ids:
            if token == self.processor.image_token_id:
                parts += [next(pictures), []]
            else:
                parts[-1].append(token)
        return parts

    @torch.inference_mode()
    def _coded_documents(self, waiting: list[tuple[int, str, list[Any]]]) -> Iterator:
        pictures = [part for _, _, parts in waiting for part in parts if isinstance(part, torch.Tensor)]
        chunks = [torch.cat(pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH)]
        codes = iter([row for chunk in chunks for row in self._codes(chunk).tolist()])
        self._count(len(pictures))
        for index, split, parts in waiting:
            ids, num_pictures = [], 0
            for part in parts:
                is_picture = isinstance(part, torch.Tensor)
                num_pictures += is_picture
                ids += self.processor.picture_ids(next(codes)) if is_picture else part
            document = self._document(index, split, ids, num_pictures * self.processor.image_seq_length)
            if document is not None:
                yield document

    def _texts(self, kind: TextKind) -> Iterator[tuple[str, dict[str, Any]]]:
        template = Template(kind.text)
        for index, split, row in self._rows():
            text = template.render(row) if template.is_full(row) else ""
            if not text.strip():
                self._leave_out(index, LeftOut("text empty", f"nothing in {template.columns}"))
                continue
            document = self._document(index, split, self.encoder.document([text]), 0)
            if document is not None:
                yield document

    def _document(self, index: int, split: str, ids: list[int], num_codes: int) -> tuple[str, dict] | None:
        if not self.job.packed and len(ids) > self.job.sequence_length:
            message = f"{len(ids)} tokens, over {self.job.sequence_length}; packed training cuts it instead"
            self._leave_out(index, LeftOut("document too long", message))
            return None
        self.report.write_document(split, len(ids) - num_codes, num_codes)
        return split, {"row": index, "input_ids": ids}


def augmentation_generator(seed: int, pictures: int) -> torch.Generator:
    """The random numbers of changed pictures, behind those of so many pictures that other shards change."""
    generator = torch.Generator().manual_seed(seed)
    draws = pictures * NUM_DRAWS
    while draws:
        size = min(draws, _SKIPPED_DRAWS)
        torch.rand(size, generator=generator)
        draws -= size
    return generator


def _as_stored(value: Any, is_list: bool) -> Any:
    if is_list:
        return [str(entry) for entry in value or [] if entry is not None]
    return "" if value is None else str(value)


__all__ = ["augmentation_generator", "tokenize_shard"]
