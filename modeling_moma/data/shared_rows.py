# SPDX-License-Identifier: Apache-2.0
"""Rows that one source of a recipe holds out and another one trains on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from transformers.utils import logging

from .sources import TRAIN, VALIDATION, Source
from .split_parts import split_parts


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Reader:
    """A source, the files of each of its splits, and the parts of these that it trains on and is evaluated on."""

    source: Source
    files: Mapping[str, frozenset[str]]
    train: str
    held_out: str | None

    def trains_on(self, other: "_Reader") -> bool:
        """Return whether it trains on rows that another source holds out."""
        if other.held_out is None:
            return False
        for own in split_parts(self.train):
            for held_out in split_parts(other.held_out):
                files, others = (entry.get(part.split) for entry, part in ((self.files, own), (other.files, held_out)))
                # rows are counted through all files, so that other files have other numbers
                if files and others and (own.overlaps(held_out) if files == others else files & others):
                    return True
        return False


def _reader(source: Source, names: Mapping[str, str]) -> _Reader:
    drawn = names[TRAIN] if source.held_out > 0 else None
    return _Reader(source, source.split_files(), names[TRAIN], names.get(VALIDATION, drawn))


def warn_of_shared_rows(sources: Sequence[Source], names: Mapping[str, Mapping[str, str]]) -> None:
    """Tell of sources that train on what another one holds out, in a split or by a draw of its own."""
    # one alone has no other, and its files need not be looked for
    readers = [_reader(source, names[source.name]) for source in sources if len(sources) > 1]
    for first, second in combinations(readers, 2):
        if first.trains_on(second) or second.trains_on(first):
            logger.warning(
                f"sources: {first.source.name!r} and {second.source.name!r} read the same files, "
                f"{second.source.data!r}, and hold out other rows of them: what one is evaluated on the other is "
                "trained on. Give both the same parts, `splits: {train: 'train[:98%]', validation: 'train[98%:]'}`."
            )
