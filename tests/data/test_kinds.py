# SPDX-License-Identifier: Apache-2.0
"""Kinds of sources: how a recipe's columns tell them, and one that is added in a single class."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from helpers.tiny import noise_images, tiny_processor
from modeling_moma.data.documents import TokenFolder
from modeling_moma.data.images import SkippedRow
from modeling_moma.data.jobs import plan_job, write_job, write_manifest
from modeling_moma.data.kinds import (
    KINDS,
    AudioKind,
    CaptionKind,
    InterleavedKind,
    SourceKind,
    TextKind,
    read_kind,
    source_kind,
)
from modeling_moma.data.kinds.base import Shard, Template
from modeling_moma.data.kinds.interleaved import Segment, read_messages, read_segments
from modeling_moma.data.sources import read_sources, source_texts
from modeling_moma.data.stream import DocumentExamples
from modeling_moma.data.tokenizing import run_tasks
from modeling_moma.errors_moma import InputError
from modeling_moma.training.image_store import candidates
from tokenization.text_tokenizer_moma import message_text


@dataclass(frozen=True)
class QuizKind(SourceKind):
    """An image, a question and its answer in every row: `<bos> image question answer <eos>`."""

    photo: str
    question: str
    answer: str
    min_side: int = 8

    name = "quiz"
    discriminator_fields = ("question",)
    hint = "`photo`, `question` and `answer` of a quiz"
    has_images = True

    def columns(self) -> list[str]:
        return [self.photo, self.question, self.answer]

    def row_texts(self, row: dict[str, Any]) -> Iterator[str]:
        yield from (row[self.question], row[self.answer])

    def row_images(self, row: dict[str, Any]) -> list[Any]:
        return [row[self.photo]]

    def documents(self, shard: Shard) -> Iterator[tuple[str, dict[str, Any]]]:
        def read(index: int, row: dict[str, Any]) -> tuple[torch.Tensor, str]:
            return shard.pixel_values(row[self.photo], self.min_side), f"{row[self.question]} {row[self.answer]}"

        for index, split, (pixel_values, text) in shard.read_rows(read):
            codes = shard.codes(pixel_values)[0].tolist()
            yield from shard.document(index, split, shard.encoder.document([codes, text]), len(codes))


@pytest.fixture
def quiz(monkeypatch):
    # taken out again at the end
    monkeypatch.setitem(KINDS, "quiz", QuizKind)
    return source_kind(QuizKind)


def write_quiz(path, images):
    def encoded(image):
        buffer = BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()

    rows = [
        {"image": encoded(image) if image else None, "q": f"what is {index}", "a": f"number {index}"}
        for index, image in enumerate(images)
    ]
    Dataset.from_list(rows).to_parquet(path)


def test_added_kind_goes_from_the_recipe_to_the_stream(quiz, tmp_path):
    processor = tiny_processor()
    processor.save_pretrained(tmp_path / "processor")
    images = noise_images(7)
    write_quiz(str(tmp_path / "quiz.parquet"), [*images, None])
    fields = {"data": str(tmp_path / "quiz.parquet"), "photo": "image", "question": "q", "answer": "a", "held_out": 0}
    sources = read_sources({"quiz": fields})
    assert type(sources[0].kind) is quiz
    assert list(source_texts(sources, 2)) == ["what is 0", "number 0", "what is 1", "number 1"]
    assert len([entry for entry in candidates(sources[0]) if entry.value is not None]) == 7

    job = plan_job(sources, str(tmp_path / "processor"), 64, True, seed=0)
    write_job(tmp_path / "tokens", job)
    run_tasks(tmp_path / "tokens", job, 1)
    manifest = write_manifest(tmp_path / "tokens", job)
    entry = manifest["sources"]["quiz"]
    assert entry["fields"] == {name: value for name, value in sources[0].fields().items()}
    assert entry["read"]["train"]["left_out"] == {"image missing": 1}
    assert entry["splits"]["train"]["tokens"]["image"] == 7 * processor.image_seq_length

    tokens = TokenFolder(tmp_path / "tokens", processor)
    documents = tokens.documents(tokens.sources()[0])
    example = DocumentExamples([documents], [1.0], 7, seed=1)[0]["input_ids"]
    row = next(row for row in range(7) if np.array_equal(documents.ids(row, np.random.default_rng(0)), example))
    codes = torch.tensor(processor.encode_images([images[row]])[0])
    ids = processor.image_ids(codes.tolist())
    assert list(example[1 : 1 + len(ids)]) == ids
    assert processor.tokenizer.decode(list(example[1 + len(ids) : -1])) == f"what is {row} number {row}"


def test_added_kind_has_the_errors_of_the_others(quiz):
    with pytest.raises(ValueError, match="'qestion' is no field of a source of texts. Did you mean 'question'"):
        read_kind("pics", {"text": "label", "qestion": "q"}, ("held_out", "question"))
    with pytest.raises(ValueError, match="'pics': 'anser' is no field of a source of quizs. Did you mean 'answer'"):
        read_kind("pics", {"photo": "image", "question": "q", "anser": "a"})
    with pytest.raises(ValueError, match="has no 'answer': a source names its columns, .*of captions.*of a quiz"):
        read_kind("pics", {"photo": "image", "question": "q"})


def test_two_kinds_cannot_be_told_by_one_field(quiz):
    @dataclass(frozen=True)
    class Other(QuizKind):
        name = "other"

    with pytest.raises(ValueError, match="Other has the field 'question' of QuizKind"):
        source_kind(Other)


def test_columns_tell_the_kind():
    for fields, kind in (
        ({"text": "label"}, TextKind),
        ({"text": "label", "image": "file"}, CaptionKind),
        ({"segments": "parts"}, InterleavedKind),
        ({"messages": "chat", "images": "files", "audios": "sounds"}, InterleavedKind),
        ({"audio": "file", "text": "{speaker}: {sentence}", "audio_first": 0.3}, AudioKind),
    ):
        found = read_kind("pics", fields)
        assert type(found) is kind and read_kind("pics", found.fields()) == found
    assert sorted(KINDS) == ["caption", "interleaved", "sound", "text"]


TURN = {"role": "user", "content": "red"}


@pytest.mark.parametrize(
    "column, odd",
    [
        ("segments", "A red fox."),
        ("segments", {"text": ["red"], "image": [None]}),
        ("messages", 7),
        ("messages", [{"from": "human", "value": "red"}]),
        ("messages", ["red"]),
        ("messages", json.dumps([TURN])),
        ("messages", {"role": ["user"], "content": ["red"]}),
        ("messages", [{"role": "user", "content": 7}]),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": 7}]}]),
    ],
)
def test_row_of_another_shape_is_left_out(column, odd):
    kind, row = read_kind("mine", {column: "column"}), {"column": odd}
    with pytest.raises(SkippedRow, match="segment unknown|chat not readable|7"):
        read_segments(kind, row) if column == "segments" else read_messages(kind, row, tiny_processor())
    assert list(kind.row_texts(row)) == [] and kind.row_images(row) == []


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"text": "red", "image": None}, "red"),
        ({"text": "red", "image": ""}, "red"),
        ({"text": "", "image": "0.png"}, Segment("image", "0.png")),
        ({"text": "red", "image": {"bytes": None, "path": None}, "audio": ""}, "red"),
        ({"type": "image", "text": "of red", "image": "0.png"}, Segment("image", "0.png")),
        ({"type": "text", "text": "red", "image": "0.png"}, "red"),
        ({"text": "", "image": None}, None),
        ({"text": "red", "image": "0.png"}, "holds text and image: which comes first"),
        ({"image": "0.png", "audio": "0.wav"}, "holds image and audio"),
        ({"text": None, "image": None}, "neither a text nor"),
    ],
)
def test_segment_is_one_thing(entry, expected):
    kind, row = read_kind("mine", {"segments": "parts"}), {"parts": [entry]}
    if isinstance(expected, str) and " " in expected:
        with pytest.raises(SkippedRow, match=expected):
            read_segments(kind, row)
    else:
        assert read_segments(kind, row) == ([] if expected is None else [expected])
    is_image = isinstance(expected, Segment)
    assert kind.row_images(row) == ([expected.value] if is_image else []) and kind.row_sounds(row) == []


@pytest.mark.parametrize("images", ["0.png", {"bytes": b"0", "path": None}, ["0.png"]])
def test_images_of_a_chat_are_those_of_its_parts_or_its_column(images):
    kind, column = read_kind("mine", {"messages": "chat", "images": "files"}), {"files": images}
    for content, expected in (
        ("<image> red", images if isinstance(images, list) else [images]),
        ([{"type": "image", "path": "1.png"}, {"type": "text", "text": "red"}], ["1.png"]),
        ([{"type": "image", "image": {"bytes": None, "path": None}, "url": "", "path": "1.png"}], ["1.png"]),
    ):
        row = {"chat": [{"role": "user", "content": content}], **column}
        _, segments = read_messages(kind, row, tiny_processor())
        assert [segment.value for segment in segments] == expected == kind.row_images(row)


@pytest.mark.parametrize("role", ["<image>", "user<eos>"])
def test_special_tokens_in_a_role_are_characters(role):
    row, processor = {"chat": [{"role": role, "content": "red"}]}, tiny_processor()
    text, segments = read_messages(read_kind("mine", {"messages": "chat"}), row, processor)
    ids = processor.tokenizer(text, add_special_tokens=False, sanitize_control_tokens=True)["input_ids"]
    plain = processor.tokenizer(role, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert segments == [] and str(plain)[1:-1] in str(ids)
    assert not {processor.tokenizer.eos_token_id, processor.tokenizer.convert_tokens_to_ids("<image>")} & set(
        ids[1:-1]
    )


@pytest.mark.parametrize(
    "turn, written", [("{% if message['role'] != 'system' %}{{ turn }}{% endif %}", 1), ("{{ turn * 2 }}", 4)]
)
def test_a_chat_whose_template_leaves_a_turn_out_or_repeats_it_is_left_out(tmp_path, turn, written):
    processor, images = tiny_processor(), noise_images(2)
    processor.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        + message_text()
        + turn.replace("turn ", "turn.text ")
        + "{% endfor %}"
    )
    processor.save_pretrained(tmp_path / "processor")
    for place, image in enumerate(images):
        image.save(tmp_path / f"{place}.png")
    chat = [
        {"role": role, "content": [{"type": "image", "path": f"{place}.png"}]}
        for place, role in enumerate(("system", "user"))
    ]
    rows = [{"messages": chat}, {"messages": [{"role": "user", "content": "red"}]}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = read_sources({"chats": {"data": str(tmp_path / "chats.jsonl"), "messages": "messages", "held_out": 0}})
    job = plan_job(sources, str(tmp_path / "processor"), 64, True, 0)
    write_job(tmp_path / "tokens", job)
    run_tasks(tmp_path / "tokens", job, 1)
    read = write_manifest(tmp_path / "tokens", job)["sources"]["chats"]["read"]["train"]
    assert read["left_out"] == {"chat not readable": 1}
    assert f"the chat template wrote {written} images and sounds of 2" in read["named"][0]["detail"]
    write_job(tmp_path / "strict", job)
    with pytest.raises(InputError, match="'chats', split 'train', row 0: chat not readable: the chat template"):
        run_tasks(tmp_path / "strict", job, 1, strict=True)


@pytest.mark.parametrize("missing", [None, []])
def test_row_without_segments_or_messages_has_no_texts(missing):
    for column in ("segments", "messages"):
        assert list(read_kind("mine", {column: "column"}).row_texts({"column": missing})) == []
    turns = [{"role": "user", "content": " "}, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]
    for chat in (missing, turns, [{"role": "user", "content": missing}]):
        assert read_messages(read_kind("mine", {"messages": "column"}), {"column": chat}, tiny_processor()) == ("", [])


@pytest.mark.parametrize("value", [["a", "", "b"], ["a", float("nan"), "b"], ["a", None, [" ", None], ["b"]]])
def test_nothing_in_a_list_leaves_no_place(value):
    assert Template("{tags}").render({"tags": value}) == "a, b"
    shuffled = {Template("tags").render({"tags": value}, np.random.default_rng(seed)) for seed in range(9)}
    assert shuffled == {"a, b", "b, a"}
    # the shard is asked for nothing else
    shard: Any = SimpleNamespace(list_columns=["tags"])
    assert Shard.stored_text(shard, "tags", value) == ["a", "b"]
