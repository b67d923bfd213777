# SPDX-License-Identifier: Apache-2.0
"""Losses of a source against a loop over single documents and single targets."""

import math

import pytest
import torch

from helpers.tiny import tiny_model
from modeling_moma.data.encoding import DocumentEncoder
from modeling_moma.evaluation.losses import (
    CAUSAL,
    EXPERT_CHOICE,
    document_losses,
    perplexity,
    source_losses,
    trains_by_expert_choice,
)


EXPERTS = {"num_experts": {"text": 2, "image": 2}}


@pytest.fixture(scope="module")
def documents(processor):
    """Both orders of an image, two images among words, and words alone."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, processor.codebook_size, (4, processor.image_seq_length), generator=generator)
    tokenizer = processor.tokenizer
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("red apple", "castle: fruit")]
    two = [*words[0], *processor.image_ids(images[2]), *words[1], *processor.image_ids(images[3])]
    return [
        {"input_ids": DocumentEncoder(processor).caption("noto: red apple", images[0], True)},
        {"input_ids": [tokenizer.bos_token_id, *two, tokenizer.eos_token_id]},
        {"input_ids": DocumentEncoder(processor).caption("castle", images[1], False)},
        {"input_ids": [tokenizer.bos_token_id, *words[1], tokenizer.eos_token_id]},
    ]


@torch.no_grad()
def loop_losses(model, processor, documents):
    """Losses of every target by kind, one document at a time."""
    found = {"image": [], "frame": [], "words": []}
    codes = range(processor.image_token_offset, processor.image_token_offset + processor.codebook_size)
    frames = (processor.begin_image_token_id, processor.end_image_token_id)
    for document in documents:
        ids = document["input_ids"]
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for place, target in enumerate(ids[1:]):
            kind = "image" if target in codes else "frame" if target in frames else "words"
            found[kind].append(-log_probs[place, target].item())
    return found


def mean(values):
    return sum(values) / len(values)


def test_losses_are_those_of_a_loop_over_single_targets(processor, documents):
    model = tiny_model(processor, **EXPERTS)
    found = source_losses(model, processor, documents, 3)[CAUSAL]
    wanted = loop_losses(model, processor, documents)
    everything = [*wanted["image"], *wanted["frame"], *wanted["words"]]
    assert found["overall"] == pytest.approx(mean(everything), abs=1e-5)
    assert found["text"] == pytest.approx(mean([*wanted["frame"], *wanted["words"]]), abs=1e-5)
    assert found["words"] == pytest.approx(mean(wanted["words"]), abs=1e-5)
    assert found["image"] == pytest.approx(mean(wanted["image"]), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean(wanted["words"])), rel=1e-5)
    assert found["bits_per_code"] == {"image": pytest.approx(mean(wanted["image"]) / math.log(2), abs=1e-5)}
    # four images, the begin and the end of which are text
    assert found["targets"] == {
        "overall": len(everything),
        "text": len(wanted["words"]) + 8,
        "image": 4 * processor.image_seq_length,
        "words": len(wanted["words"]),
    }


def test_a_model_that_guesses_evenly_needs_the_bits_of_its_vocabulary(processor, documents):
    model = tiny_model(processor)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = source_losses(model, processor, documents, 4)[CAUSAL]
    assert found["bits_per_code"]["image"] == pytest.approx(math.log2(model.config.vocab_size), rel=1e-5)
    assert found["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-4)


def test_a_loss_too_large_for_a_perplexity_has_an_infinite_one():
    assert perplexity(709.0) == pytest.approx(math.exp(709)) and perplexity(710.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_parts_without_targets_have_no_loss(processor, documents):
    found = source_losses(tiny_model(processor), processor, documents[3:], 4)[CAUSAL]
    assert found["image"] is None and found["bits_per_code"] == {"image": None}
    assert found["words"] == found["text"] == found["overall"]


def test_expert_choice_stands_beside_with_its_warning_only_where_routers_were_trained_by_it(processor, documents):
    routed = tiny_model(processor, **EXPERTS)
    losses = source_losses(routed, processor, documents, 4)
    assert list(losses) == [CAUSAL, EXPERT_CHOICE] and "not a measure of quality" in EXPERT_CHOICE
    whole = document_losses(routed, processor, documents, 4, "expert_choice", "")
    assert losses[EXPERT_CHOICE]["overall"] == pytest.approx(whole["overall"], abs=1e-5)
    dense = tiny_model(processor, num_experts=1)
    assert list(source_losses(dense, processor, documents, 4)) == [CAUSAL]
    by_token = {"training_routing": "token_choice", "inference_routing": "token_choice"}
    assert not trains_by_expert_choice(tiny_model(processor, **by_token, **EXPERTS))
    assert trains_by_expert_choice(tiny_model(processor, num_experts=1, depth_layers=[1]))


def test_a_named_routing_gives_what_the_model_follows_by_itself(processor, documents):
    model = tiny_model(processor, **EXPERTS)
    assert document_losses(model, processor, documents, 2, "threshold", "losses") == document_losses(
        model, processor, documents, 2, None, "losses"
    )


def test_long_and_missing_documents_are_refused_by_source(processor, documents):
    model = tiny_model(processor, max_position_embeddings=20)
    with pytest.raises(ValueError, match="manual: document 1 has .*max_position_embeddings. = 20"):
        source_losses(model, processor, documents, 4, name="manual")
    with pytest.raises(ValueError, match="manual: there are no held-out documents"):
        source_losses(model, processor, [], 4, name="manual")
