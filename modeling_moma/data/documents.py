# SPDX-License-Identifier: Apache-2.0
"""Documents of a folder of tokens, by source and split."""

from pathlib import Path

import numpy as np
from transformers.utils import logging

from tokenization import MomaProcessor

from ..errors_moma import InputError
from .encoding import DocumentEncoder, processor_fingerprint
from .kinds.captions import CaptionDocuments
from .reports import read_manifest
from .shards import ShardTable
from .sources import TRAIN, Source, read_sources
from .token_documents import Documents


logger = logging.get_logger(__name__)


class TokenFolder:
    """A folder that `moma tokenize` has written.

    Args:
        folder (`str | Path`):
            with a manifest.
        processor (`MomaProcessor`):
            that it was written with.

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
        """Return the sources, as the recipe had them when they were tokenized."""
        fields = {name: entry["fields"] for name, entry in self.manifest["sources"].items()}
        return read_sources(fields)

    def split_names(self, source: str) -> list[str]:
        """Return the splits of a source that hold documents."""
        splits = self.manifest["sources"][source]["splits"]
        return [name for name, entry in splits.items() if entry["documents"]]

    def documents(self, source: Source, split: str = TRAIN) -> Documents:
        """Return the documents of a split.

        Args:
            source (`Source`):
                one of the folder; what a caption is made of may have changed since, its columns and what was coded
                may not. Other `data`, `held_out` or `splits` are told of.
            split (`str`, *optional*, defaults to `TRAIN`):
                one of its splits.

        Raises:
            ValueError: there is no such source or split, or a column was not tokenized, or another one was.
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
        self._check_tokenized(source)
        table = ShardTable([self.folder / name for name in entry["splits"][split]["files"]])
        missing = [name for name in source.kind.stored_columns() if name not in table.column_names]
        if missing:
            raise InputError(
                f"{str(self.folder)!r}, source {source.name!r}: the column {missing[0]!r} of its captions was not "
                f"tokenized, only {table.column_names}; tokenize anew."
            )
        return source.kind.stored_documents(source.name, table, self.encoder, self.manifest["sequence_length"])

    def _check_tokenized(self, source: Source) -> None:
        """Raise `ValueError` for a source whose tokens were made of other columns, and tell of other data."""
        then = {stored.name: stored for stored in self.sources()}[source.name]
        if type(source.kind) is not type(then.kind):
            raise InputError(
                f"--tokens {str(self.folder)!r} has {source.name!r} as a source of {then.kind.name} data, "
                f"and the recipe as one of {source.kind.name} data: tokenize anew, or name the columns of that time."
            )
        before, now = then.kind.tokenized_fields(), source.kind.tokenized_fields()
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                raise InputError(
                    f"--tokens {str(self.folder)!r}: {source.name!r} was tokenized with {name} = "
                    f"{before.get(name)!r}, and the recipe has {now.get(name)!r}: tokenize anew, or give the recipe "
                    "of that time."
                )
        before, now = then.fields(), source.fields()
        for name in ("data", "held_out", "splits"):
            if before.get(name) != now.get(name):
                logger.warning_once(
                    f"sources: {source.name!r}: the tokens in {str(self.folder)!r} were made with {name} = "
                    f"{before.get(name)!r}, and the recipe has {now.get(name)!r}: it is the tokens that are read."
                )


# documents that are looked at where lengths are unknown, and so many where those do not tell
_SAMPLES, _MORE_SAMPLES = 256, 8192
# of a mean, above which more documents are looked at
_LARGEST_DOUBT = 0.005


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
    if isinstance(documents, CaptionDocuments):
        return np.array([documents.expected_length(int(row)) for row in rows])
    return np.array([len(documents.ids(int(row), np.random.default_rng([0, int(row)]))) for row in rows])
