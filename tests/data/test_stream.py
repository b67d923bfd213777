# SPDX-License-Identifier: Apache-2.0
"""Documents of their own: each known from its number, every image once a pass, sources by their weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.packed_sources import BOS, EOS, FRAMES, WORDS, lines
from helpers.tiny import CAPTIONS, tiny_documents, tiny_processor, tiny_rows
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.data.kinds import CaptionDocuments
from modeling_moma.data.sources import read_sources
from modeling_moma.data.stream import DocumentExamples, SourceScheduler, TokenDocuments, mean_length


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def documents(processor):
    kind = read_sources({"emoji": CAPTIONS})[0].kind
    rows = tiny_rows(processor, 6, codings=3)
    for row in rows[1::2]:
        row |= {"style": "twemoji", "keywords": []}
    return CaptionDocuments.from_rows("emoji", kind, rows, DocumentEncoder(processor))


def stream(documents, length=600, seed=0):
    return DocumentExamples([documents], [1.0], length, seed)


def test_a_stream_ends_at_its_length(documents):
    examples = stream(documents, length=7)
    assert list(examples) == [examples[index] for index in range(7)]
    for index in (-1, 7):
        with pytest.raises(IndexError):
            examples[index]


def reference_example(processor, rows, index, seed):
    """The stream of one source of captions, written out."""
    epoch, place = divmod(index, len(rows))
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    rng = np.random.default_rng([seed, 1, index])
    row = rows[order[place]]
    codes = row["codes"][rng.integers(len(row["codes"]))]
    image_first = rng.random() < 0.5
    text = f"{row['style']}: {row['label']}"
    if row["keywords"] and rng.random() < 0.25:
        text = f"{row['style']} tags: {', '.join(rng.permutation(row['keywords']))}"
    if not image_first and rng.random() < 0.1:
        text = ""
    words = processor.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    image = processor.image_ids(codes)
    middle = [*image, *words] if image_first else [*words, *image]
    return [processor.tokenizer.bos_token_id, *middle, processor.tokenizer.eos_token_id]


def test_examples_are_those_of_the_plain_reference(processor):
    rows = tiny_rows(processor, 7, codings=3)
    examples = DocumentExamples([tiny_documents(processor, 7, codings=3)], [1.0], 200, seed=3)
    for index in range(200):
        assert examples[index]["input_ids"] == reference_example(processor, rows, index, seed=3)


def test_held_out_examples_have_both_orders_and_plain_labels(processor, documents):
    held_out = documents.held_out()
    assert len(held_out) == 12
    first, second = (processor.tokenizer.decode(held_out[index]) for index in (0, 6))
    assert first.startswith("<bos><|begin_image|>") and first.endswith("<|end_image|>noto: thing 0<eos>")
    assert second.startswith("<bos>noto: thing 0<|begin_image|>")
    some = documents.held_out([4, 2])
    assert len(some) == 4 and some[0] == held_out[4] and some[3] == held_out[8]
    with pytest.raises(IndexError):
        held_out[12]


def behind(distances, number):
    """The sources of so many documents, each that of the one most behind, written out."""
    counts, sources = [0] * len(distances), []
    for _ in range(number):
        sources.append(min(range(len(distances)), key=lambda source: counts[source] * distances[source]))
        counts[sources[-1]] += 1
    return sources


@pytest.mark.parametrize(
    ("lengths", "weights"),
    [((8, 2950), (0.9, 0.1)), ((50, 50), (1, 1e-3)), ((50, 50, 50), (1, 1, 1)), ((7, 31, 500, 90), (0.2, 3, 0.4, 1))],
)
def test_sources_take_turns_as_in_the_plain_reference_from_any_place(lengths, weights):
    turns = SourceScheduler(lengths, weights)
    sources = behind(turns.distances, 3000)
    seen = [sources[:index].count(source) for index, source in enumerate(sources)]
    assert [turns[index] for index in range(3000)] == list(zip(sources, seen))
    assert turns.counts(2345) == [sources[:2345].count(source) for source in range(len(lengths))]


@pytest.mark.parametrize(("lengths", "weights"), [((8, 2950), (0.97, 0.03)), ((50, 50), (1, 1e-5)), ((9, 9), (1, 1))])
def test_no_source_is_a_document_off_its_weight_however_rare_it_is(lengths, weights):
    turns = SourceScheduler(lengths, weights)
    for number in (500, 20_000, 10**6, 10**9):
        tokens = np.asarray(turns.counts(number)) * lengths
        wanted = np.asarray(weights) / sum(weights) * tokens.sum()
        assert (np.abs(tokens - wanted) <= np.asarray(lengths).max()).all()


def test_documents_of_which_the_beginnings_are_read_keep_their_weights():
    rng = np.random.default_rng(0)

    def texts(name, number, length):
        ids = [np.concatenate([[BOS], rng.integers(*WORDS, length - 2), [EOS]]) for _ in range(number)]
        return TokenDocuments(name, ListTable(ids), 64, FRAMES)

    many = [texts("short", 40, 20), texts("long", 20, 900)]
    examples = DocumentExamples(many, (0.7, 0.3), 2000, cuts=True)
    tokens = np.zeros(2)
    for index in range(2000):
        tokens[examples[index]["source"]] += len(examples[index]["input_ids"])
    assert tokens / tokens.sum() == pytest.approx([0.7, 0.3], abs=0.02)


class ListTable:
    """As much of a table of shards as documents of ids need."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def numbers(self, column, row):
        return self.ids[row]

    def lengths(self, column):
        return [np.array([len(ids) for ids in self.ids])]


class UnknownLengths:
    """Documents of whose lengths nothing is known before they are made."""

    def __init__(self, lengths):
        self.made, self.own = 0, lengths

    def __len__(self):
        return len(self.own)

    def lengths(self):
        return None

    def ids(self, row, rng):
        self.made += 1
        return np.zeros(self.own[row])


@pytest.mark.parametrize(
    "lengths",
    [
        np.tile([70, 80, 90, 120, 300], 255)[:-4],
        np.minimum(70 + np.exp(np.random.default_rng(0).normal(2.5, 1.2, 20_000)), 500).astype(int),
        np.array([3, 900, 4]),
    ],
    ids=["in turn", "of any length", "three"],
)
def test_the_mean_length_holds_for_documents_in_turn_and_of_any_length(lengths):
    assert mean_length(UnknownLengths(lengths)) == pytest.approx(lengths.mean(), rel=0.02)


def mixed_captions(processor, rows, shares, image_first, without_caption, seed=0):
    """Captions of rows of which some lack a column, with alternatives that are far longer."""
    rng = np.random.default_rng(seed)
    fields = {"data": "mine", "image": "image", "text": "label", "image_first": image_first}
    fields["alternatives"] = [{"text": name, "share": share} for name, share in zip(("more", "most"), shares)]
    (source,) = read_sources({"mine": {**fields, "without_caption": without_caption}})
    table = tiny_rows(processor, rows)
    for row in table:
        row["more"] = " ".join(["red apple"] * rng.integers(0, 40))
        row["most"] = " ".join(["fruit"] * rng.choice([0, 90]))
    return CaptionDocuments.from_rows("mine", source.kind, table, DocumentEncoder(processor)), table


@given(
    st.integers(1, 300),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=40)
def test_the_mean_length_of_captions_is_that_of_every_way_to_write_them(rows, shares, image_first, without, seed):
    processor = tiny_processor()
    documents, table = mixed_captions(processor, rows, shares, image_first, without, seed)

    def length(text, is_first):
        return len(documents.encoder.caption(text, [0] * processor.image_seq_length, is_first))

    total = 0.0
    for row in table:
        ways = [(1.0, row["label"])]
        # asked in turn: a later one is drawn where those before it are not
        for name, share in reversed(list(zip(("more", "most"), shares))):
            if row[name]:
                ways = [(share, row[name])] + [((1 - share) * chance, text) for chance, text in ways]
        first = sum(chance * length(text, True) for chance, text in ways)
        second = sum(chance * length(text, False) for chance, text in ways)
        second = without * length("", False) + (1 - without) * second
        total += image_first * first + (1 - image_first) * second
    sampled = 1e-9 if rows <= 256 else 0.02
    assert mean_length(documents) == pytest.approx(total / rows, rel=sampled)


@pytest.mark.parametrize("rows", [1, 3, 10, 250])
def test_few_captions_of_which_some_are_long_keep_their_weight(processor, rows):
    few, _ = mixed_captions(processor, rows, (0.25, 0.1), 0.5, 0.1)
    others = lines(np.random.default_rng(0), 400, 20, 60)
    examples = DocumentExamples([few, others], (0.5, 0.5), 6000)
    tokens = np.zeros(2)
    for index in range(6000):
        tokens[examples[index]["source"]] += len(examples[index]["input_ids"])
    assert abs(tokens[0] / tokens.sum() - 0.5) < 0.01


def test_documents_that_are_much_alike_are_not_made_by_the_thousand():
    alike = UnknownLengths(np.random.default_rng(0).integers(68, 80, 50_000))
    assert mean_length(alike) == pytest.approx(alike.own.mean(), rel=0.01) and alike.made == 512


def test_a_mixture_of_short_and_long_documents_keeps_its_weights():
    rng = np.random.default_rng(0)
    many = [lines(rng, 500, 4, 12), lines(rng, 50, 2900, 3000)]
    examples = DocumentExamples(many, (0.9, 0.1), 20_000)
    tokens = np.zeros(2)
    for index in range(20_000):
        tokens[examples[index]["source"]] += len(examples[index]["input_ids"])
    # a long document is two hundredths of all
    assert tokens / tokens.sum() == pytest.approx([0.9, 0.1], abs=0.02)
    assert examples.epochs(20_000)[1] == pytest.approx(7 / 50)


def test_workers_see_what_one_process_sees(documents):
    examples = stream(documents, 64)
    alone = [examples[index]["input_ids"] for index in range(64)]
    loader = torch.utils.data.DataLoader(examples, batch_size=4, num_workers=2, collate_fn=list)
    assert [row["input_ids"] for batch in loader for row in batch] == alone
