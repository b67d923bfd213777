# SPDX-License-Identifier: Apache-2.0
"""Held-out examples of the sources that a model is trained on, and whether a model reads what a processor writes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokenization import MomaProcessor

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError
from .documents import Documents, TokenFolder
from .sources import TRAIN, VALIDATION, Source


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
