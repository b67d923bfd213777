# SPDX-License-Identifier: Apache-2.0
"""What a tokenization has to do, a job of many shards that anybody can write alone, and what became of it."""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, LargeList, List
from transformers.utils import logging

from tokenization.audio_codecs_moma import AUDIO

from ..errors_moma import InputError
from ..hub.names import no_folder
from ..utils.atomic_files import atomic_write, check_new_folder, check_writable
from ..utils.records import files_digest, read_record
from .encoding import has_caption_template, loaded_encoder, template_digest
from .sources import (
    HELD_OUT_RULE,
    READERS,
    TRAIN,
    VALIDATION,
    Source,
    read_sources,
    undecoded_rows,
    warn_of_shared_rows,
)


JOB_FILE = "job.json"
# what to do about one that is damaged, or is another's
DAMAGED = "Give a new folder, or delete this one."
MANIFEST_FILE = "manifest.json"
# rows of a manifest that are named; the shards' own reports name all
NAMED = 20
COUNTERS = ("left_out", "images_left_out", "changed")
FORMAT = 3
# rows of a shard grow with the data, so that the number of files stays in bounds
SHARD_ROWS = (1024, 16384)
TYPICAL_SHARDS = 64
# fewest images of a shard, where there are more than that, so that a few thousand are the work of several processes
SHARD_IMAGES = 256
# so much text takes about as long as an image
CHARACTERS_PER_IMAGE = 16384
# endings of files that rows, or the texts of images, stand in
ROW_FILES = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt")
# of files whose names and sizes say nothing of the rows
OTHER_FILES = ("", ".md")
# blocks that are read of all files of rows together, to tell whether they have changed
BLOCKS = 4096
# rows, spread over a split, that say what the others hold
LOOKED_AT = 64

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Task:
    """One shard of one split of a source."""

    source: str
    split: str
    shard: int
    shards: int

    def file_name(self, split: str) -> str:
        """File of the rows that go to a split, below the folder of all tokens."""
        return f"{self.source}/{split}-{self.shard:05d}-of-{self.shards:05d}.arrow"

    def report_name(self) -> str:
        """File that says what became of the rows; the shard is done where it exists."""
        return f"{self.source}/{self.split}-{self.shard:05d}-of-{self.shards:05d}.json"


@dataclass(frozen=True)
class Job:
    """All that decides on the tokens.

    Args:
        processor (`str`):
            folder of the [`MomaProcessor`].
        fingerprint (`str`):
            of that processor, from `processor_fingerprint`.
        sequence_length (`int`):
            longest document that cannot be cut, in tokens.
        packed (`bool`):
            whether training cuts texts wherever a sequence ends; otherwise longer ones are left out.
        seed (`int`):
            of the changes of images that further codings are made of.
        sources (`dict[str, dict]`):
            the recipe's section.
        splits (`dict[str, dict[str, dict]]`):
            of each source and split: `split` (the data set's name), `rows` (`None` where streamed), `shards`,
            `images` (an estimate), `rows_per_shard`, `list_columns`.
        held_out_rule (`str`):
            how rows are drawn that become `validation`.
        files (`dict[str, str | None]`):
            a hash of each source's files, see [`source_digest`].
        file_sizes (`dict[str, int | None]`):
            bytes of each source's files together, `None` where streamed.
        chat_template (`str`, *optional*):
            a hash of the processor's, where a source has chats.
    """

    processor: str
    fingerprint: str
    sequence_length: int
    packed: bool
    seed: int
    sources: dict[str, dict]
    splits: dict[str, dict[str, dict]]
    held_out_rule: str
    files: dict[str, str | None]
    file_sizes: dict[str, int | None]
    chat_template: str | None = None

    def source(self, name: str) -> Source:
        """Return the source of that name."""
        return read_sources({name: self.sources[name]})[0]

    def tasks(self) -> list[Task]:
        """Return all shards, in the order of sources and splits."""
        return [
            Task(name, split, shard, plan["shards"])
            for name, splits in self.splits.items()
            for split, plan in splits.items()
            for shard in range(plan["shards"])
        ]

    def output_splits(self, task: Task) -> list[str]:
        """Return the splits that the rows of a task go to."""
        return [TRAIN, VALIDATION] if self.holds_out(task) else [task.split]

    def holds_out(self, task: Task) -> bool:
        """Return whether some of the task's training rows become `validation`."""
        splits = self.splits[task.source]
        # one that `--splits` leaves out is held out all the same
        has_own = VALIDATION in splits or splits[task.split].get("has_validation", False)
        return task.split == TRAIN and not has_own and self.source(task.source).held_out > 0


def plan_job(
    sources: list[Source],
    processor_folder: str,
    sequence_length: int,
    packed: bool,
    seed: int,
    rows_per_shard: int | None = None,
    splits: Sequence[str] | None = None,
) -> Job:
    """Look at every source and say in which shards its tokens will lie.

    Args:
        sources (`list[Source]`):
            of a recipe.
        processor_folder (`str`):
            folder of a [`MomaProcessor`].
        sequence_length (`int`):
            see [`Job`], as the next two.
        packed (`bool`):
            see there.
        seed (`int`):
            see there.
        rows_per_shard (`int`, *optional*):
            by default so many that a split has about 64 shards of 256 images or more, or as much text as takes as
            long; at most 16,384 rows, and 1,024 where there are few.
        splits (`Sequence[str]`, *optional*):
            leave out all others; `train` must be among them.

    Raises:
        ValueError: a source cannot be opened, lacks a column or has no rows, or the processor has no codec of its
            sounds.
    """
    if splits is not None and TRAIN not in splits:
        raise InputError(f"--splits {' '.join(splits)}: {TRAIN!r} must be among them.")
    # of an earlier job of this process
    loaded_encoder.cache_clear()
    encoder, fingerprint = loaded_encoder(processor_folder)
    for source in sources:
        if source.kind.has_sounds and AUDIO not in encoder.processor.codecs:
            raise InputError(
                f"sources: {source.name!r} has sounds, and the processor {processor_folder!r} has no codec of them; "
                "`moma build-processor --audio-tokenizer` gives it one."
            )
    has_chats = any(source.kind.has_chats for source in sources)
    if has_chats and has_caption_template(encoder.processor):
        logger.warning(
            "sources: there are chats, and the processor's chat template is that of captions: chats of more than "
            "one question and one answer are left out. `moma build-processor` with a recipe of chats gives another."
        )
    names = {source.name: source.split_names() for source in sources}
    if unknown := set(splits or ()) - {name for found in names.values() for name in found}:
        found = "; ".join(f"{source!r} has {list(splits)}" for source, splits in names.items())
        raise InputError(f"--splits {' '.join(splits or ())}: no source has a split {min(unknown)!r}: {found}.")
    planned = {source.name: _plan_source(source, names[source.name], rows_per_shard, splits) for source in sources}
    warn_of_shared_rows(sources, names)
    return Job(
        processor=processor_folder,
        fingerprint=fingerprint,
        sequence_length=sequence_length,
        packed=packed,
        seed=seed,
        sources={source.name: source.fields() for source in sources},
        splits={name: plan for name, (plan, _) in planned.items()},
        held_out_rule=HELD_OUT_RULE,
        file_sizes={name: size for name, (_, size) in planned.items()},
        files={source.name: source_digest(source) for source in sources},
        chat_template=template_digest(encoder.processor) if has_chats else None,
    )


def _plan_source(
    source: Source, names: dict[str, str], rows_per_shard: int | None, splits: Sequence[str] | None
) -> tuple[dict[str, dict], int | None]:
    """Return the plan of every split, and the bytes of the source's files."""
    plan, file_size = {}, None
    for name, split in names.items():
        if splits is not None and name not in splits:
            continue
        rows = source.open(split)
        entry: dict[str, Any] = {"split": split, "list_columns": _list_columns(source, rows)}
        if isinstance(rows, Dataset):
            if len(rows) == 0:
                raise InputError(f"sources: {source.name!r} yields nothing: its split {split!r} has no rows.")
            images, weight = _row_means(source, rows)
            most = min(max(SHARD_ROWS[0], len(rows) // TYPICAL_SHARDS), SHARD_ROWS[1])
            in_time = int(max(SHARD_IMAGES, len(rows) * weight / TYPICAL_SHARDS) / weight) if weight else most
            size = rows_per_shard or max(1, min(most, in_time))
            size = -(-size // source.kind.batch_multiple) * source.kind.batch_multiple
            entry |= {"rows": len(rows), "images": round(len(rows) * images), "rows_per_shard": size}
            entry["shards"] = -(-len(rows) // size)
            file_size = rows.info.download_size
        else:
            entry |= {"rows": None, "images": None, "rows_per_shard": None, "shards": rows.num_shards}
            if name == TRAIN and VALIDATION not in names and source.held_out and rows.num_shards > 1:
                logger.warning(
                    f"sources: {source.name!r}: of a stream of {rows.num_shards} files other rows are held out than "
                    "without `streaming`: train and evaluate on tokens of one reading alone."
                )
        plan[name] = entry
    if VALIDATION in names and VALIDATION not in plan:
        plan[TRAIN]["has_validation"] = True
    return plan, file_size


def source_files(source: Source) -> list[Path]:
    """Return the files of this machine that a source may be read from, sorted; none of one on the Hub.

    Hidden files are left out, as `datasets` does.
    """
    patterns = [source.pattern()]
    # where `data` names a reader, `load` says what it reads
    if {"data_files", "data_dir"} & source.load.keys() and "/" not in source.data and not Path(source.data).exists():
        names = source.load.get("data_files") or ""
        entries = names.values() if isinstance(names, dict) else [names]
        flat = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry])]
        patterns = [os.path.join(source.load.get("data_dir") or "", str(name)) for name in flat]
    files = []
    for found in {Path(path) for pattern in patterns for path in glob(pattern, recursive=True)}:
        inside = [found] if found.is_file() else found.rglob("*")
        files += [file for file in inside if not any(part[0] == "." for part in file.relative_to(found).parts)]
    # a link may lead nowhere
    return sorted(file for file in files if file.suffix.lower() not in OTHER_FILES and file.is_file())


def source_digest(source: Source) -> str | None:
    """Return a hash of the files of a source: their names and sizes, and parts of those that rows stand in."""
    files = source_files(source)
    if not files:
        return None
    base = os.path.commonpath([file.parent.absolute() for file in files])
    names = [f"{os.path.relpath(file.absolute(), base)} {file.stat().st_size}" for file in files]
    of_rows = [file for file in files if file.suffix.lower() in ROW_FILES]
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape"))
    digest.update(files_digest(of_rows, max(2, BLOCKS // max(1, len(of_rows)))).encode())
    return digest.hexdigest()[:32]


def _row_means(source: Source, rows: Dataset) -> tuple[float, float]:
    """Return the images of a row in the mean, and in how many images' time it is tokenized, of some rows.

    A sound is taken to need the time of an image.
    """
    places = sorted({len(rows) * number // LOOKED_AT for number in range(LOOKED_AT)})
    looked_at = list(undecoded_rows(rows.select(places)))
    images = sum(len(source.kind.row_images(row)) for row in looked_at) / len(looked_at)
    sounds = sum(len(source.kind.row_sounds(row)) for row in looked_at) / len(looked_at)
    columns = source.kind.columns()
    characters = sum(_text_length(row[name]) for row in looked_at for name in columns) / len(looked_at)
    return images, images + sounds + characters / CHARACTERS_PER_IMAGE


def _text_length(value: Any) -> int:
    """Return the characters of all texts in a column, or in a part of one, but for images and where they lie."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_text_length(part) for name, part in value.items() if name not in ("image", "path", "url", "bytes"))
    return sum(map(_text_length, value)) if isinstance(value, (list, tuple)) else 0


def _list_columns(source: Source, rows: Dataset | IterableDataset) -> list[str]:
    """Return the stored columns that hold lists."""
    columns = source.kind.stored_columns()
    if not columns:
        return []
    if rows.features is not None:
        return [name for name in columns if isinstance(rows.features.get(name), (list, List, LargeList))]
    first = next(iter(rows), {})
    return [name for name in columns if isinstance(first.get(name), (list, tuple))]


def write_job(folder: str | Path, job: Job) -> Path:
    """Begin a folder of tokens, or go on in one that was begun with the same job.

    Args:
        folder (`str | Path`):
            new, or that of the job.
        job (`Job`):
            from [`plan_job`].

    Raises:
        ValueError: the folder holds tokens of another job, or something else.
    """
    path = Path(folder) / JOB_FILE
    content = {"format": FORMAT, **dataclasses.asdict(job)}
    if path.is_file():
        then = read_record(path, DAMAGED)
        _compare(folder, then, content)
        _warn_of_later_files(path, job)
        if then.get("processor") != job.processor:
            # where other processes look for it; the file stays as old as the tokens
            times = path.stat().st_atime, path.stat().st_mtime
            _write_json(path, {**then, "processor": job.processor})
            os.utime(path, times)
        check_writable(folder)
        return path
    check_new_folder(folder)
    return _write_json(path, content)


def _write_json(path: Path, content: dict) -> Path:
    text = json.dumps(content, indent=2) + "\n"
    return atomic_write(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _compare(folder: str | Path, then: dict, now: dict) -> None:
    now = json.loads(json.dumps(now))
    # by its fingerprint a processor is the same wherever it lies
    different = [name for name in now if name != "processor" and then.get(name) != now[name]]
    if different:
        name, before, after = _first_difference(different[0], then.get(different[0]), now[different[0]])
        what = f"that were begun with another {name}: {before!r} then, {after!r} now"
        if name.startswith("files: "):
            what = f"of {name.removeprefix('files: ')!r}, whose files have changed since"
        raise InputError(f"--output {str(folder)!r} holds tokens {what}. {DAMAGED}")


def _first_difference(name: str, then: Any, now: Any) -> tuple[str, Any, Any]:
    """Return the first entry of nested mappings that differs: its names, and both values."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            if then.get(key) != now.get(key):
                return _first_difference(f"{name}: {key}", then.get(key), now.get(key))
    return name, then, now


def _warn_of_later_files(path: Path, job: Job) -> None:
    """Tell of sources with a file of rows that was written after the job began; a change may keep a file's size."""
    began = path.stat().st_mtime
    for name in job.sources:
        files = source_files(job.source(name))
        later = [file for file in files if file.suffix in READERS and file.stat().st_mtime > began]
        if later:
            logger.warning(
                f"sources: {name!r}: {str(later[0])!r} was written after the tokens in {str(path.parent)!r} were "
                "begun. If it holds something else than then, give a new folder: what is done is not done again."
            )


def done_report(folder: str | Path, task: Task) -> dict[str, Any] | None:
    """Return the report of a shard, or `None` where the shard is yet to be written, or lacks a file that it wrote."""
    path = Path(folder) / task.report_name()
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        written = [split for split, number in report["written"].items() if number]
    # a folder that was copied in part
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return report if all((Path(folder) / task.file_name(split)).is_file() for split in written) else None


def read_job(folder: str | Path) -> Job:
    """Return the job that a folder of tokens was begun with."""
    path = Path(folder) / JOB_FILE
    if not path.is_file():
        raise InputError(f"{str(folder)!r} has no {JOB_FILE}: is it a folder that `moma tokenize` writes?")
    content = read_record(path, DAMAGED)
    if content.pop("format", None) != FORMAT:
        raise InputError(f"{str(path)!r} is of another format than {FORMAT}; tokenize anew with this version.")
    return Job(**content)


def write_manifest(folder: str | Path, job: Job) -> dict[str, Any]:
    """Add up the reports of all shards, once all are done.

    Args:
        folder (`str | Path`):
            of the tokens.
        job (`Job`):
            that they were written for.

    Returns:
        `dict`: `fingerprint`, `sequence_length`, `packed`, and `sources`: for each source its fields and, by split,
        what [`ShardReport`] counts.

    Raises:
        ValueError: a shard is not done, or nothing of a source is left to train on.
    """
    folder = Path(folder)
    sources: dict[str, Any] = {}
    for task in job.tasks():
        report = done_report(folder, task)
        if report is None:
            raise InputError(
                f"{str(folder)!r}: the shard {task.report_name()!r} is missing; start `moma tokenize` again."
            )
        entry = sources.setdefault(task.source, {"fields": job.sources[task.source], "read": {}, "splits": {}})
        _add_up(entry, task, report, job.output_splits(task))
    for name, entry in sources.items():
        if entry["splits"][TRAIN]["documents"] == 0:
            read = entry["read"][TRAIN]
            counts = [f"{count} {reason}" for reason, count in read["left_out"].items()]
            # all that is written is held out
            if held_out := read["rows"] - sum(read["left_out"].values()):
                counts.append(f"{held_out} held out (`held_out: 0` holds out none)")
            reasons = ", ".join(counts) or "it has no rows"
            first = f"; the first: {read['named'][0]['detail']!r}" if read["named"] else ""
            raise InputError(f"sources: {name!r} yields nothing to train on: of {read['rows']} rows {reasons}{first}.")
    manifest = {
        "fingerprint": job.fingerprint,
        "sequence_length": job.sequence_length,
        "packed": job.packed,
        "sources": sources,
    }
    _write_json(folder / MANIFEST_FILE, manifest)
    return manifest


def _add_up(entry: dict, task: Task, report: dict, splits: list[str]) -> None:
    read = entry["read"].setdefault(task.split, {"rows": 0, **{name: {} for name in COUNTERS}, "named": []})
    read["rows"] += report["rows"]
    for name in COUNTERS:
        read[name] = dict(Counter(read[name]) + Counter(report[name]))
    read["named"] += [{"shard": task.shard, **row} for row in report["named"]][: NAMED - len(read["named"])]
    for split in splits:
        total = entry["splits"].setdefault(split, {"documents": 0, "tokens": {"text": 0, "image": 0}, "files": []})
        written = report["written"].get(split, 0)
        total["documents"] += written
        for modality, number in report["tokens"].get(split, {}).items():
            total["tokens"][modality] = total["tokens"].get(modality, 0) + number
        if written:
            total["files"].append(task.file_name(split))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a folder of tokens."""
    path, where = Path(folder) / MANIFEST_FILE, f"`--tokens` {str(folder)!r}"
    if not path.parent.is_dir():
        raise InputError(f"{where}: {no_folder(str(folder))}.")
    if not path.is_file():
        likely = "`moma tokenize` writes one once all shards are done; is that the right folder?"
        if (path.parent / JOB_FILE).is_file():
            likely = "`moma tokenize` has not finished there; start it again, and it goes on."
        raise InputError(f"{where} has no {MANIFEST_FILE}: {likely}")
    manifest = read_record(path, "Remove it and tokenize again.")
    if not {"fingerprint", "sequence_length", "packed", "sources"} <= manifest.keys():
        raise InputError(f"{where}: {MANIFEST_FILE} is not one that `moma tokenize` wrote.")
    return manifest
