# SPDX-License-Identifier: Apache-2.0
"""Documents as they lie on the disk, and the stream of a training: weighted sources, known from a number alone."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from fractions import Fraction
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from ..errors_moma import InputError
from ..utils.messages import one_line


# the order of documents that are rows of their own, of one source and of several; runs that had another one do not go
# on under this one
STREAM_RULE, MIXTURE_RULE = "in-order", "in-order-by-weights"
# parts of the shortest distance between two documents of a source, in which all distances are whole numbers
_PARTS = 2**32
# apart enough that no two sources draw alike
_SEED_STEP = 1_000_003
# for rows without a choice: a generator of their own would take longer to make than they to read
_UNUSED = np.random.default_rng(0)
# documents that are looked at where lengths are unknown, and so many where those do not tell
_SAMPLES, _MORE_SAMPLES = 256, 8192
# of a mean, above which more documents are looked at
_LARGEST_DOUBT = 0.005


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


def mean_length(documents: Documents, longest: int | None = None) -> float:
    """Return the mean number of tokens of a document.

    Where lengths are unknown documents spread evenly are looked at, and as many drawn by chance; if the two do not
    agree, or lengths differ widely, many more. Captions say what length is expected of each of their rows.
    """
    lengths = documents.lengths()
    if lengths is not None:
        return float((lengths if longest is None else np.minimum(lengths, longest)).mean())
    even = _lengths_of(documents, np.linspace(0, len(documents) - 1, min(_SAMPLES, len(documents))).astype(int))
    if len(even) == len(documents):
        return float(even.mean())
    rows = np.random.default_rng(0).permutation(len(documents))
    drawn = _lengths_of(documents, rows[:_SAMPLES])
    doubt = max(abs(drawn.mean() - even.mean()), *(some.std() / len(some) ** 0.5 for some in (even, drawn)))
    if doubt <= _LARGEST_DOUBT * even.mean():
        return float(even.mean())
    return float(np.concatenate([drawn, _lengths_of(documents, rows[_SAMPLES:_MORE_SAMPLES])]).mean())


def _lengths_of(documents: Documents, rows: np.ndarray) -> np.ndarray:
    expected = getattr(documents, "expected_length", None)
    if expected is not None:
        return np.array([expected(int(row)) for row in rows])
    return np.array([len(documents.ids(int(row), np.random.default_rng([0, int(row)]))) for row in rows])


class DocumentOrder:
    """The endless order of a source's documents: every pass over them is a permutation of its own."""

    def __init__(self, documents: Documents, seed: int, cuts: bool = False):
        if len(documents) == 0:
            raise InputError(f"sources: {documents.name!r} has no document to train on.")
        self.documents, self.seed = documents, seed
        self._longest = documents.longest if cuts and isinstance(documents, TokenDocuments) else None
        self._epoch, self._order = -1, np.arange(0)

    @cached_property
    def mean_length(self) -> float:
        """Tokens of a document, estimated from a few where their lengths are not known."""
        return mean_length(self.documents, self._longest)

    def place(self, tokens: float) -> tuple[int, int]:
        """Return where the order is after so many tokens."""
        lengths = self.documents.lengths()
        if lengths is None:
            return round(tokens / self.mean_length), 0
        epoch, rest = divmod(round(tokens), int(lengths.sum()))
        ends = np.cumsum(lengths[self._permutation(epoch)])
        place = int(np.searchsorted(ends, rest, side="right"))
        return epoch * len(lengths) + place, rest - int(ends[place - 1] if place else 0)

    def __getitem__(self, number: int) -> Sequence[int] | np.ndarray:
        epoch, place = divmod(number, len(self.documents))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        rng = np.random.default_rng([self.seed, 1, number]) if self.documents.has_choice else _UNUSED
        return self.documents.ids(int(self._order[place]), rng)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))


def document_orders(documents: Sequence[Documents], seed: int, cuts: bool = False) -> list[DocumentOrder]:
    """Return an order for each source, of seeds of their own; see [`DocumentOrder`] for `cuts`."""
    return [DocumentOrder(entry, seed + index * _SEED_STEP, cuts) for index, entry in enumerate(documents)]


class DocumentExamples(torch.utils.data.Dataset):
    """A stream of examples, a document each, in which the index decides everything.

    A resumed run sees what the killed one would have seen, whatever the number of workers.

    Args:
        documents (`Sequence[Documents]`):
            of each source.
        weights (`Sequence[float]`):
            each source's part of the tokens, relative to the others'.
        length (`int`):
            examples of the stream.
        seed (`int`, *optional*, defaults to `0`):
            of everything random.
        cuts (`bool`, *optional*, defaults to `False`):
            whether documents longer than a sequence, as those to be packed may be, are cut to their beginnings.

    Returns:
        By index a `dict` of `input_ids` and, where there are several sources, `source`, its place among them.
    """

    def __init__(
        self, documents: Sequence[Documents], weights: Sequence[float], length: int, seed: int = 0, cuts: bool = False
    ):
        self.orders, self.length, self.cuts = document_orders(documents, seed, cuts), length, cuts
        self._turns = SourceScheduler([order.mean_length for order in self.orders], weights)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        # what reads a data set without asking for its length ends there
        if not 0 <= index < self.length:
            raise IndexError(index)
        source, number = self._turns[index]
        ids, documents = self.orders[source][number], self.orders[source].documents
        if self.cuts and isinstance(documents, TokenDocuments):
            ids = documents.beginning(ids)
        # what lies in mapped memory cannot be written to, of which torch warns
        example = {"input_ids": copy(ids)}
        return example if len(self.orders) == 1 else {**example, "source": source}

    def epochs(self, number: int) -> list[float]:
        """Return how many passes over each source so many examples make."""
        return [count / len(order.documents) for count, order in zip(self._turns.counts(number), self.orders)]


class SourceScheduler:
    """The endless order in which sources take turns: next is always the one most behind its part of the tokens.

    The documents of each source stand at even distances along the tokens of the mixture, which says without those
    before it of which source one is.
    """

    def __init__(self, lengths: Sequence[float], weights: Sequence[float]):
        distances = [length / weight for length, weight in zip(lengths, weights)]
        # whole numbers, so that rounding neither skips a document nor gives it twice
        self.distances = [round(distance / min(distances) * _PARTS) for distance in distances]
        self._density = sum((Fraction(1, distance) for distance in self.distances), Fraction())

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return the source of a document, and the document's number among those of its source."""
        counts = self.counts(index)
        source = self._next(counts)
        return source, counts[source]

    def counts(self, number: int) -> list[int]:
        """Return how many of so many documents are of each source."""
        # up to there stand no more than so many, and hardly fewer
        end = max((number - len(self.distances)) * self._density.denominator // self._density.numerator, -1)
        counts = [end // distance + 1 for distance in self.distances]
        for _ in range(number - sum(counts)):
            counts[self._next(counts)] += 1
        return counts

    def _next(self, counts: list[int]) -> int:
        return min(range(len(counts)), key=lambda source: counts[source] * self.distances[source])
