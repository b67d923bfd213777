# SPDX-License-Identifier: Apache-2.0
"""The stream of a training: documents of weighted sources, each known from its number alone."""

from collections.abc import Sequence
from copy import copy
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..errors_moma import InputError
from .kinds import CaptionDocuments
from .token_documents import Documents, TokenDocuments


# the order of documents that are rows of their own, of one source and of several; runs that had another one do not go
# on under this one
STREAM_RULE, MIXTURE_RULE = "in-order", "in-order-by-weights"
# parts of the shortest distance between two documents of a source, in which all distances are whole numbers
_PARTS = 2**32
# apart enough that no two sources draw alike
_SEED_STEP = 1_000_003
# for rows without a choice: a generator of their own would take longer to make than they to read
_UNUSED = np.random.default_rng(0)


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


class DocumentOrder:
    """The endless order of a source's documents: every pass over them is a permutation of its own."""

    def __init__(self, documents: Documents, seed: int, cuts: bool = False):
        if len(documents) == 0:
            raise InputError(f"sources: {documents.name!r} has no document to train on.")
        self.documents, self.seed = documents, seed
        self._longest = documents.longest if cuts and isinstance(documents, TokenDocuments) else None
        self._epoch, self._order = -1, np.arange(0)

    @cached_property
    def mean_length(self) -> float:
        """Tokens of a document, estimated from a few where their lengths are not known."""
        return mean_length(self.documents, self._longest)

    def place(self, tokens: float) -> tuple[int, int]:
        """Return where the order is after so many tokens."""
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


def document_orders(documents: Sequence[Documents], seed: int, cuts: bool = False) -> list[DocumentOrder]:
    """Return an order for each source, of seeds of their own; see [`DocumentOrder`] for `cuts`."""
    return [DocumentOrder(entry, seed + index * _SEED_STEP, cuts) for index, entry in enumerate(documents)]


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
        self.orders, self.length, self.cuts = document_orders(documents, seed, cuts), length, cuts
        self._turns = SourceScheduler([order.mean_length for order in self.orders], weights)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        # what reads a data set without asking for its length ends there
        if not 0 <= index < self.length:
            raise IndexError(index)
        source, number = self._turns[index]
        ids, documents = self.orders[source][number], self.orders[source].documents
        if self.cuts and isinstance(documents, TokenDocuments):
            ids = documents.beginning(ids)
        # what lies in mapped memory cannot be written to, of which torch warns
        example = {"input_ids": copy(ids)}
        return example if len(self.orders) == 1 else {**example, "source": source}

    def epochs(self, number: int) -> list[float]:
        """Return how many passes over each source so many examples make."""
        return [count / len(order.documents) for count, order in zip(self._turns.counts(number), self.orders)]


class SourceScheduler:
    """The endless order in which sources take turns: next is always the one most behind its part of the tokens.

    The documents of each source stand at even distances along the tokens of the mixture, which says without those
    before it of which source one is.
    """

    def __init__(self, lengths: Sequence[float], weights: Sequence[float]):
        distances = [length / weight for length, weight in zip(lengths, weights)]
        # whole numbers, so that rounding neither skips a document nor gives it twice
        self.distances = [round(distance / min(distances) * _PARTS) for distance in distances]
        self._density = sum((Fraction(1, distance) for distance in self.distances), Fraction())

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Return the source of a document, and the document's number among those of its source."""
        counts = self.counts(index)
        source = self._next(counts)
        return source, counts[source]

    def counts(self, number: int) -> list[int]:
        """Return how many of so many documents are of each source."""
        # up to there stand no more than so many, and hardly fewer
        end = max((number - len(self.distances)) * self._density.denominator // self._density.numerator, -1)
        counts = [end // distance + 1 for distance in self.distances]
        for _ in range(number - sum(counts)):
            counts[self._next(counts)] += 1
        return counts

    def _next(self, counts: list[int]) -> int:
        return min(range(len(counts)), key=lambda source: counts[source] * self.distances[source])
