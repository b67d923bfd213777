# SPDX-License-Identifier: Apache-2.0
"""Scores of captions, and captions generated for codes."""

import copy

import pytest
import torch

from helpers.tiny import tiny_model, tiny_processor
from modeling_moma.evaluation.captions import caption_scores, derangement, measure_captions, normalise, word_overlap
from modeling_moma.evaluation.held_out import CaptionedImages
from modeling_moma.evaluation.measures import draw_images, write_captions


def test_case_and_spaces_do_not_count():
    assert normalise("  Noto:\tred\n APPLE ") == "noto: red apple"
    scores = caption_scores([" Noto:  Red apple", "castle"], ["noto: red apple", "a castle"])
    assert scores["exact_match"] == 0.5


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("red apple", "apple red", 1.0),
        # precision 1/2, recall 1/3
        ("red castle", "red apple tree", 0.4),
        # a word counts as often as it occurs on both sides: precision 1/3, recall 1/1
        ("red red red", "red", 0.5),
        ("", "apple", 0.0),
        ("", " ", 1.0),
        # punctuation is part of its word
        ("noto apple", "noto: apple", 0.5),
    ],
)
def test_overlap_is_the_f1_of_words_with_their_counts(text, reference, expected):
    assert word_overlap(text, reference) == pytest.approx(expected)
    assert word_overlap(reference, text) == pytest.approx(expected)


def test_numbers_that_differ_are_refused():
    for texts, references in (([], []), (["one"], ["one", "two"])):
        with pytest.raises(ValueError, match="texts"):
            caption_scores(texts, references)
    with pytest.raises(ValueError, match="codes"):
        CaptionedImages(torch.zeros(2, 16, dtype=torch.long), ["one"])
    with pytest.raises(ValueError, match="row of codes"):
        CaptionedImages(torch.zeros(2, dtype=torch.long), ["one", "two"])


@pytest.mark.parametrize("length", [2, 3, 50])
def test_derangement_moves_every_place_and_depends_on_the_seed_alone(length):
    order = derangement(length, seed=1)
    assert sorted(order) == list(range(length))
    assert all(place != number for place, number in enumerate(order))
    assert order == derangement(length, seed=1)


def test_derangement_of_one_place_is_refused():
    with pytest.raises(ValueError, match="length"):
        derangement(1)


@pytest.fixture
def parts():
    """A model whose random captions differ and end, and images for it."""
    processor = tiny_processor()
    model = tiny_model(processor, initializer_range=0.5)
    with torch.no_grad():
        model.lm_head.weight[processor.tokenizer.eos_token_id] *= 2
    return model, processor, torch.randint(0, 32, (6, 16), generator=torch.Generator().manual_seed(0))


def test_what_the_model_writes_is_an_exact_match_with_itself_alone(parts):
    model, processor, codes = parts
    first = measure_captions(model, processor, CaptionedImages(codes, ["thing"] * 6), 4)
    assert first["generated"] == {"exact_match": 0.0, "overlap": 0.0} and first["images"] == 6
    written = [sample["generated"] for sample in first["samples"]]
    assert all(written) and len(set(written)) == 6
    again = measure_captions(model, processor, CaptionedImages(codes, written), 3)
    assert again["generated"] == {"exact_match": 1.0, "overlap": 1.0}
    assert again["floor"] == {"exact_match": 0.0, "overlap": pytest.approx(0, abs=0.5)}
    alone = measure_captions(model, processor, CaptionedImages(codes[:1], written[:1]), 3)
    assert alone["floor"] is None and alone["generated"]["exact_match"] == 1.0


def test_a_models_own_configuration_changes_neither_captions_nor_drawings(parts):
    model, processor, codes = parts
    drawing = {"do_sample": True, "temperature": 0.7}
    captions = write_captions(model, processor, codes, 3)
    drawn = draw_images(model, processor, ["red", "apple"], 2, drawing, 0)
    settings = {"min_new_tokens": 9, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "top_k": 2, "num_beams": 3}
    others = {"suppress_tokens": [5], "return_dict_in_generate": True, "generation_mode": "interleaved"}
    model.generation_config.update(**settings, **others)
    own = copy.deepcopy(model.generation_config.to_dict())
    assert write_captions(model, processor, codes, 3) == captions
    assert torch.equal(draw_images(model, processor, ["red", "apple"], 2, drawing, 0), drawn)
    assert model.generation_config.to_dict() == own


def test_captions_may_be_as_long_as_the_longest_reference(parts):
    model, processor, codes = parts
    with torch.no_grad():
        model.lm_head.weight[processor.tokenizer.eos_token_id] = 0

    def written(reference):
        report = measure_captions(model, processor, CaptionedImages(codes[:1], [reference]), 3)
        return report["samples"][0]["generated"]

    short, long = written("red"), written("noto: red apple " * 20)
    assert long.startswith(short.rstrip("\ufffd")) and len(long) > len(short)
