# SPDX-License-Identifier: Apache-2.0
"""Texts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..images import SkippedRow
from ..shard import Shard
from ..templates import Template
from .base import SourceKind, source_kind


@source_kind
@dataclass(frozen=True)
class TextKind(SourceKind):
    """Texts: `<bos> text <eos>`.

    Args:
        text (`str`):
            a column, or a template of columns.
    """

    text: str

    name = "text"
    hint = "`text` of texts"

    def columns(self) -> list[str]:
        return list(Template(self.text).columns)

    def row_texts(self, row: dict[str, Any]) -> Iterator[str]:
        yield from Template(self.text).texts(row)

    def documents(self, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
        template = Template(self.text)
        for index, split, row in shard.rows():
            try:
                if empty := template.empty_columns(row):
                    raise SkippedRow("text empty", f"nothing in {empty}")
                text = template.render(row)
            except SkippedRow as error:
                shard.leave_out(index, error)
                continue
            document = shard.document(index, split, shard.encoder.document([text]), 0)
            if document is not None:
                yield document
