# SPDX-License-Identifier: Apache-2.0
"""The file of the study's results: a row for each finished branch."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from filelock import FileLock

from modeling_moma.utils.atomic_files import atomic_write


KEY = ("run", "budget")
# values that are JSON
NESTED = ("config", "hardware", "counts", "curve", "losses", "experts")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; none where there is no file."""
    return pyarrow.parquet.read_table(path).to_pylist() if path.is_file() else []


def has_row(path: Path, run: str, budget: int) -> bool:
    """Return whether a branch has its row."""
    return any((row["run"], row["budget"]) == (run, budget) for row in read_rows(path))


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row, or put it in the place of the one of the same branch; several processes may do so at once.

    Args:
        path (`Path`):
            of the file, which is written aside and renamed.
        row (`dict[str, Any]`):
            plain values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        key = tuple(row[name] for name in KEY)
        rows = [other for other in read_rows(path) if tuple(other[name] for name in KEY) != key]
        rows = sorted([*rows, row], key=lambda entry: tuple(entry[name] for name in KEY))
        # a column that only some rows have is none of those that pyarrow infers
        names = list(dict.fromkeys(name for entry in rows for name in entry))
        table = pyarrow.Table.from_pylist([{name: entry.get(name) for name in names} for entry in rows])
        atomic_write(path, lambda aside: pyarrow.parquet.write_table(table, aside, compression="zstd"))
