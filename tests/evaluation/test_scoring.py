# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities from one reading of each prefix against whole sequences, one at a time."""

import pytest
import torch

from helpers.tiny import tiny_model, tiny_processor
from modeling_moma.evaluation.retrieval import continuation_log_probs, paired_log_probs


EXPERTS = {"num_experts": {"text": 2, "image": 2}}
MODELS = {
    "dense": {},
    "experts": EXPERTS,
    "token_choice": {**EXPERTS, "training_routing": "token_choice", "inference_routing": "token_choice"},
    "depth": {**EXPERTS, "num_hidden_layers": 4, "depth_layers": [1, 3], "depth_capacity": 0.5},
}


@torch.no_grad()
def loop_score(model, prefix, continuation):
    """`log p(continuation | prefix)` of the whole sequence, token by token."""
    log_probs = model(input_ids=torch.tensor([[*prefix, *continuation]])).logits[0].double().log_softmax(-1)
    places = range(len(prefix) - 1, len(prefix) + len(continuation) - 1)
    return sum(log_probs[place, token].item() for place, token in zip(places, continuation, strict=True))


@pytest.mark.parametrize("name, batch_size", [("dense", 1), ("experts", 2), ("token_choice", 16), ("depth", 2)])
def test_scores_are_those_of_a_loop_over_single_pairs(name, batch_size, processor):
    model = tiny_model(processor, initializer_range=0.3, **MODELS[name])
    image = processor.image_ids(torch.arange(16))
    prefixes = [[1], [1, 60, 61, 62], [1, *image], [1, 70, image[0]]]
    # the pad id is a token like any other, and the first is no longer than one token
    continuations = [[2], [80, 0, 82, 2], image[1:-1], [80, 81], [90, 91, 92, 93, 94, 95, 2]]
    found = continuation_log_probs(model, prefixes, continuations, batch_size)
    wanted = [[loop_score(model, prefix, ids) for ids in continuations] for prefix in prefixes]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-4)
    assert (found[:, 0] > found[:, 2]).all()
    paired = paired_log_probs(model, prefixes, continuations[:4], batch_size)
    torch.testing.assert_close(paired, found[range(4), range(4)], rtol=1e-5, atol=1e-4)


def test_empty_and_long_sequences_are_refused():
    model = tiny_model(tiny_processor(), max_position_embeddings=18)
    with pytest.raises(ValueError, match="one token"):
        continuation_log_probs(model, [[]], [[5]], 1)
    with pytest.raises(ValueError, match="one token"):
        continuation_log_probs(model, [[1]], [[5], []], 1)
    for wrong in (([[1]], [[]]), ([[1]], [[5], [6]])):
        with pytest.raises(ValueError, match="one token"):
            paired_log_probs(model, *wrong, 1)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        continuation_log_probs(model, [[1, *[70] * 9]], [[75] * 10], 1)
