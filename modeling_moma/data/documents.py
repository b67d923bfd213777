# SPDX-License-Identifier: Apache-2.0
"""Documents of a source by their number: captions as they are drawn anew, other documents as they were tokenized."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokenization import MomaProcessor

from ..errors_moma import InputError
from .encoding import DocumentEncoder, processor_fingerprint
from .kinds import CaptionKind
from .reports import read_manifest
from .shards import ShardTable
from .sources import TRAIN, Source, read_sources


class Documents(Protocol):
    """Documents of one split of one source. `name` is the source's, `can_be_cut` says whether a text of them may
    go on in another sequence, `has_choice` whether a row is drawn with chance."""

    name: str
    can_be_cut: bool
    has_choice: bool

    def __len__(self) -> int: ...

    def ids(self, row: int, rng: np.random.Generator) -> Sequence[int] | np.ndarray:
        """Token ids of a row, drawn with `rng` where there is a choice."""
        ...

    def held_out(self, rows: Sequence[int] | None = None) -> Sequence[Any]:
        """What losses are measured on: token ids of every document, or of some rows, without chance."""
        ...


class CaptionDocuments:
    """
    Captions and pictures, in the order, with the caption and with the coding that are drawn.

    Args:
        name: of the source.
        kind: its templates and shares.
        codes: gives the codes `[image_seq_length]` of any coding of a row: `codes(row, coding)`.
        num_codings: codings of each row.
        columns: gives the columns of a row that captions are made of: `columns(row)`.
        length: number of rows.
        encoder: gives the ids.
        row_number: gives the place of a row in the data that were tokenized; the row's own by default.
    """

    can_be_cut, has_choice = False, True

    def __init__(
        self,
        name: str,
        kind: CaptionKind,
        codes: Callable[[int, int], np.ndarray],
        num_codings: int,
        columns: Callable[[int], Mapping[str, Any]],
        length: int,
        encoder: DocumentEncoder,
        row_number: Callable[[int], int] = int,
    ):
        self.name, self.kind, self.encoder, self._length = name, kind, encoder, length
        self._codes, self.num_codings, self._columns = codes, num_codings, columns
        self._row_number = row_number
        self._text, *others = kind.templates()
        self._alternatives = [(entry, part.share) for entry, part in zip(others, kind.alternatives)]

    @classmethod
    def from_rows(
        cls, name: str, kind: CaptionKind, rows: Sequence[Mapping[str, Any]], encoder: DocumentEncoder
    ) -> "CaptionDocuments":
        """Of rows in memory, with `codes` `[num_codings, image_seq_length]` and the columns of the captions."""
        reader = _CaptionRows(rows)
        return cls(name, kind, reader.codes, reader.num_codings, reader.columns, len(rows), encoder)

    @classmethod
    def from_table(
        cls, name: str, kind: CaptionKind, table: ShardTable, encoder: DocumentEncoder
    ) -> "CaptionDocuments":
        """Of a source's shards."""
        reader = _CaptionTable(table, kind, encoder.processor.image_seq_length)
        return cls(name, kind, reader.codes, reader.num_codings, reader.columns, len(table), encoder, reader.number)

    def __len__(self) -> int:
        return self._length

    def ids(self, row: int, rng: np.random.Generator) -> list[int]:
        """One example of a row."""
        columns = self._columns(row)
        codes = self._codes(row, int(rng.integers(self.num_codings)))
        picture_first = rng.random() < self.kind.picture_first
        return self.encoder.caption(self._draw_text(columns, picture_first, rng), codes, picture_first)

    def _draw_text(self, columns: Mapping[str, Any], picture_first: bool, rng: np.random.Generator) -> str:
        text = None
        for template, share in self._alternatives:
            if text is None and template.is_full(columns) and rng.random() < share:
                text = template.render(columns, rng)
        if not picture_first and rng.random() < self.kind.without_caption:
            return ""
        return self._text.render(columns) if text is None else text

    def caption(self, row: int) -> str:
        """The caption of a row by the first template."""
        return self._text.render(self._columns(row))

    def codes(self, row: int) -> np.ndarray:
        """The codes `[image_seq_length]` of a row's picture as it is."""
        return self._codes(row, 0)

    def row_number(self, row: int) -> int:
        """Where a row stood in the split that was tokenized."""
        return self._row_number(row)

    def held_out(self, rows: Sequence[int] | None = None) -> "HeldOutCaptions":
        """Both orders of every picture as it is, with its first caption; all pictures first come before the rest."""
        return HeldOutCaptions(self, range(len(self)) if rows is None else rows)


class HeldOutCaptions(Sequence):
    """Ids of both orders of all captions, made when they are asked for."""

    def __init__(self, documents: CaptionDocuments, rows: Sequence[int]):
        self.documents, self.rows = documents, rows

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"{index} of {len(self)}")
        second, place = divmod(index, len(self.rows))
        documents, row = self.documents, self.rows[place]
        return documents.encoder.caption(documents.caption(row), documents.codes(row), not second)


class _CaptionRows:
    """Captions in memory."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.rows = rows
        self.table = np.asarray([row["codes"] for row in rows], dtype=np.int64)
        self.num_codings = self.table.shape[1]

    def codes(self, row: int, coding: int) -> np.ndarray:
        return self.table[row, coding]

    def columns(self, row: int) -> Mapping[str, Any]:
        return self.rows[row]


class _CaptionTable:
    """Captions in shards."""

    def __init__(self, table: ShardTable, kind: CaptionKind, num_codes: int):
        self.table, self.names, self.num_codes = table, kind.text_columns(), num_codes
        self.num_codings = len(table.numbers("codes", 0)) // num_codes if len(table) else 1

    def codes(self, row: int, coding: int) -> np.ndarray:
        start = coding * self.num_codes
        return self.table.numbers("codes", row)[start : start + self.num_codes].astype(np.int64)

    def number(self, row: int) -> int:
        return self.table.value("row", row)

    def columns(self, row: int) -> dict[str, Any]:
        return {name: self.table.value(name, row) for name in self.names}


class TokenDocuments:
    """
    Documents whose ids were made once, which may be cut in their texts.

    Args:
        name: of the source.
        table: with a column `input_ids`.
        longest: longest held-out document in tokens; longer ones are cut to it.
        frames: begin and end ids of pictures and the like.
    """

    can_be_cut, has_choice = True, False

    def __init__(self, name: str, table: ShardTable, longest: int, frames: Sequence[tuple[int, int]]):
        self.name, self.table, self.longest, self.frames = name, table, longest, frames

    def __len__(self) -> int:
        return len(self.table)

    def ids(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """Ids of a row, not copied."""
        return self.table.numbers("input_ids", row)

    def held_out(self, rows: Sequence[int] | None = None) -> "HeldOutTokens":
        """The beginning of every document, as long as a sequence may be."""
        return HeldOutTokens(self, range(len(self)) if rows is None else rows)


class HeldOutTokens(Sequence):
    """Ids of the beginnings of all documents, read when they are asked for."""

    def __init__(self, documents: TokenDocuments, rows: Sequence[int]):
        self.documents, self.rows = documents, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        ids = self.documents.table.numbers("input_ids", self.rows[index])
        return ids[: cut_place(ids, self.documents.longest, self.documents.frames)].tolist()


def cut_place(ids: Sequence[int] | np.ndarray, room: int, frames: Sequence[tuple[int, int]]) -> int:
    """
    How many tokens of a document go into a room, no picture of it cut in two.

    Args:
        ids: `[length]`.
        room: tokens there is room for.
        frames: begin and end ids of pictures and the like.

    Returns:
        `int`: between 0 and `room`.
    """
    if len(ids) <= room:
        return len(ids)
    spans = frame_spans(ids[:room], frames)
    return cut_before(room, [begin for begin, _ in spans], [last for _, last in spans])


def frame_spans(ids: Sequence[int] | np.ndarray, frames: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """
    Where the pictures of a document lie.

    Args:
        ids: `[length]`.
        frames: begin and end ids of pictures and the like.

    Returns:
        The places of the first and the last token of each, in their order; `length` for the last one of a picture
        that does not end.
    """
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
    """`place`, or the beginning of the picture that would be cut there, of the spans of [`frame_spans`]."""
    number = bisect_left(begins, place) - 1
    return begins[number] if number >= 0 and lasts[number] >= place else place


class TokenFolder:
    """
    A folder that `moma tokenize` has written.

    Args:
        folder: with a manifest.
        processor: that it was written with.

    Raises:
        ValueError: it is no such folder, or was written with another processor.
    """

    def __init__(self, folder: str | Path, processor: MomaProcessor):
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        self.encoder = DocumentEncoder(processor)
        if self.manifest["fingerprint"] != processor_fingerprint(processor):
            raise InputError(
                f"--tokens {str(folder)!r} was tokenized with another processor than the one given: its ids would "
                "mean something else. Tokenize anew, or give the processor of that time."
            )

    def sources(self) -> list[Source]:
        """The sources, as the recipe had them when they were tokenized."""
        return read_sources({name: entry["fields"] for name, entry in self.manifest["sources"].items()})

    def split_names(self, source: str) -> list[str]:
        """The splits of a source that hold documents."""
        splits = self.manifest["sources"][source]["splits"]
        return [name for name, entry in splits.items() if entry["documents"]]

    def documents(self, source: Source, split: str = TRAIN) -> CaptionDocuments | TokenDocuments:
        """
        The documents of a split.

        Args:
            source: one of the folder; what a caption is made of may have changed since, its columns may not.
            split: one of its splits.

        Raises:
            ValueError: there is no such source or split, or a column was not tokenized.
        """
        entry = self.manifest["sources"].get(source.name)
        if entry is None:
            raise InputError(
                f"--tokens {str(self.folder)!r} has no source {source.name!r}, but {list(self.manifest['sources'])}."
            )
        names = self.split_names(source.name)
        if split not in names:
            raise InputError(
                f"{str(self.folder)!r}, source {source.name!r}: there is no split {split!r}, but {names}."
            )
        table = ShardTable([self.folder / name for name in entry["splits"][split]["files"]])
        if not isinstance(source.kind, CaptionKind):
            frames = [(frame.begin, frame.end) for frame in self.encoder.processor.frames.values()]
            return TokenDocuments(source.name, table, self.manifest["sequence_length"], frames)
        missing = [name for name in source.kind.text_columns() if name not in table.column_names]
        if missing:
            raise InputError(
                f"{str(self.folder)!r}, source {source.name!r}: the column {missing[0]!r} of its captions was not "
                f"tokenized, only {table.column_names}; tokenize anew."
            )
        return CaptionDocuments.from_table(source.name, source.kind, table, self.encoder)


def mean_length(documents: Documents, samples: int = 4096) -> float:
    """Mean number of tokens of a document, of so many spread over all; of fewer where each is made anew."""
    number = min(samples // 16 if documents.has_choice else samples, len(documents))
    rows = np.linspace(0, len(documents) - 1, number).astype(int)
    return float(np.mean([len(documents.ids(int(row), np.random.default_rng([0, int(row)]))) for row in rows]))


__all__ = [
    "CaptionDocuments",
    "Documents",
    "TokenDocuments",
    "TokenFolder",
    "cut_before",
    "cut_place",
    "frame_spans",
    "mean_length",
]
