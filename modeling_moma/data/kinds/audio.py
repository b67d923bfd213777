# SPDX-License-Identifier: Apache-2.0
"""Sounds with their texts: codes and columns of a row, and documents of it that are drawn anew for every example."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Features, List, Value

from ...utils.fields import Share
from ..encoding import DocumentEncoder
from ..images import SkippedRow
from ..shard import Shard
from ..shards import ShardTable
from ..templates import Template
from ..token_documents import HeldOutPairs
from .base import SourceKind, check_changed_texts, source_kind


@source_kind
@dataclass(frozen=True)
class AudioKind(SourceKind):
    """A sound and its text in every row: `<bos> sound text <eos>` or `<bos> text sound <eos>`.

    Args:
        audio (`str`):
            column of the sound, such as the `Audio` of `datasets`.
        text (`str`):
            column of its text, or a template such as `"{speaker}: {sentence}"`.
        audio_first (`float`, *optional*, defaults to `0.5`):
            share of the examples in which the sound comes first.
    """

    audio: str
    text: str
    audio_first: Share = 0.5

    name = "sound"
    discriminator_fields = ("audio",)
    hint = "`audio` and `text` of sounds"
    has_sounds = True

    def tokenized_fields(self) -> dict[str, Any]:
        return {"audio": self.audio}

    def columns(self) -> list[str]:
        return [self.audio, *self.stored_columns()]

    def stored_columns(self) -> list[str]:
        return list(Template(self.text).columns)

    def templates(self) -> list[Template]:
        """Return the one of its text."""
        return [Template(self.text)]

    def row_texts(self, row: dict[str, Any]) -> Iterator[str]:
        yield from Template(self.text).texts(row)

    def row_sounds(self, row: dict[str, Any]) -> list[Any]:
        return [row[self.audio]]

    def features(self, shard: Shard) -> Features:
        columns = self.stored_features(shard)
        return Features({"row": Value("int64"), "codes": List(Value("int32")), **columns})

    def documents(self, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
        template = Template(self.text)
        for index, split, row in shard.rows():
            try:
                if empty := template.empty_columns(row):
                    raise SkippedRow("text empty", f"nothing in {empty}")
                columns = {name: shard.stored_text(name, row[name]) for name in self.stored_columns()}
                num_text = len(shard.encoder.text_ids(template.render(columns)))
                codes = shard.sound_codes(row[self.audio])
                # beginning and end of the document and of the sound
                around = len(shard.encoder.beginning) + 3
                if num_text + len(codes) + around > shard.sequence_length:
                    length = num_text + len(codes) + around
                    raise SkippedRow("sound too long", f"{length} tokens with its text, over {shard.sequence_length}")
            except SkippedRow as error:
                shard.leave_out(index, error)
                continue
            shard.report.write_document(split, num_text + around, audio=len(codes))
            yield split, {"row": index, "codes": codes, **columns}

    def stored_documents(
        self, source: str, table: ShardTable, encoder: DocumentEncoder, longest: int
    ) -> "AudioDocuments":
        return AudioDocuments(source, self, table, encoder, longest)


class AudioDocuments:
    """Sounds and their texts, in the order that is drawn."""

    can_be_cut, has_choice = False, True

    def __init__(self, name: str, kind: AudioKind, table: ShardTable, encoder: DocumentEncoder, longest: int):
        self.longest = longest
        self.name, self.kind, self.table, self.encoder = name, kind, table, encoder
        self.template, self.names = Template(kind.text), kind.stored_columns()

    def __len__(self) -> int:
        return len(self.table)

    def ids(self, row: int, rng: np.random.Generator) -> list[int]:
        """One example of a row."""
        audio_first = rng.random() < self.kind.audio_first
        ids = self._ids(row, audio_first, rng)
        # that a document fits was found with lists as they are
        return ids if len(ids) <= self.longest else self._ids(row, audio_first)

    def lengths(self) -> None:
        """Return nothing: each example of a row has a text of its own."""

    def _columns(self, row: int) -> Mapping[str, Any]:
        return {name: self.table.value(name, row) for name in self.names}

    def _ids(self, row: int, audio_first: bool, rng: np.random.Generator | None = None) -> list[int]:
        columns = self._columns(row)
        text = self.template.render(columns) if rng is None else self.template.render(columns, rng)
        return self.encoder.pair("audio", text, self.table.numbers("codes", row), audio_first)

    def check_texts(self, longest: int) -> None:
        """Check texts that are others than those tokenized, see [`check_changed_texts`]."""
        rows = (
            (int(self.table.value("row", row)), self.template.is_full(self._columns(row)), len(self._ids(row, True)))
            for row in range(len(self))
        )
        check_changed_texts(self.name, "sound", rows, self.template.columns, longest)

    def held_out(self, rows: Sequence[int] | None = None) -> HeldOutPairs:
        """Both orders of every sound; all sounds first come before the rest."""
        return HeldOutPairs(self._ids, range(len(self)) if rows is None else rows)
