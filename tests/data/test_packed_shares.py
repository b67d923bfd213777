# SPDX-License-Identifier: Apache-2.0
"""A mixture keeps its weights whatever the lengths of its documents, and every document that is begun is ended."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.packed_sources import FRAMES, PAD, ArrayDocuments, account, captions, least_padding, lines, stories
from modeling_moma.data.packing import OPEN, PackedExamples
from modeling_moma.data.stream import DocumentOrder


ROWS = 500
MIXTURES = {
    "even": (0.5, 0.3, 0.2),
    "captions": (0.8, 0.1, 0.1),
    "captions alone": (1, 0, 0),
    "stories alone": (0, 1, 0),
    "lines alone": (0, 0, 1),
}


@pytest.fixture(scope="module")
def sources():
    rng = np.random.default_rng(0)
    return [captions(rng, 1500), stories(rng, 400), lines(rng, 2000)]


def packed(documents, weights, length, rows, seed=0):
    return PackedExamples(documents, weights, length, rows, PAD, FRAMES, seed)


@pytest.mark.parametrize(
    "name, length",
    [
        *(("even", 128), ("even", 4096), ("captions", 256), ("captions alone", 128), ("captions alone", 512)),
        *(("stories alone", 256), ("lines alone", 1024)),
    ],
)
def test_shares_are_the_weights_and_documents_are_ended(sources, name, length):
    chosen = [(source, weight) for source, weight in zip(sources, MIXTURES[name]) if weight]
    documents, weights = zip(*chosen)
    result = account(packed(documents, weights, length, ROWS), ROWS, documents)
    shares = np.stack(result.tokens) / np.sum(result.tokens, axis=1, keepdims=True)
    errors = np.abs(shares - np.asarray(weights) / sum(weights)).max(axis=1)
    padding = result.padding / (ROWS * length)
    least = least_padding(result.whole[0], length) if name == "captions alone" else 0
    begun, ended = sum(result.begun.values()), sum(result.ended.values())
    assert errors[-1] < 0.005 and errors[99:].max() < 0.02
    assert padding <= least + 0.01
    assert result.most_open <= OPEN
    assert begun - ended == sum(len(rests) for rests in result.rests.values())
    # of what is begun and not open
    assert ended / (begun - sum(len(rests) for rests in result.rests.values())) >= 0.97


def test_a_rare_source_goes_on_in_every_block_where_weights_cannot_be_kept():
    rng = np.random.default_rng(0)
    # a row holds one caption, whose rest the lines fill beyond their weight
    documents = [captions(rng, 500, 90, 90), lines(rng, 500), captions(rng, 300, 100, 100)]
    examples = packed(documents, (0.949, 0.05, 0.001), 128, 40_000)
    common, filling, rare = examples._block_tokens
    assert filling > 0.2 * (common + filling)
    # not measured: the sample has a document or two of it
    assert rare == pytest.approx(0.001 * (common + filling), rel=0.05)
    assert examples._begin(1).sources[2].number > 10


def test_little_is_left_open_at_the_end_of_a_block(sources, monkeypatch):
    monkeypatch.setattr("modeling_moma.data.packing.BLOCK_TOKENS", 0)
    examples = packed(sources, (0.5, 0.3, 0.2), 256, 1024)
    result = account(examples, examples.block, sources)
    assert sum(len(rests) for rests in result.rests.values()) <= 8
    assert sum(result.ended.values()) >= 0.97 * sum(result.begun.values())


def test_documents_longer_than_their_part_of_a_block_are_read_to_their_end(monkeypatch):
    monkeypatch.setattr("modeling_moma.data.packing.BLOCK_TOKENS", 0)
    rng, blocks, weight = np.random.default_rng(0), 6, 0.02
    books = lines(rng, 12, 9_000, 11_000)
    # every token occurs once
    ends = np.cumsum([len(ids) for ids in books.documents])
    books.documents = [np.arange(end - len(ids), end) + 10**6 for ids, end in zip(books.documents, ends)]
    examples = packed([lines(rng, 500, 100, 400), books], (1 - weight, weight), 256, blocks * 1024)
    assert examples.block == 1024
    times = np.zeros(ends[-1], dtype=int)
    for example in map(examples.__getitem__, range(blocks * examples.block)):
        np.add.at(times, example["input_ids"][example["source_ids"] == 1].numpy() - 10**6, 1)
    # a sequence more or less in each block
    assert times.sum() == pytest.approx(weight * blocks * 1024 * 256, abs=blocks * 256)
    assert times.sum() < ends[-1] and (times > 0).sum() >= times.sum() - blocks * 256
    # the last one is not ended, and at a block's end tokens may be left out
    ended = [(times[end - len(ids) : end] > 0).mean() for ids, end in zip(books.documents, ends)]
    assert sum(0 < share < 0.9 for share in ended) <= 1


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30), st.integers(0, 200_000))
@settings(max_examples=200, deadline=None)
def test_an_order_knows_where_it_is_after_so_many_tokens(lengths, tokens):
    order = DocumentOrder(ArrayDocuments("any", [np.arange(max(length, 3)) for length in lengths], True), seed=3)
    number, left = 0, tokens
    while left >= len(order[number]):
        left -= len(order[number])
        number += 1
    assert order.place(tokens) == (number, left)


@pytest.mark.parametrize("codes", [62, 250])
def test_images_that_fill_half_a_row_or_nearly_all_of_it_do_not_stop_the_stream(codes):
    rng = np.random.default_rng(codes)
    documents = [stories(rng, 100, codes=codes, text=(3, 200))]
    for length in (codes + 4, 2 * codes + 12):
        result = account(packed(documents, (1,), length, 300), 300, documents, lone_texts=True)
        # eight open documents whose next token is always an image would leave whole rows empty
        assert result.padding / (300 * length) < 0.15
        assert all((np.diff(np.sum(result.tokens, axis=1)) > 0).tolist())
        assert result.ended[0] > 10


def test_an_image_larger_than_a_sequence_is_refused():
    documents = [stories(np.random.default_rng(0), 5, codes=64)]
    with pytest.raises(ValueError, match=r"'stories' has 67 tokens that cannot be cut.*`sequence_length` is 66"):
        packed(documents, (1,), 66, 10)[0]
    assert packed(documents, (1,), 67, 10)[0]["source_ids"].min() >= -1


def spread(rng, share):
    """A pair of bounds of lengths, near or far from one another."""
    least = int(rng.integers(8, 200))
    return least, least + int(rng.integers(1, 300) * share)


@st.composite
def mixtures(draw):
    """One to four sources of any lengths, weights and rows that all of them fit into with room to spare."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    codes = draw(st.sampled_from([4, 16, 64]))
    kinds = draw(st.lists(st.sampled_from(["captions", "stories", "lines"]), min_size=1, max_size=4))
    documents = []
    for kind in kinds:
        least, most = spread(rng, draw(st.floats(0, 1)))
        if kind == "captions":
            # of one length they leave the same gap in every row, which may be no piece of anything
            most = max(most, least + 16)
            documents.append(captions(rng, 200, least + codes, most + codes, codes))
        elif kind == "lines":
            documents.append(lines(rng, 200, least, most))
        else:
            texts = (draw(st.integers(1, 40)), draw(st.integers(41, 150)))
            documents.append(stories(rng, 60, least + codes, 20 * most, codes, texts, draw(st.floats(0, 1))))
    weights = draw(st.lists(st.floats(0.05, 1), min_size=len(kinds), max_size=len(kinds)))
    whole = [len(ids) for entry in documents if not entry.can_be_cut for ids in entry.documents]
    longest = max(codes + 3, *whole, 0)
    return documents, weights, draw(st.integers(longest, 6 * longest)), longest


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mixtures())
def test_any_mixture_is_written_piece_by_piece_and_keeps_its_weights(mixture):
    documents, weights, length, longest = mixture
    rows = 150
    result = account(packed(documents, weights, length, rows), rows, documents, lone_texts=True)
    assert result.most_open <= OPEN
    shares, wanted = result.tokens[-1] / result.tokens[-1].sum(), np.asarray(weights) / sum(weights)
    # where a row has room for several of the largest things that are not cut, nothing stands in the way of the weights
    if length >= 4 * longest:
        assert np.abs(shares - wanted).max() < 0.02
        if any(entry.can_be_cut for entry in documents):
            assert result.padding / (rows * length) < 0.03
