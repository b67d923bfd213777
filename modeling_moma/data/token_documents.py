# SPDX-License-Identifier: Apache-2.0
"""Documents of a source by their number, tokens as they lie on the disk, and where documents may be cut."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

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


class Documents(Protocol):
    """Documents of one split of one source."""

    name: str
    can_be_cut: bool
    has_choice: bool

    def __len__(self) -> int: ...

    def ids(self, row: int, rng: np.random.Generator) -> Sequence[int] | np.ndarray:
        """Return the token ids of a row, drawn with `rng` where there is a choice."""
        ...

    def lengths(self) -> np.ndarray | None:
        """Return the tokens of every row, `None` where only making it tells."""
        ...

    def held_out(self, rows: Sequence[int] | None = None) -> Sequence[Any]:
        """Return what losses are measured on: token ids of every document, or of some rows, without chance."""
        ...


class TokenDocuments:
    """Documents whose ids were made once, which may be cut in their texts."""

    can_be_cut, has_choice = True, False

    def __init__(self, name: str, table: ShardTable, longest: int, frames: Sequence[tuple[int, int]]):
        self.name, self.table, self.longest, self.frames = name, table, longest, frames

    def __len__(self) -> int:
        return len(self.table)

    def ids(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """Return the ids of a row, not copied."""
        return self.table.numbers("input_ids", row)

    def lengths(self) -> np.ndarray:
        """Return the tokens of every row."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self.table.lengths("input_ids")])

    def num_long(self) -> int:
        """Return how many documents are longer than a sequence, as those to be packed may be."""
        return int((self.lengths() > self.longest).sum())

    def beginning(self, ids: Sequence[int] | np.ndarray) -> Any:
        """Return as much of a document as a sequence holds, no image of it cut in two."""
        return ids[: cut_place(ids, self.longest, self.frames)]

    def held_out(self, rows: Sequence[int] | None = None) -> "LazyDocuments":
        """Return the beginning of every document, as long as a sequence may be."""
        rows = range(len(self)) if rows is None else rows
        return LazyDocuments(partial(self._held_out_ids, rows), len(rows))

    def _held_out_ids(self, rows: Sequence[int], index: int) -> list[int]:
        return self.beginning(self.table.numbers("input_ids", rows[index])).tolist()


class LazyDocuments(Sequence):
    """Token ids of documents, made when they are asked for."""

    def __init__(self, make: Callable[[int], list[int]], length: int):
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"{index} of {self.length}")
        return self.make(index)


def cut_place(ids: Sequence[int] | np.ndarray, room: int, frames: Sequence[tuple[int, int]]) -> int:
    """Return how many tokens of a document go into a room, no image of it cut in two."""
    if len(ids) <= room:
        return len(ids)
    spans = frame_spans(ids[:room], frames)
    return cut_before(room, [begin for begin, _ in spans], [last for _, last in spans])


def frame_spans(ids: Sequence[int] | np.ndarray, frames: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return where the images of a document lie."""
    ids, spans = np.asarray(ids), []
    for begin, end in frames:
        begins = np.flatnonzero(ids == begin)
        if not len(begins):
            continue
        ends = np.flatnonzero(ids == end)
        lasts = np.append(ends, len(ids))[np.searchsorted(ends, begins)]
        spans += zip(begins.tolist(), lasts.tolist())
    return sorted(spans)


def cut_before(place: int, begins: Sequence[int], lasts: Sequence[int]) -> int:
    """Return `place`, or the beginning of the image that would be cut there, of the spans of [`frame_spans`]."""
    number = bisect_left(begins, place) - 1
    return begins[number] if number >= 0 and lasts[number] >= place else place
