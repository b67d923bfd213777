# SPDX-License-Identifier: Apache-2.0
"""One pool of experts with a selection bias for each modality, `config.balance_bias_by_modality`."""

import pytest
import torch
from torch import nn

from helpers.depth_reference import assert_equals_plain_loop
from helpers.reference import context_of, fields_of, reference_selection
from helpers.tiny import IMAGE_IDS, left_padding, mixed_ids, tiny_config, tiny_model
from modeling_moma.routing_moma import MomaRouter, update_routers
from modeling_moma.token_groups_moma import token_modalities


POOL = {"num_experts": 4, "training_routing": "token_choice", "inference_routing": "token_choice"}
BIASES = {**POOL, "balance_bias_by_modality": True}
RATE = 0.02
DEPTH = {"num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.5}
THREE = {"modality_token_ranges": {"speech": [[30, 36]], "image": [list(IMAGE_IDS)]}}
VARIANTS = {
    "two": {},
    "two_per_token": {"num_experts_per_tok": 2},
    "three": THREE,
    "shared": {"shared_expert_intermediate_size": 24},
    "depth": DEPTH,
    "depth_three": {**THREE, **DEPTH, "depth_capacity": {"text": 0.5, "speech": 0.75, "image": 0.4}},
}


def pool_model(name="two", **fields):
    """A model whose biases move some choices."""
    model = tiny_model(**{**BIASES, "rms_norm_eps": 0.3, "routing_warmup_steps": 0, **VARIANTS[name], **fields})
    generator = torch.Generator().manual_seed(3)
    for key, buffer in model.named_buffers():
        if key.endswith("balance_bias"):
            buffer.normal_(std=0.3 if buffer.ndim == 2 else 0.05, generator=generator)
        elif key.endswith("router.threshold"):
            buffer.copy_(torch.linspace(0.4, 0.6, buffer.numel()))
    return model


@pytest.mark.parametrize(
    "name, routing",
    [
        *((name, "token_choice") for name in VARIANTS if name != "depth"),
        ("depth", "threshold"),
        ("three", "auxiliary"),
    ],
)
def test_a_model_equals_the_plain_loop_forward_and_backward(name, routing):
    ids = mixed_ids(3, 10)
    model = pool_model(name, **fields_of(routing))
    assert_equals_plain_loop(model, ids, left_padding(ids, 3, 0, 4), routing, floor=3e-2)


@pytest.mark.parametrize(("name", "padding"), [("two", 4), ("two_per_token", 0), ("three", 4)])
def test_a_step_moves_each_bias_by_the_load_of_its_modality(name, padding):
    torch.manual_seed(0)
    config = tiny_config(**{**BIASES, **VARIANTS[name]})
    router = MomaRouter(config, "all")
    nn.init.normal_(router.weight)
    router.balance_bias.normal_(std=0.2)
    before = router.balance_bias.clone()
    ids = mixed_ids(3, 10)
    mask = left_padding(ids, padding)
    modality_BT = token_modalities(config, ids)
    context = context_of(config, modality_BT, "token_choice", mask == 0, track=True)
    x_ND = context.split.split(torch.randn(*ids.shape, config.hidden_size))["all"]
    logits, _ = router(x_ND, context)
    modality_N = modality_BT[mask == 1].tolist() if padding else modality_BT.flatten().tolist()
    pairs = reference_selection(router, torch.sigmoid(logits), "token_choice", x_ND, modality_N)
    expected = before.clone()
    for modality in range(len(config.modalities)):
        load = [sum(e == expert and modality_N[t] == modality for t, e in pairs) for expert in range(4)]
        mean = sum(load) / 4
        for expert in range(4):
            expected[modality, expert] += RATE * ((load[expert] < mean) - (load[expert] > mean))
    update_routers(context, RATE)
    assert torch.allclose(router.balance_bias, expected, atol=1e-6)
    assert not torch.equal(router.balance_bias, before) and router.num_updates == 1


def test_a_modality_without_a_token_moves_no_bias():
    model = pool_model()
    before = [layer.mlp.groups["all"].router.balance_bias.clone() for layer in model.model.layers]
    model(torch.full((2, 6), 30))
    for old, layer in zip(before, model.model.layers):
        router = layer.mlp.groups["all"].router
        assert torch.equal(router.balance_bias[1], old[1]) and not torch.equal(router.balance_bias[0], old[0])
