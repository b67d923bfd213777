# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from datasets import Dataset

from helpers.tiny import tiny_processor
from modeling_moma.training.examples import CaptionExamples, caption_texts, held_out_examples


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def codes(processor):
    rng = np.random.default_rng(0)
    return Dataset.from_dict(
        {
            "codes": rng.integers(0, processor.codebook_size, (6, 3, processor.image_seq_length)).tolist(),
            "style": ["noto", "twemoji"] * 3,
            "label": [f"thing {index}" for index in range(6)],
            "keywords": [["red", "fruit"], []] * 3,
        }
    )


def decode(processor, example):
    return processor.tokenizer.decode(example["input_ids"])


def test_an_index_always_gives_the_same_example(processor, codes):
    stream, other = (CaptionExamples(codes, processor, 600, seed=1) for _ in range(2))
    ahead = [other[index] for index in (599, 3, 100)]
    assert ahead == [stream[index] for index in (599, 3, 100)]


def test_each_pass_shows_every_picture_once(processor, codes):
    stream = CaptionExamples(codes, processor, 600)
    begin, length = processor.begin_image_token_id, processor.image_seq_length
    pictures = [row for coding in codes["codes"] for row in coding]
    owner = {tuple(row): index // 3 for index, row in enumerate(pictures)}
    for epoch in range(3):
        seen = set()
        for index in range(6 * epoch, 6 * epoch + 6):
            ids = stream[index]["input_ids"]
            start = ids.index(begin) + 1
            seen.add(owner[tuple(id_ - processor.image_token_offset for id_ in ids[start : start + length])])
        assert seen == set(range(6))


def test_half_of_the_examples_start_with_the_picture(processor, codes):
    stream = CaptionExamples(codes, processor, 600)
    first = [stream[index]["input_ids"][1] == processor.begin_image_token_id for index in range(600)]
    empty = sum(
        decode(processor, stream[index]).endswith("<|end_image|><eos>") and first[index] for index in range(600)
    )
    assert 0.42 < (sum(first) - empty) / 600 < 0.55
    # captionless examples, for guidance
    assert 0.02 < empty / 600 < 0.09


def test_held_out_examples_have_both_orders_and_plain_labels(processor, codes):
    examples = held_out_examples(codes, processor)
    assert len(examples) == 12
    assert decode(processor, examples[0]).startswith("<bos><|begin_image|>")
    assert decode(processor, examples[0]).endswith("<|end_image|>noto: thing 0<eos>")
    assert decode(processor, examples[6]).startswith("<bos>noto: thing 0<|begin_image|>")


def test_captions_never_confuse_labels_and_keywords(codes):
    texts = caption_texts(codes)
    assert texts[:2] == ["noto: thing 0", "noto tags: red, fruit"]
    # a picture without keywords has one caption
    assert "twemoji tags: " not in texts
