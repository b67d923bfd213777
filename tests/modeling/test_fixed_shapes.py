# SPDX-License-Identifier: Apache-2.0
"""Steps of one token with a static cache: no shape may depend on who chooses whom."""

import pytest
import torch
from transformers import StaticCache

from helpers.reference import GROUPS, fields_of, reference_gated_feed_forward, trainable
from helpers.tiny import mixed_ids, randomize_auxiliary, tiny_config, tiny_model
from modeling_moma.modeling_moma import MomaFeedForward
from modeling_moma.routing_moma import MomaRouter
from modeling_moma.token_groups_moma import FixedSplit, RoutingContext, position_groups


CAUSAL = ("threshold", "token_choice", "auxiliary")


def scattered_thresholds(module):
    """Cuts at which tokens meet no expert, one, or several."""
    for router in module.modules():
        if isinstance(router, MomaRouter):
            router.threshold.uniform_(0.2, 0.8)


def feed_forward(routing, **fields):
    torch.manual_seed(0)
    config = tiny_config(**{**fields, **fields_of(routing)})
    layer = MomaFeedForward(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    scattered_thresholds(layer)
    randomize_auxiliary(layer)
    return config, layer


@pytest.mark.parametrize(
    ("name", "routing"),
    [
        *(("4t4i", routing) for routing in CAUSAL),
        *(("8x", routing) for routing in CAUSAL),
        ("dense", "threshold"),
        ("1t1i", "token_choice"),
        ("6t2i", "auxiliary"),
        ("shared", "token_choice"),
        ("shared_by_modality", "threshold"),
        ("normalized", "auxiliary"),
        ("gate_after_norm", "threshold"),
    ],
)
def test_a_feed_forward_layer_equals_the_plain_loop_forward_and_backward(name, routing):
    extra = {"normalized": {"normalize_gates": True}, "gate_after_norm": {"gate_after_norm": True}}
    fields = GROUPS[name] if name in GROUPS else {**GROUPS["4t4i"], **extra[name]}
    config, layer = feed_forward(routing, **fields)
    hidden_BTD = torch.randn(6, 1, config.hidden_size, requires_grad=True)
    modality_BT = torch.tensor([[0], [1], [1], [0], [1], [0]])
    padding_BT = torch.tensor([[False]] * 5 + [[True]])
    split = FixedSplit(list(config.expert_groups), position_groups(config, modality_BT, padding_BT))
    output, gate = layer(hidden_BTD, RoutingContext(routing, split, modality_BT=modality_BT))
    expected, expected_gate = reference_gated_feed_forward(layer, hidden_BTD, modality_BT, routing, padding_BT)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    if gate is not None:
        torch.testing.assert_close(gate, expected_gate, atol=1e-5, rtol=1e-5)
    weights = [hidden_BTD, *(parameter for _, parameter in trainable(layer))]
    direction = torch.randn_like(output)
    gradients = torch.autograd.grad((output * direction).sum(), weights, allow_unused=True)
    expected_gradients = torch.autograd.grad((expected * direction).sum(), weights, allow_unused=True)
    for actual, wanted in zip(gradients, expected_gradients):
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_longer_than_the_context_is_no_way_around_its_limit():
    model = tiny_model(**GROUPS["1t1i"], max_position_embeddings=8).eval()
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids_BT = mixed_ids(rows=1, length=8)
    model(ids_BT, cache=cache)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(ids_BT[:, :1], cache=cache)


@torch.no_grad()
def test_an_expert_that_overflows_and_that_nobody_chose_spoils_no_token():
    _, layer = feed_forward("threshold", **GROUPS["4t4i"])
    group = layer.groups["text"].half()
    group.experts.down_proj[0] = 6e4
    group.experts.gate_up_proj[0] = 6e4
    group.router.threshold[0] = 2.0
    split = FixedSplit(["text", "image"], torch.zeros(3, 1, dtype=torch.long))
    output, _ = group(torch.randn(3, group.experts.down_proj.shape[1]).half(), RoutingContext("threshold", split))
    assert torch.isfinite(output).all() and output.abs().max() > 0
