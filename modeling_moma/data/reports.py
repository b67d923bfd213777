# SPDX-License-Identifier: Apache-2.0
"""What became of the rows of a shard, and of all shards: counts, and the names of those that were left out."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors_moma import InputError
from ..hub.names import no_folder
from ..utils.atomic_files import atomic_write
from .jobs import JOB_FILE, MANIFEST_FILE, Job, Task, done_report
from .kinds.base import ShardReport
from .sources import TRAIN


# rows of a manifest that are named; the shards' own reports name all
NAMED = 20
COUNTERS = ("left_out", "images_left_out", "changed")


def write_report(path: Path, report: ShardReport) -> None:
    """Write the shard's report, the sign that the shard is done."""
    content = vars(report)
    atomic_write(path, lambda aside: aside.write_text(json.dumps(content) + "\n", encoding="utf-8"))


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
            raise InputError(_nothing_left(name, entry["read"][TRAIN]))
    manifest = {
        "fingerprint": job.fingerprint,
        "sequence_length": job.sequence_length,
        "packed": job.packed,
        "sources": sources,
    }
    text = json.dumps(manifest, indent=2) + "\n"
    atomic_write(folder / MANIFEST_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
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


def _nothing_left(name: str, read: dict) -> str:
    counts = [f"{count} {reason}" for reason, count in read["left_out"].items()]
    # all that is written is held out
    if held_out := read["rows"] - sum(read["left_out"].values()):
        counts.append(f"{held_out} held out (`held_out: 0` holds out none)")
    reasons = ", ".join(counts) or "it has no rows"
    first = f"; the first: {read['named'][0]['detail']!r}" if read["named"] else ""
    return f"sources: {name!r} yields nothing to train on: of {read['rows']} rows {reasons}{first}."


def _is_manifest(manifest: Any) -> bool:
    """Return whether this has all that the readers of tokens look at."""
    is_whole = isinstance(manifest, dict) and {"fingerprint", "sequence_length", "packed"} <= manifest.keys()
    sources = manifest.get("sources") if is_whole else None
    if not isinstance(sources, dict):
        return False
    for entry in sources.values():
        if not isinstance(entry, dict) or not isinstance(entry.get("fields"), dict):
            return False
        splits = entry.get("splits")
        if not isinstance(splits, dict):
            return False
        if not all(isinstance(split, dict) and {"documents", "files"} <= split.keys() for split in splits.values()):
            return False
    return True


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
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if _is_manifest(manifest):
            return manifest
        problem = "it is not one that `moma tokenize` wrote"
    except ValueError as error:
        problem = f"it cannot be read as JSON ({error})"
    raise InputError(f"{where}: {MANIFEST_FILE}: {problem}; was it changed by hand? Remove it and tokenize again.")
