# SPDX-License-Identifier: Apache-2.0
"""The texts of sources, which a text tokenizer learns from."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from .kinds import CaptionKind, InterleavedKind, Kind, TextKind
from .pictures import LeftOut
from .segments import read_segments
from .sources import TRAIN, Source, undecoded_rows
from .templates import Template


def source_texts(sources: Sequence[Source], rows: int) -> Iterator[str]:
    """
    Yields all texts of the training rows: every caption of a row, the texts of a document.

    Args:
        sources: of a recipe.
        rows: of each source, at most.
    """
    for source in sources:
        opened = source.open(source.split_names()[TRAIN])
        for row in islice(undecoded_rows(opened), rows):
            yield from _row_texts(source.kind, row)


def _row_texts(kind: Kind, row: dict[str, Any]) -> Iterator[str]:
    if isinstance(kind, InterleavedKind):
        yield from _document_texts(kind, row)
        return
    templates = [Template(kind.text)] if isinstance(kind, TextKind) else []
    for template in kind.templates() if isinstance(kind, CaptionKind) else templates:
        if template.is_full(row):
            yield template.render(row)


def _document_texts(kind: InterleavedKind, row: dict[str, Any]) -> Iterator[str]:
    if kind.segments is not None:
        try:
            yield from (part for part in read_segments(kind, row) if isinstance(part, str))
        except LeftOut:
            # `moma tokenize` names it
            return
        return
    for message in row[str(kind.messages)] or []:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        yield from (part["text"] for part in parts if isinstance(part, dict) and part.get("text"))


__all__ = ["source_texts"]
