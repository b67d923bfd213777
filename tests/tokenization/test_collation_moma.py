# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from tokenization import MomaDataCollator, train_text_tokenizer


@pytest.fixture
def tokenizer():
    return train_text_tokenizer(["red apple"], vocab_size=260)


def test_ragged_rows_are_padded_on_the_right_with_labels_of_all_tokens(tokenizer):
    batch = MomaDataCollator(tokenizer)([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert all(values.dtype == torch.long for values in batch.values())


def test_left_padding_multiple_and_given_fields(tokenizer):
    tokenizer.padding_side = "left"
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "mm_token_type_ids": [0, 1, 1]},
        {"input_ids": torch.tensor([8]), "labels": torch.tensor([8]), "mm_token_type_ids": [1]},
    ]
    batch = MomaDataCollator(tokenizer, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    # padding would have to predict the 8, and the first token of a row
    assert batch["labels"].tolist() == [[-100, -100, 6, 7], [-100, -100, -100, -100]]
    assert batch["mm_token_type_ids"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 1]]


def test_end_of_text_is_learnt_even_when_it_is_the_padding_token(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token_id
    batch = MomaDataCollator(tokenizer)([{"input_ids": [5, eos]}, {"input_ids": [5, 6, eos]}])
    assert batch["labels"].tolist() == [[5, eos, -100], [5, 6, eos]]


def test_padding_inside_an_example_is_no_label_and_predicts_none(tokenizer):
    rows = [{"input_ids": [5, 0, 6, 7], "attention_mask": [1, 0, 1, 1], "labels": [5, 0, 6, 7]}]
    assert MomaDataCollator(tokenizer)(rows)["labels"].tolist() == [[5, -100, -100, 7]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "features: the list is empty"),
        ([{"input_ids": [5]}, {"input_ids": []}], r"features\[1\]: needs at least one token"),
        ([{"input_ids": [5], "labels": [5, 6]}], r"`labels` has the shape"),
        ([{"input_ids": [5], "keywords": ["red"]}], "`keywords` is not one of"),
        ([{"input_ids": [5], "mm_token_type_ids": [0]}, {"input_ids": [5]}], r"features\[1\]: holds"),
    ],
)
def test_bad_examples_raise_and_are_named(tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        MomaDataCollator(tokenizer)(rows)


def test_bad_settings_raise(tokenizer):
    with pytest.raises(ValueError, match="pad_to_multiple_of: 0"):
        MomaDataCollator(tokenizer, pad_to_multiple_of=0)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        MomaDataCollator(tokenizer)
