# SPDX-License-Identifier: Apache-2.0
"""Documents of a folder of tokens, held-out examples of them, and whether a model reads what a processor writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from tokenization import MomaProcessor

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError
from .encoding import DocumentEncoder, processor_fingerprint
from .jobs import read_manifest
from .sources import TRAIN, VALIDATION, Source, read_sources
from .stream import Documents, ShardTable


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


class HeldOutExamples(torch.utils.data.Dataset):
    """Examples that losses are measured on, made when they are asked for."""

    def __init__(self, held_out: Sequence[Any], number: int | None = None):
        self.held_out = held_out
        self.places = evenly_spaced(range(len(held_out)), number)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.held_out[self.places[index]]}


def open_documents(
    folder: str, processor: MomaProcessor, split: str = TRAIN, sources: Sequence[Source] | None = None
) -> list[Documents]:
    """Return the documents of a split of all sources that have it."""
    tokens = TokenFolder(folder, processor)
    chosen = tokens.sources() if sources is None else sources
    # a source that the folder lacks is refused by name
    having = [source for source in chosen if split == TRAIN or split in tokens.split_names(source.name)]
    if not having:
        names = sorted({name for source in chosen for name in tokens.split_names(source.name)})
        raise InputError(f"--split {split!r}: no source of {folder!r} has it, only {names}.")
    return [tokens.documents(source, split) for source in having]


def held_out_sets(tokens: TokenFolder, sources: Sequence[Source] | None = None, number: int | None = None) -> Any:
    """Return what `Trainer` evaluates on: the examples of the only source, those of many by name, or `None`."""
    chosen = tokens.sources() if sources is None else sources
    sets = {
        source.name: HeldOutExamples(tokens.documents(source, VALIDATION).held_out(), number)
        for source in chosen
        if VALIDATION in tokens.split_names(source.name)
    }
    if len(chosen) == 1:
        return next(iter(sets.values()), None)
    return sets or None


def shuffled_held_out(
    documents: Sequence[Documents], seed: int, limit: int | None = None
) -> list[dict[str, list[int]]]:
    """Return held-out examples in random order.

    Tokens compete within a batch, which shall hold images before and after their captions, as in training.
    """
    examples: list[dict[str, list[int]]] = []
    for entry in documents:
        rows = None
        if limit is not None:
            rows = np.random.default_rng(seed).permutation(len(entry))[:limit].tolist()
        held_out = entry.held_out(rows)
        examples += [{"input_ids": held_out[index]} for index in range(len(held_out))]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [examples[index] for index in order]


def evenly_spaced(examples: Sequence, number: int | None) -> list:
    """Return so many of the examples; all where there are not more, or without a number."""
    number = min(number or len(examples), len(examples))
    return [examples[index * len(examples) // number] for index in range(number)]


def check_layout(config: MomaConfig, layout: dict):
    """Raise `ValueError` where a saved model reads token ids otherwise than the processor writes them."""
    for name, value in layout.items():
        # rows of the embedding beyond the tokenizer's tokens do no harm
        is_fine = getattr(config, name) >= value if name == "vocab_size" else getattr(config, name) == value
        if not is_fine:
            raise InputError(
                f"`--model` has {name} = {getattr(config, name)}, the processor's is {value}: were they made together?"
            )


def check_positions(config: MomaConfig, sequence_length: int):
    """Raise `ValueError` where sequences may be longer than a model reads, which would end a training at the first."""
    limit = config.max_position_embeddings
    # scaled rotary embeddings are made to go beyond
    if sequence_length > limit and config.rope_parameters["rope_type"] == "default":
        raise InputError(
            f"sequence_length = {sequence_length} of the recipe's section `data`, or else of `--tokens`, exceeds the "
            f"model's positions, `max_position_embeddings` = {limit}. Raise them, set `rope_parameters` to a scaled "
            "type, or tokenize for shorter sequences."
        )
