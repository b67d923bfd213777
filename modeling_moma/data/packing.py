# SPDX-License-Identifier: Apache-2.0
"""Documents packed into sequences of one length, each of which knows where its documents begin."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from .documents import Documents, cut_place
from .stream import DocumentOrder, document_orders


# documents that wait for a room that they fit into
BUFFER = 64
# of them, those whose beginnings may fill what is left of a sequence
CANDIDATES = 16
# sequences whose documents are known without those of the sequences before
BLOCK = 1024
IGNORED = -100


@dataclass
class _Waiting:
    ids: Sequence[int] | np.ndarray
    source: int
    can_be_cut: bool


class PackedExamples(torch.utils.data.Dataset):
    """
    Sequences of `sequence_length` tokens, full of documents.

    Documents go in by their order. One that does not fit waits for a later sequence; a text or an interleaved document
    is cut instead, never inside of a picture, and goes on in the next sequence, where it is a document of its own.
    Where no source can be cut, what is left of a sequence is filled with the beginnings of captions, which come again
    whole, and with padding where these do not fit.

    The index decides everything. Sequences come in blocks of 1,024: where the documents of a block begin follows from
    their mean length, so that a run resumes anywhere without reading what came before. A fraction of a percent of the
    documents of a pass are seen twice or left out for it.

    Args:
        documents: of each source.
        weights: each source's part of the tokens, relative to the others'.
        sequence_length: tokens of a sequence.
        length: sequences of the stream.
        pad_token_id: what fills a sequence that nothing else fills.
        frames: begin and end ids of pictures and the like.
        seed: of everything random.

    Returns:
        By index a `dict` of tensors `[sequence_length]`: `input_ids`; `position_ids`, which begin again with every
        document; `labels`, -100 where a document begins and at padding; `source_ids`, the place of the token's source
        among the documents, -1 at padding.
    """

    def __init__(
        self,
        documents: Sequence[Documents],
        weights: Sequence[float],
        sequence_length: int,
        length: int,
        pad_token_id: int,
        frames: Sequence[tuple[int, int]],
        seed: int = 0,
    ):
        self.orders, self.length = document_orders(documents, seed), length
        self.sequence_length, self.pad_token_id, self.frames = sequence_length, pad_token_id, list(frames)
        shares = np.asarray(weights, dtype=float)
        self.shares = shares / shares.sum()
        self._block, self._next = -1, 0
        self._packer: _Packer | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        # a worker begins where its own first sequence asks it to
        return {**self.__dict__, "_block": -1, "_next": 0, "_packer": None}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block, place = divmod(index, BLOCK)
        if self._packer is None or block != self._block or place < self._next:
            self._block, self._next, self._packer = block, 0, self._begin(block)
        # without their tensors, what the next one needs of the earlier ones is quickly made
        while self._next < place:
            self._packer.next_pieces()
            self._next += 1
        pieces = self._packer.next_pieces()
        self._next += 1
        return self._tensors(pieces)

    def _begin(self, block: int) -> "_Packer":
        tokens = BLOCK * self.sequence_length
        starts = [round(block * tokens * share / order.mean_length) for share, order in zip(self.shares, self.orders)]
        return _Packer(self.orders, self.shares.tolist(), starts, self.sequence_length, self.frames)

    def _tensors(self, pieces: list[_Waiting]) -> dict[str, torch.Tensor]:
        ids = np.full(self.sequence_length, self.pad_token_id, dtype=np.int64)
        positions, sources = np.zeros(self.sequence_length, dtype=np.int64), np.full(self.sequence_length, -1)
        labels = np.full(self.sequence_length, IGNORED, dtype=np.int64)
        start = 0
        for piece in pieces:
            end = start + len(piece.ids)
            ids[start:end] = piece.ids
            positions[start:end] = np.arange(end - start)
            labels[start + 1 : end] = ids[start + 1 : end]
            sources[start:end] = piece.source
            start = end
        positions[start:] = np.arange(self.sequence_length - start)
        arrays = {"input_ids": ids, "position_ids": positions, "labels": labels, "source_ids": sources}
        return {name: torch.from_numpy(values) for name, values in arrays.items()}


@dataclass
class PackedCollator:
    """
    Puts packed sequences into a batch as they are, and hands other examples on.

    There is no attention mask among them: where `position_ids` begin again, a document begins, and attention ends.

    Args:
        collate: for examples that are not packed, such as held-out ones.
    """

    collate: Callable[[list[dict]], dict[str, torch.Tensor]]

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        if "position_ids" in features[0]:
            return {name: torch.stack([row[name] for row in features]) for name in features[0]}
        return self.collate(features)


class _Packer:
    """Fills the sequences of one block, one after the other."""

    def __init__(
        self,
        orders: Sequence[DocumentOrder],
        shares: Sequence[float],
        starts: list[int],
        sequence_length: int,
        frames: Sequence[tuple[int, int]],
    ):
        self.orders, self.shares, self.numbers = orders, shares, list(starts)
        self.length, self.frames = sequence_length, frames
        self.served = [0] * len(orders)
        self.next = [order[number] for order, number in zip(orders, starts)]
        self.waiting: deque[_Waiting] = deque()
        self.rests: deque[_Waiting] = deque()
        self.can_be_cut = [order.documents.can_be_cut for order in orders]

    def next_pieces(self) -> list[_Waiting]:
        """The documents, and parts of documents, of the next sequence."""
        pieces, room = [], self.length
        while room:
            piece = self._take(room)
            if piece is None:
                break
            pieces.append(piece)
            room -= len(piece.ids)
        return pieces

    def _take(self, room: int) -> _Waiting | None:
        if self.rests and cut_place(self.rests[0].ids, room, self.frames):
            return self._cut(self.rests.popleft(), room)
        while len(self.waiting) < BUFFER:
            self.waiting.append(self._draw(self._most_behind(range(len(self.orders)))))
        return self._filling(room) or self._drawn_to_fill(room) or self._part(room) or self._beginning(room)

    def _filling(self, room: int) -> _Waiting | None:
        """The first document that goes in whole, or of which a part fills the room."""
        for place, entry in enumerate(self.waiting):
            if len(entry.ids) <= room or (entry.can_be_cut and cut_place(entry.ids, room, self.frames) == room):
                del self.waiting[place]
                return self._cut(entry, room)
        return None

    def _part(self, room: int) -> _Waiting | None:
        """The first document of which anything goes in, up to a picture that does not."""
        for place, entry in enumerate(self.waiting):
            if entry.can_be_cut and cut_place(entry.ids, room, self.frames):
                del self.waiting[place]
                return self._cut(entry, room)
        return None

    def _most_behind(self, sources: Iterable[int]) -> int:
        """The source that is most behind its share once half of its next document is counted.

        Without it a source of long documents would be ahead by half a document in the mean of every block.
        """
        return min(
            sources, key=lambda source: (self.served[source] + len(self.next[source]) / 2) / self.shares[source]
        )

    def _draw(self, source: int) -> _Waiting:
        ids = self.next[source]
        self.numbers[source] += 1
        self.next[source] = self.orders[source][self.numbers[source]]
        self.served[source] += len(ids)
        return _Waiting(ids, source, self.can_be_cut[source])

    def _cut(self, entry: _Waiting, room: int) -> _Waiting:
        place = cut_place(entry.ids, room, self.frames)
        if place < len(entry.ids):
            self.rests.append(_Waiting(entry.ids[place:], entry.source, True))
        return _Waiting(entry.ids[:place], entry.source, entry.can_be_cut)

    def _drawn_to_fill(self, room: int) -> _Waiting | None:
        """A further document that can be cut, ahead of its time, which its source makes up for later."""
        sources = [source for source, can_be_cut in enumerate(self.can_be_cut) if can_be_cut]
        while sources:
            # the same one every time would be drawn more often than it can make up for
            source = self._most_behind(sources)
            sources.remove(source)
            entry = self._draw(source)
            if cut_place(entry.ids, room, self.frames) == min(room, len(entry.ids)):
                return self._cut(entry, room)
            self.waiting.append(entry)
        return None

    def _beginning(self, room: int) -> _Waiting | None:
        """The beginning of a caption that comes again whole."""
        places = [cut_place(entry.ids, room, self.frames) for entry in islice(self.waiting, CANDIDATES)]
        best = int(np.argmax(places))
        # the first token alone teaches nothing
        if places[best] < 2:
            return None
        entry = self.waiting[best]
        self.served[entry.source] += places[best]
        return _Waiting(entry.ids[: places[best]], entry.source, False)


__all__ = ["BLOCK", "PackedCollator", "PackedExamples"]
