# SPDX-License-Identifier: Apache-2.0
"""Documents packed into sequences of one length, each of which knows where its documents begin."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from ..errors_moma import InputError
from .stream import DocumentOrder, Documents, cut_before, document_orders, frame_spans


# how documents become sequences; runs that packed them by another rule do not go on under this one
PACKING_RULE = "token-places"
# documents of a source that are begun and not ended
OPEN = 8
# drawn documents among which the next one to begin is chosen: of a source whose documents are cut, of one whose
# documents go in whole, and of that where nothing else fills the gaps that they leave
CANDIDATES = 16
WHOLE = 32
WHOLE_ALONE = 128
# tokens of a piece that neither ends its document nor fills its sequence
LEAST = 16
# a block, whose documents are known without those of the blocks before, has so many sequences and tokens or more
BLOCK = 1024
BLOCK_TOKENS = 2**22
# sequences, and tokens, from which is estimated what a block holds
SAMPLE = 128
SAMPLE_TOKENS = 2**18
# documents of a source in the sample from which they tell how many a block has
TELLING = 8
# by how much shares may differ from the weights and still count as kept
TOLERANCE = 0.02
IGNORED = -100


@dataclass
class _Piece:
    ids: Sequence[int] | np.ndarray
    source: int


class PackedExamples(torch.utils.data.Dataset):
    """Sequences of `sequence_length` tokens, full of documents.

    Each gap in a sequence goes to the source that is most behind its weight, by the tokens written so far, and has
    something that goes in. Captions go in whole or wait for a gap. Texts and interleaved documents are cut where a
    sequence ends, never inside of an image, and go on in a later one, where the rest is a document of its own; a
    source has at most 8 of them open, and goes on with the oldest that fills the gap or ends in it. A piece has 16
    tokens or more unless it ends its document, fills its sequence, or stands before an image that is too large to
    share a sequence with it. What no source can fill is padding.

    Shares are kept as long as documents allow it: where images or captions leave no room for one another, others
    come before their turn, and the log of a training tells.

    The index decides everything. Sequences come in blocks of four million tokens, of 1,024 sequences or more: where
    a source goes on in a block follows from what the first sequences take of it and from the lengths of its
    documents (of captions, whose text is drawn, from their mean), so that a run resumes anywhere without reading more
    than a block. A document that is longer than what a block takes of its source goes on in the next one. Around a
    block's end a few documents are seen twice or left out for it, or are not ended.

    Args:
        documents (`Sequence[Documents]`):
            of each source.
        weights (`Sequence[float]`):
            each source's part of the tokens, relative to the others'.
        sequence_length (`int`):
            tokens of a sequence.
        length (`int`):
            sequences of the stream.
        pad_token_id (`int`):
            what fills a sequence that nothing else fills.
        frames (`Sequence[tuple[int, int]]`):
            begin and end ids of images and the like.
        seed (`int`, *optional*, defaults to `0`):
            of everything random.

    Returns:
        By index a `dict` of tensors `[sequence_length]`: `input_ids`; `attention_mask`, 0 at padding; `position_ids`,
        which begin again with every document; `labels`, -100 where a document begins and at padding; `source_ids`, the
        place of the token's source among the documents, -1 at padding.
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
        self.block = max(BLOCK, BLOCK_TOKENS // sequence_length)
        self._block, self._next = -1, 0
        self._packer: _Packer | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        # a worker begins where its own first sequence asks it to
        return {**self.__dict__, "_block": -1, "_next": 0, "_packer": None}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"sequence {index} of {self.length}")
        block, place = divmod(index, self.block)
        if self._packer is None or block != self._block or place < self._next:
            self._block, self._next, self._packer = block, 0, self._begin(block)
        # without their tensors, what the next one needs of the earlier ones is quickly made
        while self._next < place:
            self._packer.next_pieces()
            self._next += 1
        pieces = self._packer.next_pieces()
        self._next += 1
        return self._tensors(pieces)

    def epochs(self, number: int) -> list[float]:
        """Return how many passes over each source so many sequences make, about."""
        return [
            number / self.block * tokens / (order.mean_length * len(order.documents))
            for tokens, order in zip(self._block_tokens, self.orders)
        ]

    @cached_property
    def _block_tokens(self) -> list[float]:
        """Tokens of each source in a block.

        They are what the weights say of the part that is no padding, or what was measured where the weights cannot be
        kept and enough of a source was seen.
        """
        number = min(BLOCK, max(SAMPLE, SAMPLE_TOKENS // self.sequence_length))
        packer = self._begin(0)
        tokens = np.zeros((number, len(self.orders)))
        for row in range(number):
            packer.next_pieces()
            tokens[row] = [source.written for source in packer.sources]
        # the first ones have the whole choice of documents before them
        seen = tokens[-1] - tokens[number // 2]
        taken = seen / ((number - 1 - number // 2) * self.sequence_length)
        by_weights = self.shares * taken.sum()
        is_kept = np.abs(taken / taken.sum() - self.shares).max() < TOLERANCE
        # a source that has hardly been seen would begin anew in every block
        is_seen = seen >= TELLING * np.array([order.mean_length for order in self.orders])
        taken = np.where(is_seen & (not is_kept), taken, by_weights)
        return (taken * self.block * self.sequence_length).tolist()

    def _begin(self, block: int) -> "_Packer":
        starts = [(0, 0)] * len(self.orders)
        if block:
            starts = [order.place(block * tokens) for tokens, order in zip(self._block_tokens, self.orders)]
        return _Packer(self.orders, self.shares.tolist(), starts, self.block, self.sequence_length, self.frames)

    def _tensors(self, pieces: list[_Piece]) -> dict[str, torch.Tensor]:
        ids = np.full(self.sequence_length, self.pad_token_id, dtype=np.int64)
        positions, sources = np.zeros(self.sequence_length, dtype=np.int64), np.full(self.sequence_length, -1)
        labels, places = np.full(self.sequence_length, IGNORED, dtype=np.int64), np.arange(self.sequence_length)
        start = 0
        for piece in pieces:
            end = start + len(piece.ids)
            ids[start:end] = piece.ids
            positions[start:end] = places[: end - start]
            labels[start + 1 : end] = ids[start + 1 : end]
            sources[start:end] = piece.source
            start = end
        positions[start:] = places[: self.sequence_length - start]
        # padding that is not hidden would compete with the tokens of text for experts and for depth layers
        mask = (sources >= 0).astype(np.int64)
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
        arrays["source_ids"] = sources
        return {name: torch.from_numpy(values) for name, values in arrays.items()}


@dataclass
class PackedCollator:
    """Puts packed sequences into a batch as they are, and hands other examples on.

    Their attention mask hides padding alone: where `position_ids` begin again, a document begins, and attention ends.
    The number `source` of a document that is an example of its own becomes `source_ids`, as in packed sequences.

    Args:
        collate (`Callable[[list[dict]], dict[str, torch.Tensor]]`):
            for examples that are not packed, such as held-out ones.
    """

    collate: Callable[[list[dict]], dict[str, torch.Tensor]]

    def __call__(self, features: list[dict]) -> dict[str, Any]:
        """Return a batch of examples, tensors `[batch, length]`."""
        if "position_ids" in features[0]:
            return {name: torch.stack([row[name] for row in features]) for name in features[0]}
        if "source" not in features[0]:
            return self.collate(features)
        sources = torch.tensor([row["source"] for row in features])
        batch = self.collate([{name: row[name] for name in row if name != "source"} for row in features])
        return {**batch, "source_ids": torch.where(batch["attention_mask"] > 0, sources[:, None], -1)}


class _Document:
    """A document that was drawn, and how much of it is written."""

    def __init__(
        self, ids: Sequence[int] | np.ndarray, frames: Sequence[tuple[int, int]], length: int, can_be_cut: bool
    ):
        self.ids, self.length, self.can_be_cut, self.drawn_at = ids, length, can_be_cut, 0
        # tokens that are written, and that are not
        self.done, self.rest = 0, len(ids)
        spans = frame_spans(ids, frames) if can_be_cut else []
        self.begins, self.lasts = [begin for begin, _ in spans], [last for _, last in spans]

    def begin_at(self, place: int) -> int:
        """Leave out what stands before a place, and all of an image that would be cut there; return how much it is."""
        self.done = cut_before(place, self.begins, self.lasts)
        self.rest -= self.done
        return self.done

    def write(self, part: int) -> Sequence[int] | np.ndarray:
        """Return its next tokens, which are written then."""
        self.done += part
        self.rest -= part
        return self.ids[self.done - part : self.done]

    def part(self, gap: int) -> int:
        """Return the most tokens that make a piece in a gap, no image cut; 0 where none do."""
        end = self.done + gap
        if end >= len(self.ids):
            return self.rest
        place = cut_before(end, self.begins, self.lasts)
        part = place - self.done
        # a token alone has no target
        return part if part >= LEAST or part == gap > 1 or self._stands_alone(place) else 0

    def parts(self, gap: int) -> list[tuple[int, int]]:
        """Return the least and most tokens of all pieces that a gap can hold, from the shortest on."""
        if not self.can_be_cut:
            return [(self.rest, self.rest)]
        most, least, ranges = self.part(gap), LEAST, []
        for number in range(bisect_left(self.begins, self.done), bisect_left(self.begins, self.done + most)):
            begin, after = self.begins[number] - self.done, self.lasts[number] + 1 - self.done
            if begin >= least or self._stands_alone(begin + self.done):
                ranges.append((min(begin, least), begin))
            least = max(after, LEAST)
        if most:
            ranges.append((min(least, most), most))
        return ranges

    def _stands_alone(self, place: int) -> bool:
        """Return whether the few tokens before an image fit into no sequence together with it."""
        number = bisect_left(self.begins, place)
        is_before = number < len(self.begins) and self.begins[number] == place > self.done
        return is_before and self.lasts[number] + 1 - self.done > self.length


class _Source:
    """The documents of one source in one block: those that wait, and those that are begun and not ended."""

    candidates = CANDIDATES

    def __init__(
        self,
        order: DocumentOrder,
        start: tuple[int, int],
        share: float,
        frames: Sequence[tuple[int, int]],
        length: int,
    ):
        (self.number, done), self.order, self.share, self.frames, self.length = start, order, share, frames, length
        self.written = self.at_hand = 0
        self.waiting: list[_Document] = []
        self.open: list[_Document] = []
        if done and order.documents.can_be_cut:
            self._draw()
            self.at_hand -= self.waiting[0].begin_at(done)
            if self.waiting[0].done:
                self.open.append(self.waiting.pop())

    def take(self, gap: int, expected: float) -> Sequence[int] | np.ndarray | None:
        """Return the source's next piece."""
        # what the block will not come to is not drawn, so that its end leaves little behind
        while len(self.waiting) < self.candidates and (self.at_hand < expected or not self.at_hand):
            self._draw()
        chosen = self.choose(gap)
        return None if chosen is None else self._write(*chosen)

    def choose(self, gap: int) -> tuple[_Document, int] | None:
        """Return a document, open ones before others, and how many of its tokens go into the gap."""
        documents = self.open + self.waiting if len(self.open) < OPEN else self.open
        for document in documents:
            part = document.part(gap)
            if part and part == min(gap, document.rest):
                return document, part
        return fullest(documents, gap, gap)

    def _draw(self):
        can_be_cut = self.order.documents.can_be_cut
        document = _Document(self.order[self.number], self.frames, self.length, can_be_cut)
        longest = len(document.ids) - 1
        if can_be_cut:
            longest = 1 + max([last - begin for begin, last in zip(document.begins, document.lasts)], default=-1)
        if longest >= self.length:
            raise InputError(
                f"sources: {self.order.documents.name!r} has {longest + 1} tokens that cannot be cut, an image or a "
                f"sound with the token before it, or a caption: `sequence_length` is {self.length}."
            )
        self.number += 1
        self.at_hand += document.rest
        self.waiting.append(document)

    def _write(self, document: _Document, part: int) -> Sequence[int] | np.ndarray:
        if document.done == 0:
            self.waiting.remove(document)
            self.open.append(document)
        if part == document.rest:
            self.open.remove(document)
        self.written += part
        self.at_hand -= part
        return document.write(part)


class _WholeSource(_Source):
    """A source whose documents go in whole or wait; `has_filler` says that others can be cut."""

    def __init__(self, *args, has_filler: bool):
        super().__init__(*args)
        self.has_filler, self.sequences, self.longest = has_filler, 0, 0
        self.candidates = WHOLE if has_filler else WHOLE_ALONE

    def _draw(self):
        super()._draw()
        self.waiting[-1].drawn_at = self.sequences
        self.longest = max(self.longest, self.waiting[-1].rest)

    def choose(self, gap: int) -> tuple[_Document, int] | None:
        """Return the first of those that fill the gap best together, or one that has waited for many sequences."""
        oldest = self.waiting[0]
        if gap == self.length:
            self.sequences += 1
            if self.sequences - oldest.drawn_at > self.candidates:
                return oldest, oldest.rest
        # far from the end of a sequence any of them will do
        if gap > (2 if self.has_filler else 4) * self.longest:
            return oldest, oldest.rest
        documents = [document for document in self.waiting if document.rest <= gap]
        return fullest(documents, gap, gap - LEAST if self.has_filler else gap)


def fullest(documents: Sequence[_Document], gap: int, most: int) -> tuple[_Document, int] | None:
    """Return the first piece of those that fill a gap best together."""
    # bit n of a number says whether pieces of the documents so far may have n tokens together
    sums, mask = [1], (2 << gap) - 1
    for document in documents:
        reached = sums[-1]
        for low, high in document.parts(gap):
            shifted = sums[-1] << low
            reached |= (_spread(shifted, high - low + 1) if high > low else shifted) & mask
        sums.append(reached)
        if reached >> gap & 1:
            break
    if not sums[-1] >> gap & 1:
        sums[-1] &= (2 << max(most, 0)) - 1
    total, first = sums[-1].bit_length() - 1, None
    for document, before in zip(reversed(documents[: len(sums) - 1]), reversed(sums[:-1])):
        if total and not before >> total & 1:
            part = next(
                part
                for low, high in reversed(document.parts(gap))
                for part in range(high, low - 1, -1)
                if part <= total and before >> (total - part) & 1
            )
            total, first = total - part, (document, part)
    return first


def _spread(bits: int, width: int) -> int:
    """Every bit, and the `width - 1` above it."""
    spread, done = bits, 1
    while done < width:
        step = min(done, width - done)
        spread |= spread << step
        done += step
    return spread


class _Packer:
    """Fills the sequences of one block, one after the other."""

    def __init__(
        self,
        orders: Sequence[DocumentOrder],
        shares: Sequence[float],
        starts: list[tuple[int, int]],
        num_sequences: int,
        sequence_length: int,
        frames: Sequence[tuple[int, int]],
    ):
        self.length, self.rows_left, self.written = sequence_length, num_sequences, 0
        has_filler = any(order.documents.can_be_cut for order in orders)
        whole = partial(_WholeSource, has_filler=has_filler)
        self.sources = [
            (_Source if order.documents.can_be_cut else whole)(order, start, share, frames, sequence_length)
            for order, share, start in zip(orders, shares, starts)
        ]

    def next_pieces(self) -> list[_Piece]:
        """Return the documents, and parts of documents, of the next sequence."""
        pieces, gap = [], self.length
        while gap:
            piece = self._take(gap)
            if piece is None:
                break
            pieces.append(piece)
            gap -= len(piece.ids)
        self.written += self.length - gap
        self.rows_left -= 1
        return pieces

    def _take(self, gap: int) -> _Piece | None:
        """Return a piece of the source that is most behind, of those that have one."""
        left, written = self.rows_left * self.length, max(self.written, 1)
        behind = sorted([(source.written / source.share, place) for place, source in enumerate(self.sources)])
        for _, place in behind:
            source = self.sources[place]
            ids = source.take(gap, max(source.share, source.written / written) * left)
            if ids is not None:
                return _Piece(ids, place)
        return None
