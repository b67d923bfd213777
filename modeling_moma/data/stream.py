# SPDX-License-Identifier: Apache-2.0
"""The stream of a training: documents of weighted sources, each known from its number alone."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..errors_moma import InputError
from .documents import Documents, TokenDocuments, mean_length


# the order of documents that are rows of their own; runs that had another one do not go on under this one
STREAM_RULE = "in-order"
# entries of the pattern in which sources follow one another where documents are rows of their own
PATTERN = 1000
# apart enough that no two sources draw alike
_SEED_STEP = 1_000_003
# for rows without a choice: a generator of their own would take longer to make than they to read
_UNUSED = np.random.default_rng(0)


class DocumentOrder:
    """The endless order of a source's documents: every pass over them is a permutation of its own.

    Args:
        documents (`Documents`):
            of the source.
        seed (`int`):
            of order and choices.
    """

    def __init__(self, documents: Documents, seed: int):
        if len(documents) == 0:
            raise InputError(f"sources: {documents.name!r} has no document to train on.")
        self.documents, self.seed = documents, seed
        self._epoch, self._order = -1, np.arange(0)

    @cached_property
    def mean_length(self) -> float:
        """Tokens of a document, estimated from a few where their lengths are not known."""
        return mean_length(self.documents)

    def place(self, tokens: float) -> tuple[int, int]:
        """Return where the order is after so many tokens.

        Args:
            tokens (`float`):
                of all documents before the place.

        Returns:
            The number of the document that comes next, and how many tokens of it are gone; none where the lengths of
            documents are not known.
        """
        lengths = self.documents.lengths()
        if lengths is None:
            return round(tokens / self.mean_length), 0
        epoch, rest = divmod(round(tokens), int(lengths.sum()))
        ends = np.cumsum(lengths[self._permutation(epoch)])
        place = int(np.searchsorted(ends, rest, side="right"))
        return epoch * len(lengths) + place, rest - int(ends[place - 1] if place else 0)

    def __getitem__(self, number: int) -> Sequence[int] | np.ndarray:
        epoch, place = divmod(number, len(self.documents))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        rng = np.random.default_rng([self.seed, 1, number]) if self.documents.has_choice else _UNUSED
        return self.documents.ids(int(self._order[place]), rng)

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))


def document_orders(documents: Sequence[Documents], seed: int) -> list[DocumentOrder]:
    """Return an order for each source, of seeds of their own."""
    return [DocumentOrder(entry, seed + index * _SEED_STEP) for index, entry in enumerate(documents)]


class DocumentExamples(torch.utils.data.Dataset):
    """A stream of examples, a document each, in which the index decides everything.

    A resumed run sees what the killed one would have seen, whatever the number of workers.

    Args:
        documents (`Sequence[Documents]`):
            of each source.
        weights (`Sequence[float]`):
            each source's part of the tokens, relative to the others'.
        length (`int`):
            examples of the stream.
        seed (`int`, *optional*, defaults to `0`):
            of everything random.
        cuts (`bool`, *optional*, defaults to `False`):
            whether documents longer than a sequence, as those to be packed may be, are cut to their beginnings.

    Returns:
        By index a `dict` of `input_ids` and, where there are several sources, `source`, its place among them.
    """

    def __init__(
        self, documents: Sequence[Documents], weights: Sequence[float], length: int, seed: int = 0, cuts: bool = False
    ):
        self.orders, self.length, self.cuts = document_orders(documents, seed), length, cuts
        self._pattern = _pattern(self.orders, weights)
        self._counts = np.bincount(self._pattern, minlength=len(documents))
        # how often an entry's source stands before it in the pattern
        self._ranks = np.zeros(len(self._pattern), dtype=np.int64)
        for source in range(len(documents)):
            members = self._pattern == source
            self._ranks[members] = np.arange(members.sum())

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        cycle, place = divmod(index, len(self._pattern))
        source = self._pattern[place]
        number = cycle * int(self._counts[source]) + int(self._ranks[place])
        ids, documents = self.orders[source][number], self.orders[source].documents
        if self.cuts and isinstance(documents, TokenDocuments):
            ids = documents.beginning(ids)
        # what lies in mapped memory cannot be written to, of which torch warns
        example = {"input_ids": copy(ids)}
        return example if len(self.orders) == 1 else {**example, "source": int(source)}

    def epochs(self, number: int) -> list[float]:
        """Return how many passes over each source so many examples make."""
        cycles, rest = divmod(number, len(self._pattern))
        seen = cycles * self._counts + np.bincount(self._pattern[:rest], minlength=len(self.orders))
        return [float(count) / len(order.documents) for count, order in zip(seen, self.orders)]


def _pattern(orders: Sequence[DocumentOrder], weights: Sequence[float]) -> np.ndarray:
    """Return the source of each example of a cycle: always the one that lags most behind its part of the tokens."""
    if len(orders) == 1:
        return np.zeros(1, dtype=np.int64)
    lengths, served = [order.mean_length for order in orders], np.zeros(len(orders))
    pattern = np.empty(PATTERN, dtype=np.int64)
    for place in range(PATTERN):
        source = int(np.argmin(served / np.asarray(weights)))
        pattern[place] = source
        served[source] += lengths[source]
    return pattern


__all__ = ["STREAM_RULE", "DocumentExamples", "DocumentOrder", "document_orders"]
