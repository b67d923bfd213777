# SPDX-License-Identifier: Apache-2.0
"""Projections and norms of attention by modality, `config.untied_attention`."""

import pytest
import torch

from helpers.depth_reference import assert_equals_plain_loop
from helpers.reference import GROUPS, fields_of, trainable
from helpers.tiny import IMAGE_IDS, left_padding, mixed_ids, tiny_model
from modeling_moma.configuration_moma import RULES
from modeling_moma.token_groups_moma import token_modalities


UNTIED = {"untied_attention": True}
DEPTH = {"num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.5}
THREE = {
    "modality_token_ranges": {"speech": [[30, 36]], "image": [list(IMAGE_IDS)]},
    "num_experts": {"speech": 2, "image": 3, "text": 1},
}
VARIANTS = {
    "1t1i": {**GROUPS["1t1i"], "norm_placement": "post"},
    "4t4i": {**GROUPS["4t4i"], "norm_placement": "post"},
    "4t4i_pre": {**GROUPS["4t4i"], "norm_placement": "pre", "qk_norm": "rmsnorm"},
    "gqa": {
        **GROUPS["shared"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "qk_norm": "layernorm_per_head",
        "attention_bias": True,
    },
    "three_modalities": {**THREE, "qk_norm": "none"},
    "depth": {**GROUPS["4t4i"], **DEPTH, "norm_placement": "post"},
    "depth_pre": {**GROUPS["4t4i"], **DEPTH, "norm_placement": "pre"},
    "depth_three_modalities": {**THREE, **DEPTH, "depth_capacity": {"text": 0.5, "speech": 0.75, "image": 0.4}},
}


def untied_model(name="4t4i", **fields):
    """A model whose norms differ by modality; a large eps keeps RMSNorm from cancelling gates."""
    defaults = {"routing_warmup_steps": 0, "rms_norm_eps": 0.3}
    model = tiny_model(**{**defaults, **VARIANTS[name], **UNTIED, **fields})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    for key, buffer in model.named_buffers():
        if key.endswith("router.threshold"):
            buffer.copy_(torch.linspace(0.4, 0.6, buffer.numel()))
    return model


CASES = [(name, list(RULES)[index % len(RULES)], index % 3 != 0) for index, name in enumerate(VARIANTS)]


@pytest.mark.parametrize("name, routing, training", CASES)
def test_a_model_equals_the_plain_loop_forward_and_backward(name, routing, training):
    model = untied_model(name, **fields_of(routing)).train(training)
    ids = mixed_ids(3, 10)
    mask = left_padding(ids, 3, 0, 5)
    kinds = token_modalities(model.config, ids)
    assert set(kinds[mask == 1].tolist()) == set(range(len(model.config.modalities)))
    assert_equals_plain_loop(model, ids, mask, routing, ("eager", "sdpa"), floor=3e-2)


def test_in_training_all_weights_take_part_in_a_batch_of_one_modality():
    model = untied_model("three_modalities")
    model(torch.full((1, 4), 27), labels=torch.full((1, 4), 27)).loss.backward()
    for key, parameter in trainable(model):
        assert parameter.grad is not None, key
        if ".image." in key or ".speech." in key:
            assert not parameter.grad.any(), key


@torch.no_grad()
def test_in_inference_modalities_without_a_token_do_not_run():
    model = untied_model().eval()
    seen = []
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *call, key=key: seen.append(key))
    model(torch.full((1, 4), 27))
    assert any("modalities.text" in key for key in seen) and not any("modalities.image" in key for key in seen)


def test_a_token_meets_the_parameters_that_it_met():
    tied, untied = (untied_model(untied_attention=flag).config for flag in (False, True))
    for modality in tied.modalities:
        counts = [config.num_parameters(active=True, modality=modality) for config in (tied, untied)]
        assert counts[0] == counts[1]
    # a second attention of four matrices of [16, 16], four norms of 8 for queries and keys, and two of 16, in 2 layers
    assert untied.num_parameters() - tied.num_parameters() == 2 * (4 * 16 * 16 + 4 * 8 + 2 * 16)
