# SPDX-License-Identifier: Apache-2.0
"""A training step: loss, gradients and the routers' buffers are those of the CPU."""

import pytest
import torch

from helpers.cuda.compare import assert_near, assert_same_state, both, on_device
from helpers.reference import GROUPS, fields_of
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.configuration_moma import rule_names


DEPTH = {"num_hidden_layers": 3, "depth_layers": [0, 2]}
FOUR = GROUPS["4t4i"]
MODELS = {
    **GROUPS,
    **{
        f"4t4i {rule}": {**FOUR, "training_routing": rule, "routing_warmup_steps": 0}
        for rule in rule_names(may_train=True)
    },
    "8x token choice": {**GROUPS["8x"], "training_routing": "token_choice"},
    "depth": {**FOUR, **DEPTH, "depth_capacity": 0.25},
    "depth by modality": {**FOUR, **DEPTH, "depth_capacity": {"text": 0.5, "image": 0.125}},
    "depth token choice": {**FOUR, **DEPTH, "depth_capacity": 0.5, "depth_training_routing": "token_choice"},
    "depth threshold": {**FOUR, **DEPTH, "depth_capacity": 0.5, "depth_training_routing": "threshold"},
    "auxiliary routers": {**FOUR, **fields_of("auxiliary"), "inference_routing": "auxiliary"},
    "noise": {**FOUR, "gumbel_noise": 1.0},
    "gate after the norm": {**FOUR, "norm_placement": "post", "gate_after_norm": True},
    "modality_loss_weights": {**FOUR, "modality_loss_weights": {"text": 1.0, "image": 0.25}},
    "z_loss_coef": {**FOUR, "z_loss_coef": 1e-2},
}  # fmt: skip


def step(model, ids, seed=0, **inputs):
    torch.manual_seed(seed)
    loss = model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_the_numbers_of_the_cpu(device, name, checkpointing):
    if name == "noise" and not device.is_pretended:
        pytest.skip("a real device draws other noise")
    model, copied = both(tiny_model(**MODELS[name]))
    if checkpointing:
        for each in (model, copied):
            each.gradient_checkpointing_enable()
    ids = mixed_ids(rows=3, length=16)
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    # a second step routes by what the first has left
    for seed, inputs in enumerate(({}, {"attention_mask": padding})):
        expected = step(model, ids, seed, **inputs)
        assert_near(step(copied, ids.to("cuda"), seed, **on_device(inputs)), expected, name="loss")
    assert_same_state(copied, model)


def test_a_step_without_logits_has_the_numbers_of_the_cpu(device):
    model, copied = both(tiny_model(**FOUR, modality_loss_weights={"image": 0.5}))
    ids = mixed_ids(rows=3, length=16)
    for each in (model, copied):
        each.config.logits_in_training = False
    assert_near(step(copied, ids.to("cuda")), step(model, ids))
    assert_same_state(copied, model)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["dense", "4t4i expert_choice", "4t4i token_choice", "4t4i threshold", "shared", "depth"]
)
def test_a_step_in_bf16_is_near_that_of_the_cpu(device, name, weights):
    model = tiny_model(**MODELS[name], norm_placement="pre")
    model, copied = both(model.bfloat16() if weights == "bf16" else model)
    ids = mixed_ids(rows=3, length=16)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == "fp32"):
        expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    with torch.autocast("cuda", torch.bfloat16, enabled=weights == "fp32"):
        found = copied(input_ids=ids.to("cuda"), labels=ids.to("cuda"), use_cache=False).loss
    expected.backward()
    found.backward()
    assert_near(found, expected, rtol=2e-2, atol=2e-2)
    # rounding moves a token here and there, so that single gradients differ, and their direction does not
    assert torch.cosine_similarity(direction(copied), direction(model), dim=0) > 0.9


def direction(model):
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([gradient.cpu().float().flatten() for gradient in gradients])
