# SPDX-License-Identifier: Apache-2.0
"""Steps of few tokens without gradients: experts one after the other, groups that rest, chunks of padding."""

import pytest
import torch
from transformers import DynamicCache

from helpers.reference import GROUPS, assert_near, context_of, fields_of, reference_group
from helpers.tiny import mixed_ids, tiny_config, tiny_model
from modeling_moma import experts_implementations_moma
from modeling_moma.configuration_moma import rule_names
from modeling_moma.modeling_moma import MomaExpertGroup
from modeling_moma.token_groups_moma import split_modalities, token_modalities


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


@pytest.fixture
def chosen(monkeypatch):
    """How many rows went through the experts that they chose."""
    counts = []
    original = experts_implementations_moma._run_sequentially

    def counted(experts, rows_PD, expert_P):
        counts.append(len(rows_PD))
        return original(experts, rows_PD, expert_P)

    monkeypatch.setattr(experts_implementations_moma, "_run_sequentially", counted)
    return counts


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 32])
@pytest.mark.parametrize("routing", rule_names(is_causal=True))
def test_few_rows_through_their_experts_equal_the_plain_loop(chosen, routing, num_tokens, dtype, relative):
    config, group = group_of(routing, dtype)
    x_ND = torch.randn(num_tokens, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    context = context_of(config, torch.zeros(1, 1, dtype=torch.long), routing)
    with torch.no_grad():
        output_ND, _ = group(x_ND, context)
    assert len(chosen) == 1
    assert_near(output_ND, reference_group(group, x_ND, routing)[0], relative)


def test_rows_of_several_experts_each_are_summed(chosen):
    config, group = group_of("token_choice")
    x_ND = torch.randn(5, config.hidden_size)
    expert_Nk, weight_Nk = torch.tensor([[2, 0], [0, 1], [1, 2], [2, 1], [0, 2]]), torch.rand(5, 2)
    with torch.no_grad():
        output_ND = group.experts(x_ND, expert_Nk, weight_Nk)
        expected_ND = torch.zeros_like(x_ND)
        for token in range(5):
            for expert, weight in zip(expert_Nk[token].tolist(), weight_Nk[token]):
                expected_ND[token] += weight * group.experts.run_expert(expert, x_ND[token : token + 1])[0]
    assert chosen == [10]
    torch.testing.assert_close(output_ND, expected_ND, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rows_of_experts_elsewhere_get_zeros(chosen):
    config, group = group_of("token_choice")
    x_ND, weight_N1 = torch.randn(4, config.hidden_size), torch.rand(4, 1)
    elsewhere = group.num_experts
    output_ND = group.experts(x_ND, torch.tensor([[elsewhere], [1], [elsewhere], [0]]), weight_N1)
    assert not output_ND[[0, 2]].any()
    torch.testing.assert_close(output_ND[[3]], weight_N1[3] * group.experts.run_expert(0, x_ND[[3]]))


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


def test_bad_rows_are_named():
    config, ids = tiny_config(), mixed_ids()
    modality_BT, padding_BT = token_modalities(config, ids), torch.zeros_like(ids, dtype=torch.bool)
    padding_BT[1] = True
    with pytest.raises(ValueError, match="0 in all of row 1"):
        split_modalities(config, modality_BT, padding_BT, ids, padding_BT.all(dim=-1))
    with pytest.raises(IndexError, match="holds the id -7"):
        split_modalities(config, modality_BT, None, torch.where(padding_BT, -7, ids))
