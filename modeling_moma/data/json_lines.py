# SPDX-License-Identifier: Apache-2.0
"""Files of JSON lines with broken ones among them: which they are, and a copy in which each is a row that says so."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from datasets import config

from ..utils.atomic_files import atomic_write


# column of the copies: what is wrong with the line, empty where nothing is
BROKEN_LINE = "_broken_line"
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def is_json_lines(path: Path) -> bool:
    """Return whether a file has a JSON object on each line, by its name or its first line."""
    if path.suffix in (".jsonl", ".ndjson"):
        return True
    with path.open("rb") as file:
        return _parse(file.readline())[1] is None


def sanitized_copy(path: Path) -> Path:
    """Return a copy of a file of JSON lines, beside what `datasets` keeps.

    Every row of it has the column [`BROKEN_LINE`]; rows of broken lines have no other.
    """
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:32]
    copy = Path(config.HF_DATASETS_CACHE) / "moma-json-lines" / f"{key}.jsonl"
    if not copy.is_file():
        atomic_write(copy, lambda aside: _write(path, aside))
    return copy


def _write(path: Path, target: Path) -> None:
    with path.open("rb") as source, target.open("wb") as out:
        for number, line in enumerate(source, 1):
            line = line.strip()
            if not line:
                continue
            value, problem = _parse(line)
            if problem is not None:
                said = f"line {number} of {path.name}: {problem}"
                out.write(json.dumps({BROKEN_LINE: said}).encode() + b"\n")
                continue
            # as text, so that all else in the line stays as it is
            separator = b", " if value else b""
            out.write(line[:-1] + separator + f'"{BROKEN_LINE}": ""}}\n'.encode())


def has_broken_lines(path: Path) -> bool:
    """Return whether a file has a JSON object on each line, but for some lines that are none."""
    if not is_json_lines(path):
        return False
    with path.open("rb") as file:
        return any(line.strip() and _parse(line)[1] for line in file)


def _parse(line: bytes) -> tuple[Any, str | None]:
    """Return the value of a line, and what is wrong with it."""
    try:
        value = json.loads(line)
        # half of a pair of surrogates is valid JSON, of which no text can be made
        if SURROGATE.search(line):
            json.dumps(value, ensure_ascii=False).encode()
    # what is no UTF-8 is a ValueError as well
    except ValueError as error:
        return None, str(error)
    return value, None if isinstance(value, dict) else f"a {type(value).__name__} and no object"
