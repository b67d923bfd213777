# SPDX-License-Identifier: Apache-2.0
"""Steps of few tokens without gradients: experts one after the other, groups that rest, chunks of padding."""

import pytest
import torch
from transformers import DynamicCache

from helpers.reference import GROUPS, assert_near, context_of, fields_of, reference_group
from helpers.tiny import mixed_ids, tiny_config, tiny_model
from modeling_moma.configuration_moma import rule_names
from modeling_moma.modeling_moma import MomaExpertGroup


def group_of(routing, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = tiny_config(num_experts=3, num_experts_per_tok=2, **fields_of(routing), **fields)
    config._experts_implementation = "moma"
    group = MomaExpertGroup(config, "all").eval()
    for name, parameter in group.named_parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if "router" not in name:
            parameter.data = parameter.data.to(dtype)
    return config, group


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "relative"),
    [(1, torch.float32, 1e-5), (2, torch.bfloat16, 2e-2), (32, torch.float32, 1e-5)],
)
@pytest.mark.parametrize("routing", rule_names(is_causal=True))
def test_few_rows_through_their_experts_equal_the_plain_loop(routing, num_tokens, dtype, relative):
    config, group = group_of(routing, dtype)
    x_ND = torch.randn(num_tokens, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    context = context_of(config, torch.zeros(1, 1, dtype=torch.long), routing)
    with torch.no_grad():
        output_ND, _ = group(x_ND, context)
    assert_near(output_ND, reference_group(group, x_ND, routing)[0], relative)


def calls_of(model):
    called = []
    for name, module in model.named_modules():
        if isinstance(module, MomaExpertGroup):
            module.register_forward_hook(lambda *_, name=name: called.append(name.rsplit(".", 1)[-1]))
    return called


def test_group_without_a_token_rests_in_inference_alone():
    model = tiny_model(**GROUPS["4t4i"]).eval()
    called = calls_of(model)
    words = torch.tensor([[30, 31, 32]])
    layers = model.config.num_hidden_layers
    with torch.no_grad():
        quiet = model(words).logits
        assert called == ["text"] * layers
        called.clear()
        recorded = model(words, output_router_logits=True)
        assert sorted(called) == ["image"] * layers + ["text"] * layers
        assert len(recorded.router_logits) == 2 * layers
        called.clear()
        model.train()(words)
        assert sorted(called) == ["image"] * layers + ["text"] * layers
    called.clear()
    loud = model.eval()(words).logits
    assert sorted(called) == ["image"] * layers + ["text"] * layers
    torch.testing.assert_close(quiet, loud, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_chunk_of_padding_alone_runs():
    model = tiny_model(**GROUPS["4t4i"]).eval()
    ids, mask = mixed_ids()[:1], torch.ones_like(mixed_ids()[:1])
    mask[:, :2] = 0
    cache = DynamicCache(config=model.config)
    model(ids[:, :2], attention_mask=mask[:, :2], cache=cache)
    rest = model(ids[:, 2:], attention_mask=mask, cache=cache).logits
    expected = model(ids, attention_mask=mask).logits[:, 2:]
    torch.testing.assert_close(rest, expected, rtol=1e-4, atol=1e-5)
