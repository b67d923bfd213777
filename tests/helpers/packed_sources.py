# SPDX-License-Identifier: Apache-2.0
"""Sources of any shape in memory, and what a packed stream makes of them, written out piece by piece."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np


BOS, EOS, BEGIN, END, PAD = 1, 2, 3, 4, 0
FRAMES = [(BEGIN, END)]
WORDS = (10, 60_000)


class ArrayDocuments:
    """Documents given as lists of ids."""

    has_choice = False

    def __init__(self, name, documents, can_be_cut):
        self.name, self.can_be_cut = name, can_be_cut
        self.documents = [np.asarray(ids) for ids in documents]
        # the first word or code tells documents apart
        for number, ids in enumerate(self.documents):
            ids[2 if ids[1] == BEGIN else 1] = WORDS[1] + number

    def __len__(self):
        return len(self.documents)

    def ids(self, row, rng):
        return self.documents[row]

    def lengths(self):
        return np.array([len(ids) for ids in self.documents])


def words(rng, number):
    return rng.integers(*WORDS, number).tolist()


def image(rng, codes):
    return [BEGIN, *words(rng, codes), END]


def captions(rng, number, least=70, most=110, codes=16):
    """Captions of so many tokens in all, an image of so many codes first."""
    lengths = rng.integers(least, most + 1, number)
    return ArrayDocuments(
        "captions", [[BOS, *image(rng, codes), *words(rng, n - codes - 4), EOS] for n in lengths], can_be_cut=False
    )


def stories(rng, number, least=200, most=4000, codes=16, text=(20, 110), image_first=0.95):
    """Documents of about so many tokens in which images and texts alternate."""
    documents = []
    for _ in range(number):
        length = np.exp(rng.uniform(np.log(least), np.log(most)))
        ids = [BOS] + ([] if rng.random() < image_first else words(rng, int(rng.integers(*text))))
        while len(ids) < length:
            ids += image(rng, codes) + words(rng, int(rng.integers(*text)))
        documents.append([*ids, EOS])
    return ArrayDocuments("stories", documents, can_be_cut=True)


def lines(rng, number, least=8, most=80):
    """Texts of so many tokens."""
    lengths = rng.integers(least, most + 1, number)
    return ArrayDocuments("lines", [[BOS, *words(rng, n - 2), EOS] for n in lengths], can_be_cut=True)


@dataclass
class Account:
    """What was written: tokens of each source after every row, padding, and the state of every document."""

    tokens: list = field(default_factory=list)
    padding: int = 0
    begun: Counter = field(default_factory=Counter)
    ended: Counter = field(default_factory=Counter)
    whole: dict = field(default_factory=lambda: defaultdict(list))
    # by source, what is left of the documents that are begun and not ended
    rests: dict = field(default_factory=lambda: defaultdict(list))
    most_open: int = 0


def read_pieces(example):
    """The pieces of a packed row: `(source, ids, fills the row)`, padding as source -1."""
    starts = np.flatnonzero(example["position_ids"].numpy() == 0).tolist()
    ids, sources = example["input_ids"].numpy(), example["source_ids"].numpy()
    ends = [*starts[1:], len(ids)]
    for start, end in zip(starts, ends):
        yield int(sources[start]), ids[start:end], end == len(ids)


def account(examples, rows, documents, lone_texts=False):
    """
    Reads a stream and checks every piece of it: whole images, no piece too short, each the beginning of a
    document of its source or the next tokens of one that is open, captions whole.

    Args:
        examples: `PackedExamples`.
        rows: so many of them.
        documents: its sources.
        lone_texts: a text of a few tokens before an image may stand alone.
    """
    by_beginning = [{_first_word(ids): ids for ids in entry.documents} for entry in documents]
    result, counts = Account(), np.zeros(len(documents), dtype=np.int64)
    for row in range(rows):
        for source, ids, fills in read_pieces(examples[row]):
            if source < 0:
                result.padding += len(ids)
                continue
            counts[source] += len(ids)
            _check_piece(result, by_beginning[source], documents[source], source, ids, fills, lone_texts)
        result.tokens.append(counts.copy())
        result.most_open = max(result.most_open, *(len(rests) for rests in result.rests.values()), 0)
    return result


def _first_word(ids):
    return int(ids[2 if ids[1] == BEGIN else 1])


def _check_piece(result, by_beginning, documents, source, ids, fills, lone_texts):
    assert (ids == BEGIN).sum() == (ids == END).sum(), "an image is cut"
    assert not (len(ids) == 1 and ids[0] == BOS), "<bos> alone"
    ends = ids[-1] == EOS
    assert len(ids) >= 16 or ends or fills or lone_texts, f"a piece of {len(ids)} tokens"
    if ids[0] == BOS:
        document = by_beginning[_first_word(ids)]
        assert np.array_equal(document[: len(ids)], ids)
        result.begun[source] += 1
        if len(document) > len(ids):
            assert documents.can_be_cut, "a caption is cut"
            result.rests[source].append(document[len(ids) :])
    else:
        rests = result.rests[source]
        place = next(
            place
            for place, rest in enumerate(rests)
            if len(rest) >= len(ids) and np.array_equal(rest[: len(ids)], ids)
        )
        rest = rests.pop(place)[len(ids) :]
        if len(rest):
            rests.insert(place, rest)
    result.ended[source] += ends
    if ends and ids[0] == BOS:
        result.whole[source].append(len(ids))


def least_padding(lengths, sequence_length):
    """
    A share of padding that no packing of whole documents goes below.

    Documents in rows of `k` or more have at most `sequence_length / k` tokens in the mean, which bounds their number
    by that of the shortest documents with this mean; a document in a row of `k` takes the `k`-th part of it.
    """
    means = np.cumsum(np.sort(lengths)) / np.arange(1, len(lengths) + 1)
    most = [int((means <= sequence_length / k).sum()) for k in range(1, sequence_length // min(lengths) + 2)]
    rows = sum((number - more) / k for k, (number, more) in enumerate(zip(most, most[1:]), start=1))
    return 1 - sum(lengths) / (max(rows, sum(lengths) / sequence_length) * sequence_length)
