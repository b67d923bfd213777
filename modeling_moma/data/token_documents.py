# SPDX-License-Identifier: Apache-2.0
"""Documents of a source by their number, and those whose ids were made once: where they may be cut."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from .shards import ShardTable


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

    def held_out(self, rows: Sequence[int] | None = None) -> "HeldOutTokens":
        """Return the beginning of every document, as long as a sequence may be."""
        return HeldOutTokens(self, range(len(self)) if rows is None else rows)


class HeldOutTokens(Sequence):
    """Ids of the beginnings of all documents, read when they are asked for."""

    def __init__(self, documents: TokenDocuments, rows: Sequence[int]):
        self.documents, self.rows = documents, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        return self.documents.beginning(self.documents.table.numbers("input_ids", self.rows[index])).tolist()


class HeldOutPairs(Sequence):
    """Ids of both orders of pairs, such as images and captions, made when they are asked for."""

    def __init__(self, make: Callable[[int, bool], list[int]], rows: Sequence[int]):
        self.make, self.rows = make, rows

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        second, place = divmod(index, len(self.rows))
        return self.make(self.rows[place], not second)


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
