# SPDX-License-Identifier: Apache-2.0
"""Ranks by likelihood, with equal captions and equal images, against a loop over single pairs."""

import math
from statistics import fmean, median

import pytest
import torch
import torch.nn.functional as F

from helpers.tiny import tiny_model
from modeling_moma.evaluation.held_out import CaptionedImages
from modeling_moma.evaluation.retrieval import likeliest_drawings, measure_retrieval, rank_figures, ranks


# the third and the fourth share a caption, the fifth and the sixth an image
CAPTIONS = ["noto: red apple", "twemoji: green apple", "castle", "castle", "fruit", "red <eos> fruit", "noto"]


@pytest.fixture(scope="module")
def parts(processor):
    codes = torch.randint(0, 32, (7, 16), generator=torch.Generator().manual_seed(0))
    codes[5] = codes[4]
    model = tiny_model(processor, num_experts={"text": 2, "image": 2}, initializer_range=0.3)
    return model, processor, CaptionedImages(codes, CAPTIONS)


@torch.no_grad()
def target_log_probs(model, ids):
    """Log-probability of every token but the first, by its place."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return [0.0, *(-F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")).tolist()]


def words_of(processor, caption):
    return processor.tokenizer(caption, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def loop_caption_score(model, processor, codes, caption):
    words = words_of(processor, caption)
    ids = [processor.tokenizer.bos_token_id, *processor.image_ids(codes), *words, processor.tokenizer.eos_token_id]
    return sum(target_log_probs(model, ids)[-len(words) - 1 :]), len(words) + 1


def loop_image_score(model, processor, codes, caption):
    words = words_of(processor, caption)
    ids = [processor.tokenizer.bos_token_id, *words, *processor.image_ids(codes)]
    return sum(target_log_probs(model, ids)[-len(codes) - 1 : -1])


def loop_ranks(score, queries, answers, is_right):
    """Ranks of the pairs' own answers; wrong answers that are equal to one another count once."""
    found = []
    for row, query in enumerate(queries):
        own = score(query, answers[row])
        wrong = {key: answer for key, answer in answers.items() if not is_right(row, key)}
        distinct = {str(answer): answer for answer in wrong.values()}
        found.append((1 + sum(score(query, answer) >= own for answer in distinct.values()), 1 + len(distinct)))
    return found


def test_figures_are_those_of_a_loop_over_single_pairs(parts):
    model, processor, rows = parts
    found = measure_retrieval(model, processor, rows, batch_size=3)
    assert found["pairs"] == 7
    images = dict(enumerate(tuple(codes.tolist()) for codes in rows.codes))
    captions = dict(enumerate(CAPTIONS))

    def same(row, other):
        return captions[row] == captions[other] or images[row] == images[other]

    def caption_score(image, caption):
        return loop_caption_score(model, processor, image, caption)[0]

    def per_token(image, caption):
        total, count = loop_caption_score(model, processor, image, caption)
        return total / count

    def image_score(caption, image):
        return loop_image_score(model, processor, image, caption)

    def information(caption, image):
        return image_score(caption, image) - loop_image_score(model, processor, image, "")

    wanted = {
        "captions": [caption_score, per_token, lambda image, caption: image_score(caption, image)],
        "images": [image_score, information, lambda caption, image: caption_score(image, caption)],
    }
    sides = {"captions": (images, captions), "images": (captions, images)}
    for answers, scores in wanted.items():
        queries, candidates = sides[answers]
        for figures, score in zip(found[answers].values(), scores, strict=True):
            pairs = loop_ranks(score, list(queries.values()), candidates, same)
            rank, count = zip(*pairs)
            assert figures["recall@1"] == pytest.approx(fmean(value == 1 for value in rank))
            assert figures["recall@5"] == pytest.approx(fmean(value <= 5 for value in rank))
            assert figures["mean_reciprocal_rank"] == pytest.approx(fmean(1 / value for value in rank))
            assert figures["median_rank"] == median(rank)
            assert figures["chance"]["recall@1"] == pytest.approx(fmean(1 / value for value in count))


def test_equal_answers_are_one_and_equal_scores_count_against():
    scores = torch.tensor([[3.0, 3.0, 1.0], [0.0, 2.0, 5.0]])
    # the first query has two right answers, of which neither stands in the other's way
    rank, candidates = ranks(scores, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    assert rank.tolist() == [1, 1, 2] and candidates.tolist() == [2, 2, 3]
    rank, candidates = ranks(scores, torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert rank.tolist() == [2, 3] and candidates.tolist() == [3, 3]


def test_a_model_that_tells_nothing_apart_gets_nothing():
    rank, _ = ranks(torch.full((8, 8), math.nan), torch.arange(8), torch.arange(8))
    assert rank.tolist() == [8] * 8
    rank, candidates = ranks(torch.zeros(8, 8), torch.arange(8), torch.arange(8))
    figures = rank_figures(rank, candidates)
    assert (figures["recall@1"], figures["recall@5"], figures["median_rank"]) == (0.0, 0.0, 8.0)


def test_chance_is_what_random_orders_reach():
    chance = rank_figures(torch.tensor([1, 1, 1, 1]), torch.tensor([3, 6, 9, 9]))["chance"]
    assert chance["recall@5"] == pytest.approx((1 + 5 / 6 + 5 / 9 + 5 / 9) / 4)
    reciprocals = [sum(1 / place for place in range(1, count + 1)) / count for count in (3, 6, 9, 9)]
    assert chance["mean_reciprocal_rank"] == pytest.approx(fmean(reciprocals))
    assert rank_figures(torch.tensor([5]), torch.tensor([9]))["chance"]["median_rank"] == 5


def test_pairs_are_drawn_by_the_seed_and_two_are_needed(parts):
    model, processor, rows = parts
    two = measure_retrieval(model, processor, rows, 8, num_pairs=3, seed=1)
    assert two["pairs"] == 3 and two == measure_retrieval(model, processor, rows, 8, num_pairs=3, seed=1)
    with pytest.raises(ValueError, match="1 pairs"):
        measure_retrieval(model, processor, CaptionedImages(rows.codes[:1], CAPTIONS[:1]), 8)


def test_the_drawing_of_which_the_words_are_likeliest_is_chosen(parts):
    model, processor, rows = parts
    drawings, captions = rows.codes[:6].view(2, 3, 16), ["red", "castle"]
    found = likeliest_drawings(model, processor, drawings, captions, batch_size=4)
    for images, caption, chosen in zip(drawings, captions, found.tolist()):
        words = words_of(processor, caption)
        ids = [[processor.tokenizer.bos_token_id, *processor.image_ids(codes), *words] for codes in images]
        scores = [sum(target_log_probs(model, row)[-len(words) :]) for row in ids]
        assert chosen == max(range(3), key=lambda place: scores[place])
    with pytest.raises(ValueError, match="has the shape"):
        likeliest_drawings(model, processor, drawings, captions[:1])
    with pytest.raises(ValueError, match="no words"):
        likeliest_drawings(model, processor, drawings, ["red", " "])
