# SPDX-License-Identifier: Apache-2.0
"""Tokens as they lie on the disk, mapped into memory: a column of any number of shards, a row at a time."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..errors_moma import InputError
from ..utils.messages import one_line


class ShardTable:
    """The rows of several Arrow files, of which only those that are asked for are read."""

    def __init__(self, paths: Sequence[str | Path]):
        self.paths = list(paths)
        # what `datasets` maps into memory stays there as long as the data set does
        self._parts = [_opened(path) for path in self.paths]
        self._columns = {
            name: [chunk for part in self._parts for chunk in part.data.column(name).chunks]
            for name in (self._parts[0].column_names if self._parts else [])
        }
        lengths = [len(chunk) for chunk in next(iter(self._columns.values()), [])]
        self._numbers: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
        self._starts = list(accumulate(lengths, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self._columns)

    def __getstate__(self) -> dict[str, Any]:
        # workers map the files anew
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["paths"])

    def numbers(self, column: str, row: int) -> np.ndarray:
        """Return the list of numbers in a row, not copied."""
        index, place = self._place(row)
        if (column, index) not in self._numbers:
            self._numbers[column, index] = _as_arrays(self._columns[column][index])
        values, offsets = self._numbers[column, index]
        return values[offsets[place] : offsets[place + 1]]

    def lengths(self, column: str) -> Iterator[np.ndarray]:
        """Yield how many numbers the rows of each file have."""
        for chunk in self._columns.get(column, []):
            yield np.diff(_as_arrays(chunk)[1])

    def value(self, column: str, row: int) -> Any:
        """Return the text, or the list of texts, in a row."""
        index, place = self._place(row)
        return self._columns[column][index][place].as_py()

    def _place(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        index = bisect_right(self._starts, row) - 1
        return index, row - self._starts[index]


def _opened(path: str | Path) -> Dataset:
    try:
        return Dataset.from_file(str(path))
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"the tokens {str(path)!r} cannot be read ({type(error).__name__}: {one_line(error, 200)}): was their "
            "folder copied in part? `moma tokenize` writes a shard anew whose file is missing."
        ) from error


def _as_arrays(chunk: pa.ListArray | pa.FixedSizeListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of all rows of a chunk, not copied, and where each row's begin."""
    if isinstance(chunk, pa.FixedSizeListArray):
        offsets = (chunk.offset + np.arange(len(chunk) + 1)) * chunk.type.list_size
    else:
        offsets = chunk.offsets.to_numpy()
    return chunk.values.to_numpy(zero_copy_only=True), offsets
