# SPDX-License-Identifier: Apache-2.0
"""Whole models equal plain loops, forward and backward: with depth layers, untied attention and biases by modality."""

from itertools import cycle

import pytest
import torch

from helpers.depth_reference import assert_equals_plain_loop
from helpers.reference import GROUPS, fields_of
from helpers.tiny import IMAGE_IDS, left_padding, mixed_ids, tiny_model
from modeling_moma.configuration_moma import RULES
from modeling_moma.token_groups_moma import token_modalities


DEPTH = {"num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.5}
SPEECH = {"modality_token_ranges": {"speech": [[30, 36]], "image": [list(IMAGE_IDS)]}}
THREE = {**SPEECH, "num_experts": {"speech": 2, "image": 3, "text": 1}}
DEPTH_OF_THREE = {**DEPTH, "depth_capacity": {"text": 0.5, "speech": 0.75, "image": 0.4}}
UNTIED = {"untied_attention": True}
BIASES = {"num_experts": 4, "training_routing": "token_choice", "balance_bias_by_modality": True}
GROUPED_QUERIES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
VARIANTS = {
    "dense_depth": {**GROUPS["dense"], **DEPTH, "norm_placement": "pre"},
    "1t1i_depth": {**GROUPS["1t1i"], **DEPTH},
    "4t4i_depth": {**GROUPS["4t4i"], **DEPTH},
    "4t4i_depth_pre": {**GROUPS["4t4i"], **DEPTH, "norm_placement": "pre"},
    "depth_by_modality": {**GROUPS["4t4i"], **DEPTH, "depth_capacity": {"text": 0.3, "image": 0.6}},
    "every_layer_gqa": {**DEPTH, "depth_layers": [0, 1, 2], **GROUPED_QUERIES},
    "shared_depth": {**GROUPS["shared"], **DEPTH},
    "untied": {**GROUPS["4t4i"], **UNTIED},
    "untied_pre": {**GROUPS["4t4i"], **UNTIED, "norm_placement": "pre", "qk_norm": "rmsnorm"},
    "untied_gqa": {
        **GROUPS["shared"],
        **UNTIED,
        **GROUPED_QUERIES,
        "qk_norm": "layernorm_per_head",
        "attention_bias": True,
    },
    "untied_three": {**THREE, **UNTIED, "qk_norm": "none"},
    "untied_depth_of_three": {**THREE, **DEPTH_OF_THREE, **UNTIED},
}
CASES = [
    *zip(VARIANTS, cycle(RULES), cycle((False, True, True))),
    ("biases", "token_choice", True),
    ("biases_two_per_token", "token_choice", False),
    ("biases_shared_three", "token_choice", True),
    ("biases_depth_of_three", "token_choice", False),
    ("biases_three", "auxiliary", False),
]
VARIANTS |= {
    "biases": BIASES,
    "biases_two_per_token": {**BIASES, "num_experts_per_tok": 2},
    "biases_shared_three": {**BIASES, **SPEECH, "shared_expert_intermediate_size": 24},
    "biases_three": {**BIASES, **SPEECH},
    "biases_depth_of_three": {**BIASES, **SPEECH, **DEPTH_OF_THREE},
}


@pytest.mark.parametrize(("name", "routing", "training"), CASES)
def test_a_model_equals_the_plain_loop_forward_and_backward(name, routing, training):
    # a large eps keeps RMSNorm from cancelling gates, and their gradients from vanishing
    fields = {"routing_warmup_steps": 0, "rms_norm_eps": 0.3, **VARIANTS[name], **fields_of(routing)}
    model = tiny_model(**fields).train(training)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # norms differ by modality
            if "norm" in key:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    for key, buffer in model.named_buffers():
        if key.endswith("router.threshold"):
            buffer.copy_(torch.linspace(0.4, 0.6, buffer.numel()))
        elif key.endswith("balance_bias"):
            buffer.normal_(std=0.3 if buffer.ndim == 2 else 0.05, generator=generator)
    ids = mixed_ids(3, 10)
    mask = left_padding(ids, 3, 0, 4)
    kinds = token_modalities(model.config, ids)
    assert set(kinds[mask == 1].tolist()) == set(range(len(model.config.modalities)))
    assert_equals_plain_loop(model, ids, mask, routing, ("eager", "sdpa"), floor=3e-2)
