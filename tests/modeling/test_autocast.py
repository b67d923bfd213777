# SPDX-License-Identifier: Apache-2.0
"""Weights of one type under autocast to another, against the same weights in fp32 without autocast."""

import copy

import pytest
import torch
from transformers import DynamicCache

from helpers.reference import GROUPS, assert_near
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma import cpu_moma
from modeling_moma.routing_moma import MomaRouterBase


MODELS = {
    "layernorm": {"num_experts": 1, "qk_norm": "layernorm", "norm_placement": "pre"},
    "4t4i": {**GROUPS["4t4i"], "norm_placement": "pre"},
    "depth": {
        **GROUPS["4t4i"],
        "depth_layers": [0],
        "depth_capacity": {"text": 0.5, "image": 0.5},
        "qk_norm": "layernorm_per_head",
    },
}
# of the largest value: bf16 keeps eight bits
RELATIVE = 5e-2
cases = pytest.mark.parametrize(
    ("name", "weights", "autocast", "rows"),
    [
        ("layernorm", torch.float16, torch.bfloat16, 1),
        ("layernorm", torch.float32, torch.float16, 3),
        ("4t4i", torch.float32, torch.bfloat16, 1),
        ("4t4i", torch.bfloat16, torch.float16, 3),
        ("depth", torch.float32, torch.bfloat16, 3),
        ("depth", torch.float16, torch.float16, 1),
    ],
    ids=str,
)


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch):
    """Whichever CPU this is."""
    monkeypatch.setattr(cpu_moma, "multiplies_with", lambda name: True)


def both(name, weights):
    """A model, and what it is in fp32. Experts take all tokens or none, and depth layers all words: no rounding moves
    a token."""
    model = tiny_model(**MODELS[name]).to(weights).eval()
    for module in model.modules():
        if isinstance(module, MomaRouterBase):
            half = len(module.threshold) // 2
            module.threshold[:half], module.threshold[half:] = 0.0, 2.0
    return model, copy.deepcopy(model).float()


@cases
@torch.no_grad()
def test_a_forward_and_steps_equal_those_in_fp32(name, rows, weights, autocast):
    model, oracle = both(name, weights)
    ids = mixed_ids(rows=rows, seed=1)
    expected = oracle(ids).logits
    with torch.autocast("cpu", autocast):
        assert_near(model(ids).logits, expected, RELATIVE)
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, :4], cache=cache).logits]
        parts += [model(ids[:, i : i + 1], cache=cache).logits for i in range(4, ids.shape[1])]
        assert_near(torch.cat([part.float() for part in parts], dim=1), expected, RELATIVE)


@cases
def test_gradients_equal_those_in_fp32(name, rows, weights, autocast):
    model, oracle = both(name, weights)
    ids = mixed_ids(rows=rows, seed=1)
    oracle(ids, labels=ids).loss.backward()
    with torch.autocast("cpu", autocast):
        loss = model(ids, labels=ids).loss
    loss.backward()
    for (key, parameter), expected in zip(model.named_parameters(), oracle.parameters()):
        if expected.grad is not None:
            assert parameter.grad is not None, key
            assert_near(parameter.grad, expected.grad, 0.15, floor=5e-2)
