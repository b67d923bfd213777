# SPDX-License-Identifier: Apache-2.0
"""The texts of sources, which a text tokenizer learns from."""

from collections.abc import Iterator, Sequence
from itertools import islice

from .sources import TRAIN, Source, undecoded_rows


def source_texts(sources: Sequence[Source], rows: int) -> Iterator[str]:
    """Yield all texts of the training rows: every caption of a row, the texts of a document.

    Args:
        sources (`Sequence[Source]`):
            of a recipe.
        rows (`int`):
            of each source, at most.
    """
    for source in sources:
        opened = source.open(source.split_names()[TRAIN])
        for row in islice(undecoded_rows(opened), rows):
            yield from source.kind.row_texts(row)


__all__ = ["source_texts"]
