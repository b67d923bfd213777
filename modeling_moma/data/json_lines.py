# SPDX-License-Identifier: Apache-2.0
"""Files of JSON lines with broken ones among them: which they are, and a copy in which each is a row that says so."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from datasets import config

from ..training.files import write_aside


# column of the copies: what is wrong with the line, empty where nothing is
BROKEN_LINE = "_broken_line"


def broken_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields number (from 1) and problem of every line that is no JSON object, empty ones aside."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            problem = _problem(line)
            if problem and line.strip():
                yield number, problem


def is_json_lines(path: Path) -> bool:
    """Whether a file has a JSON object on each line, by its name or its first line."""
    if path.suffix in (".jsonl", ".ndjson"):
        return True
    with path.open("rb") as file:
        return _problem(file.readline()) is None


def mended_copy(path: Path) -> Path:
    """
    A copy, beside what `datasets` keeps, of a file with broken lines; the file itself where none is broken.

    Every row of it has the column [`BROKEN_LINE`]; rows of broken lines have no other.
    """
    if not is_json_lines(path) or next(broken_lines(path), None) is None:
        return path
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:32]
    copy = Path(config.HF_DATASETS_CACHE) / "moma-json-lines" / f"{key}.jsonl"
    if not copy.is_file():
        write_aside(copy, lambda aside: _write(path, aside))
    return copy


def _write(path: Path, target: Path) -> None:
    with path.open("rb") as source, target.open("wb") as out:
        for number, line in enumerate(source, 1):
            line = line.strip()
            if not line:
                continue
            problem = _problem(line)
            if problem is not None:
                said = f"line {number} of {path.name}: {problem}"
                out.write(json.dumps({BROKEN_LINE: said}).encode() + b"\n")
                continue
            # as text, so that all else in the line stays as it is
            separator = b"" if json.loads(line) == {} else b", "
            out.write(line[:-1] + separator + f'"{BROKEN_LINE}": ""}}\n'.encode())


def _problem(line: bytes) -> str | None:
    try:
        value = json.loads(line)
    # what is no UTF-8 is a ValueError as well
    except ValueError as error:
        return str(error)
    return None if isinstance(value, dict) else f"a {type(value).__name__} and no object"


__all__ = ["BROKEN_LINE", "broken_lines", "is_json_lines", "mended_copy"]
