# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from helpers.reference import GROUPS, fields_of
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.configuration_moma import rule_names
from modeling_moma.depth_moma import MomaDepthRouter
from modeling_moma.routing_moma import MomaRouter


LENGTH = 24
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
DEPTH = {"num_hidden_layers": 4, "depth_layers": [0, 2]}
BY_MODALITY = {**DEPTH, "depth_capacity": {"text": 0.5, "image": 0.25}}
CASES = [
    ("dense", "threshold", {"norm_placement": "pre"}),
    ("1t1i", "threshold", {}),
    ("8x", "auxiliary", {"norm_placement": "pre"}),
    *(("4t4i", routing, {}) for routing in rule_names(is_causal=True)),
    ("dense", "token_choice", DEPTH),
    *(("4t4i", routing, DEPTH) for routing in rule_names(is_causal=True)),
    ("4t4i", "auxiliary", BY_MODALITY),
]


def make_model(groups, routing, fields):
    model = tiny_model(**GROUPS[groups], inference_routing=routing, **fields_of(routing), **fields).eval()
    for module in model.modules():
        if isinstance(module, MomaRouter):
            module.threshold.uniform_(0.4, 0.6)
            module.balance_bias.uniform_(-0.1, 0.1)
        if isinstance(module, MomaDepthRouter):
            module.threshold.uniform_(0.45, 0.55)
            module.balance_bias.uniform_(-0.05, 0.05)
    return model


@pytest.fixture(scope="module", params=CASES, ids=str)
def model(request):
    return make_model(*request.param)


@torch.no_grad()
def test_later_tokens_move_no_logit_at_or_before(model):
    ids = mixed_ids(3, LENGTH)
    logits = model(ids).logits
    for last_kept in (0, 7, LENGTH - 2):
        changed = ids.clone()
        changed[:, last_kept + 1 :] = mixed_ids(3, LENGTH, seed=1)[:, last_kept + 1 :]
        moved = model(changed).logits
        torch.testing.assert_close(moved[:, : last_kept + 1], logits[:, : last_kept + 1], **TOLERANCE)
        assert not torch.allclose(moved[:, last_kept + 1 :], logits[:, last_kept + 1 :], atol=1e-3)


@torch.no_grad()
def test_batch_mates_move_no_logit(model):
    ids = mixed_ids(4, LENGTH)
    logits = model(ids).logits
    for row in range(4):
        torch.testing.assert_close(model(ids[row : row + 1]).logits, logits[row : row + 1], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_no_logit(model, side):
    ids = mixed_ids(3, LENGTH)
    lengths = torch.tensor([[LENGTH], [LENGTH - 3], [LENGTH - 7]])
    places = torch.arange(LENGTH)
    mask = (places < lengths if side == "right" else places >= LENGTH - lengths).long()
    logits = model(ids * mask, attention_mask=mask).logits
    for row in range(3):
        is_token = mask[row].bool()
        alone = model(ids[row : row + 1, is_token]).logits[0]
        torch.testing.assert_close(logits[row, is_token], alone, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(("argument", "fields"), [("routing", {}), ("depth_routing", DEPTH)])
def test_expert_choice_is_the_one_that_sees_the_future(argument, fields):
    model = make_model("4t4i", "threshold", fields)
    ids = mixed_ids(3, LENGTH)
    changed = torch.cat([ids[:, :12], mixed_ids(3, 12, seed=1)], dim=1)
    before, after = (model(tokens, **{argument: "expert_choice"}).logits[:, :12] for tokens in (ids, changed))
    assert not torch.allclose(before, after, atol=1e-3)
