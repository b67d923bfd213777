# SPDX-License-Identifier: Apache-2.0
"""Packed sequences: full, by weight, no image cut, documents apart, and the same from anywhere."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Features, List, Value
from datasets.arrow_writer import ArrowWriter

from helpers.tiny import tiny_documents, tiny_model, tiny_processor
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.data.packing import BLOCK, PackedCollator, PackedExamples
from modeling_moma.data.stream import ShardTable, TokenDocuments, cut_place


LENGTH = 96


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def frames(processor):
    return [(frame.begin, frame.end) for frame in processor.frames.values()]


def write_documents(path, processor, name, documents):
    features = Features({"input_ids": List(Value("int32"))})
    with ArrowWriter(path=str(path), features=features) as writer:
        for ids in documents:
            writer.write({"input_ids": ids})
        writer.finalize()
    return TokenDocuments(name, ShardTable([path]), LENGTH, frames(processor))


@pytest.fixture(scope="module")
def sources(processor, tmp_path_factory):
    """Captions, texts of a few to many tokens, and documents in which texts and images alternate."""
    folder, encoder, rng = tmp_path_factory.mktemp("packing"), DocumentEncoder(processor), np.random.default_rng(0)

    def words(least, most):
        return "red apple castle " * int(rng.integers(least, most))

    texts = [encoder.document([words(1, 12)]) for _ in range(40)]
    codes = rng.integers(0, processor.codebook_size, (80, processor.image_seq_length))
    mixed = [encoder.document([words(1, 8), codes[2 * n], words(0, 3), codes[2 * n + 1]]) for n in range(30)]
    return [
        tiny_documents(processor, 50),
        write_documents(folder / "texts.arrow", processor, "texts", texts),
        write_documents(folder / "mixed.arrow", processor, "mixed", mixed),
    ]


def packed(sources, processor, weights=(0.5, 0.25, 0.25), length=2000, seed=0):
    pad = processor.tokenizer.pad_token_id
    return PackedExamples(sources, weights, LENGTH, length, pad, frames(processor), seed)


def pieces(example):
    """The documents of a sequence, by where positions begin again."""
    starts = np.flatnonzero(example["position_ids"].numpy() == 0).tolist()
    ids = example["input_ids"].tolist()
    return [ids[start:end] for start, end in zip(starts, [*starts[1:], len(ids)])]


def test_documents_go_in_whole_or_are_cut_outside_of_images(sources, processor):
    examples = packed(sources, processor)
    (begin, end), = frames(processor)  # fmt: skip
    bos, eos = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    for index in range(200):
        example = examples[index]
        positions, ids, labels = (example[name].tolist() for name in ("position_ids", "input_ids", "labels"))
        for place, position in enumerate(positions):
            assert position == 0 or position == positions[place - 1] + 1
            assert labels[place] == (-100 if position == 0 else ids[place])
        source = [example["source_ids"][place].item() for place, position in enumerate(positions) if position == 0]
        for piece, of in zip(pieces(example), source, strict=True):
            assert piece.count(begin) == piece.count(end)
            for place in (place for place, token in enumerate(piece) if token == begin):
                assert piece[place + processor.image_seq_length + 1] == end
            if of == 0:
                assert piece[0] == bos and piece[-1] == eos


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_sequence_is_the_same_wherever_reading_begins(sources, processor, monkeypatch):
    monkeypatch.setattr("modeling_moma.data.packing.BLOCK_TOKENS", 0)
    whole = packed(sources, processor)
    expected = [whole[index] for index in range(BLOCK + 20)]
    for start in (1, 17, BLOCK - 1, BLOCK, BLOCK + 7):
        again = packed(sources, processor)
        assert equal(again[start], expected[start])
        assert equal(again[start + 3], expected[start + 3]) if start + 3 < len(expected) else True
    # backwards, too
    assert equal(whole[5], expected[5])
    assert not equal(packed(sources, processor, seed=1)[0], expected[0])


def test_workers_give_the_same_batches(sources, processor):
    examples = packed(sources, processor, length=48)
    alone = [examples[index] for index in range(48)]
    collate = PackedCollator(lambda rows: rows)
    loader = torch.utils.data.DataLoader(examples, batch_size=4, num_workers=2, collate_fn=collate)
    for number, batch in enumerate(loader):
        for place in range(4):
            assert equal({name: batch[name][place] for name in alone[0]}, alone[4 * number + place])
    rank = torch.utils.data.DataLoader(
        torch.utils.data.Subset(examples, range(1, 48, 2)), batch_size=4, num_workers=2, collate_fn=collate
    )
    assert torch.equal(next(iter(rank))["input_ids"][1], alone[3]["input_ids"])


def test_passes_show_every_document_about_once(processor, monkeypatch):
    """A block begins where the first one's tokens and the mean length say, so that few come twice or not at all."""
    monkeypatch.setattr("modeling_moma.data.packing.BLOCK_TOKENS", 0)
    documents, blocks = tiny_documents(processor, 2000), 4
    examples = packed([documents], processor, (1.0,), length=blocks * BLOCK)
    seen, begin = Counter(), processor.begin_image_token_id
    owner = {tuple(documents.codes(row)): row for row in range(2000)}
    for index in range(blocks * BLOCK):
        for piece in pieces(examples[index]):
            if begin in piece:
                start = piece.index(begin) + 1
                seen[owner[tuple(np.asarray(piece[start : start + 16]) - processor.image_token_offset)]] += 1
    total = sum(seen.values())
    passes, rest = divmod(total, 2000)
    fewest = sum(min(count, passes) for count in seen.values()) / (2000 * passes)
    assert passes >= 1 and fewest > 0.98
    assert examples.epochs(blocks * BLOCK) == pytest.approx([total / 2000], rel=0.01)


def reference_cut(ids, room, frames):
    if len(ids) <= room:
        return len(ids)
    place = room
    while place:
        inside = any(ids[:place].count(begin) > ids[:place].count(end) for begin, end in frames)
        if not inside:
            return place
        place -= 1
    return 0


def test_cut_place_is_that_of_a_plain_loop():
    rng, marks = np.random.default_rng(0), [(8, 9)]
    for _ in range(300):
        ids = []
        while len(ids) < 30:
            ids += [8, 1, 1, 1, 9] if rng.random() < 0.3 else [int(rng.integers(2, 8))]
        room = int(rng.integers(1, 40))
        assert cut_place(np.asarray(ids), room, marks) == reference_cut(ids, room, marks)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"training_routing": "token_choice", "inference_routing": "token_choice"},
        {"depth_layers": [0], "depth_capacity": 0.5, "auxiliary_routers": True},
        {"num_experts": 4},
    ],
)
def test_a_step_takes_the_padding_of_a_sequence_for_nothing(processor, fields):
    """Its loss, gradients, thresholds and biases are those of the sequence without its padding."""
    documents = tiny_documents(processor, 50, labels=["a label of some words", "short"])
    examples = packed([documents], processor, (1.0,), length=200)
    example = next(example for example in map(examples.__getitem__, range(200)) if 0 in example["attention_mask"])
    batch = {name: values[None] for name, values in example.items() if name != "source_ids"}
    end = int(example["attention_mask"].sum())
    found = []
    for length in (LENGTH, end):
        torch.manual_seed(0)
        model = tiny_model(processor, initializer_range=0.2, **fields).train()
        loss = model(**{name: values[:, :length] for name, values in batch.items()}, use_cache=False).loss
        loss.backward()
        gradients = {f"gradient of {name}": value.grad for name, value in model.named_parameters()}
        buffers = dict(model.named_buffers())
        found.append({"loss": loss.detach(), **gradients, **buffers})
    padded, whole = found
    assert any("threshold" in name for name in whole) and padded.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(padded[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_shards_read_rows_of_any_file(processor, tmp_path):
    rows = [[1, 2, 3], [], [4], [5, 6]]
    for number, part in enumerate((rows[:1], rows[1:3], rows[3:])):
        write_documents(tmp_path / f"{number}.arrow", processor, "x", part)
    table = ShardTable([tmp_path / f"{number}.arrow" for number in range(3)])
    assert [table.numbers("input_ids", row).tolist() for row in range(len(table))] == rows
    with pytest.raises(IndexError):
        table.numbers("input_ids", 4)
    assert json.dumps(table.value("input_ids", 3)) == "[5, 6]"
