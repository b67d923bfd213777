# SPDX-License-Identifier: Apache-2.0
"""Documents of a folder of tokens, by source and split."""

from pathlib import Path

import numpy as np

from tokenization import MomaProcessor

from ..errors_moma import InputError
from .encoding import DocumentEncoder, processor_fingerprint
from .kinds.captions import CaptionDocuments
from .reports import read_manifest
from .shards import ShardTable
from .sources import TRAIN, Source, read_sources
from .token_documents import Documents, TokenDocuments, cut_before, cut_place, frame_spans


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
        return read_sources(fields, is_stored=True)

    def split_names(self, source: str) -> list[str]:
        """Return the splits of a source that hold documents."""
        splits = self.manifest["sources"][source]["splits"]
        return [name for name, entry in splits.items() if entry["documents"]]

    def documents(self, source: Source, split: str = TRAIN) -> Documents:
        """Return the documents of a split.

        Args:
            source (`Source`):
                one of the folder; what a caption is made of may have changed since, its columns may not.
            split (`str`, *optional*, defaults to `TRAIN`):
                one of its splits.

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
        kinds = {stored.name: stored.kind for stored in self.sources()}
        if type(source.kind) is not type(kinds[source.name]):
            raise InputError(
                f"--tokens {str(self.folder)!r} has {source.name!r} as a source of {kinds[source.name].name} data, "
                f"and the recipe as one of {source.kind.name} data: tokenize anew, or name the columns of that time."
            )
        table = ShardTable([self.folder / name for name in entry["splits"][split]["files"]])
        missing = [name for name in source.kind.stored_columns() if name not in table.column_names]
        if missing:
            raise InputError(
                f"{str(self.folder)!r}, source {source.name!r}: the column {missing[0]!r} of its captions was not "
                f"tokenized, only {table.column_names}; tokenize anew."
            )
        return source.kind.stored_documents(source.name, table, self.encoder, self.manifest["sequence_length"])


def mean_length(documents: Documents, samples: int = 256) -> float:
    """Return the mean number of tokens of a document.

    Args:
        documents (`Documents`):
            of which the lengths may be known.
        samples (`int`, *optional*, defaults to `256`):
            documents, spread over all, that are made where they are not.
    """
    lengths = documents.lengths()
    if lengths is not None:
        return float(lengths.mean())
    rows = np.linspace(0, len(documents) - 1, min(samples, len(documents))).astype(int)
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
