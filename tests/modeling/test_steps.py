# SPDX-License-Identifier: Apache-2.0
"""Steps of few tokens without gradients: the short ways that they take give what the long ones give."""

import pytest
import torch
from transformers import DynamicCache

from helpers.reference import GROUPS, assert_near, context_of, fields_of, reference_group
from helpers.tiny import mixed_ids, tiny_config, tiny_model
from modeling_moma import dispatch_moma, experts_moma, modality_split_moma
from modeling_moma.expert_forms_moma import EXPERT_FORMS, STEP_MEMBERS, expert_form
from modeling_moma.experts_moma import MomaExpertGroup, MomaExperts
from modeling_moma.modality_split_moma import split_modalities, token_modalities
from modeling_moma.routing_rules_moma import CAUSAL_ROUTINGS
from modeling_moma.step_experts_moma import run_step


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
    original = dispatch_moma._in_turn

    def counted(experts, rows_PD, expert_P):
        counts.append(len(rows_PD))
        return original(experts, rows_PD, expert_P)

    monkeypatch.setattr(dispatch_moma, "_in_turn", counted)
    return counts


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 32])
@pytest.mark.parametrize("routing", CAUSAL_ROUTINGS)
def test_few_rows_through_their_experts_equal_the_plain_loop(chosen, routing, num_tokens, dtype, relative):
    config, group = group_of(routing, dtype)
    x_ND = torch.randn(num_tokens, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    context = context_of(config, torch.zeros(1, 1, dtype=torch.long), routing)
    with torch.no_grad():
        output_ND, _ = group(x_ND, context)
    assert len(chosen) == 1
    assert_near(output_ND, reference_group(group, x_ND, routing)[0], relative)


@pytest.fixture
def in_step(monkeypatch):
    """How many tokens went through the experts of a group in the short way."""
    counts = []

    def counted(router, experts, x_ND, context):
        counts.append(len(x_ND))
        return run_step(router, experts, x_ND, context)

    monkeypatch.setattr(experts_moma, "run_step", counted)
    return counts


def step_of(config, routing):
    context = context_of(config, torch.zeros(1, 1, dtype=torch.long), routing)
    context.is_step = True
    return context


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 32])
@pytest.mark.parametrize("routing", CAUSAL_ROUTINGS)
def test_a_step_in_the_short_way_equals_the_plain_loop(in_step, routing, num_tokens, dtype, relative):
    config, group = group_of(routing, dtype, shared_expert_intermediate_size=4)
    x_ND = torch.randn(num_tokens, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    output_ND, _ = group(x_ND, step_of(config, routing))
    assert in_step == [num_tokens] and output_ND.dtype == dtype
    assert_near(output_ND, reference_group(group, x_ND, routing)[0], relative)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("cut", [-1.0, 2.0])
def test_tokens_of_all_experts_and_of_none_in_the_short_way(in_step, cut, num_tokens):
    config, group = group_of("threshold")
    group.router.threshold.fill_(cut)
    x_ND = torch.randn(num_tokens, config.hidden_size)
    output_ND, _ = group(x_ND, step_of(config, "threshold"))
    assert in_step == [num_tokens] and bool(output_ND.any()) == (cut < 0)
    assert_near(output_ND, reference_group(group, x_ND, "threshold")[0], 1e-5)


@torch.no_grad()
def test_what_watches_or_replaces_a_part_of_a_group_is_met_in_every_step(in_step):
    config, group = group_of("threshold")
    x_ND, met = torch.randn(3, config.hidden_size), []
    expected_ND, _ = group(x_ND, step_of(config, "threshold"))
    assert in_step == [3]
    for module in (group.router, group.experts):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *args: met.append(0))
            torch.testing.assert_close(group(x_ND, step_of(config, "threshold"))[0], expected_ND)
            handle.remove()
        forward = module.forward
        module.forward = lambda *args, forward=forward, **kwargs: (met.append(0), forward(*args, **kwargs))[1]
        torch.testing.assert_close(group(x_ND, step_of(config, "threshold"))[0], expected_ND)
        del module.forward
    assert len(met) == 6 and in_step == [3]
    group.experts.__class__ = type("Other", (MomaExperts,), {})
    torch.testing.assert_close(group(x_ND, step_of(config, "threshold"))[0], expected_ND)
    assert in_step == [3]
    for fields in ({"normalize_gates": True}, {"gate_after_norm": True}):
        config, group = group_of("threshold", **fields)
        group(x_ND, step_of(config, "threshold"))
    assert in_step == [3]


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("depth_layers", [None, [1]])
def test_models_take_the_short_way_in_steps_and_compute_the_same(in_step, depth_layers, num_rows):
    model = tiny_model(vocab_size=64, depth_layers=depth_layers).eval()
    ids = torch.randint(5, 60, (num_rows, 8), generator=torch.Generator().manual_seed(0))

    def steps(**kwargs):
        cache = DynamicCache(config=model.config)
        model(ids[:, :4], cache=cache)
        in_step.clear()
        return torch.cat([model(ids[:, i : i + 1], cache=cache, **kwargs).logits for i in range(4, 8)])

    found = steps()
    assert in_step
    torch.testing.assert_close(steps(output_router_logits=True), found)
    assert not in_step
    with torch.enable_grad():
        torch.testing.assert_close(steps(), found)
    assert not in_step
    model.set_experts_implementation("eager")
    torch.testing.assert_close(steps(), found)
    assert not in_step


@torch.no_grad()
def test_steps_under_autocast_and_training_take_the_long_way(in_step):
    model = tiny_model(vocab_size=64).eval()
    ids = torch.randint(5, 60, (2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    model.train()(ids)
    assert not in_step
    model.eval()(ids)
    assert in_step


def test_a_rule_without_members_makes_its_selection_in_steps(in_step, monkeypatch):
    for table in (EXPERT_FORMS, STEP_MEMBERS):
        for name in list(table):
            monkeypatch.setitem(table, name, table[name])
    threshold, calls = EXPERT_FORMS["threshold"], []

    @expert_form("threshold")
    def own(*args):
        calls.append(0)
        return threshold(*args)

    config, group = group_of("threshold")
    with torch.no_grad():
        group(torch.randn(2, config.hidden_size), step_of(config, "threshold"))
    assert calls and not in_step


def test_rows_of_several_experts_each_are_summed(chosen):
    config, group = group_of("token_choice")
    x_ND = torch.randn(5, config.hidden_size)
    expert_Nk, weight_Nk = torch.tensor([[2, 0], [0, 1], [1, 2], [2, 1], [0, 2]]), torch.rand(5, 2)
    with torch.no_grad():
        output_ND = group.experts(x_ND, expert_Nk, weight_Nk)
        expected_ND = torch.zeros_like(x_ND)
        for token in range(5):
            for expert, weight in zip(expert_Nk[token].tolist(), weight_Nk[token]):
                expected_ND[token] += weight * group.experts._run_one(expert, x_ND[token : token + 1])[0]
    assert chosen == [10]
    torch.testing.assert_close(output_ND, expected_ND, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_rows_of_experts_elsewhere_get_zeros(chosen):
    config, group = group_of("token_choice")
    x_ND, weight_N1 = torch.randn(4, config.hidden_size), torch.rand(4, 1)
    elsewhere = group.num_experts
    output_ND = group.experts(x_ND, torch.tensor([[elsewhere], [1], [elsewhere], [0]]), weight_N1)
    assert not output_ND[[0, 2]].any()
    torch.testing.assert_close(output_ND[[3]], weight_N1[3] * group.experts._run_one(0, x_ND[[3]]))


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


@pytest.mark.parametrize("groups", ["8x", "4t4i"])
@pytest.mark.parametrize("has_padding", [True, False])
def test_split_is_the_same_however_it_is_counted(monkeypatch, groups, has_padding):
    config = tiny_config(**GROUPS[groups])
    ids = mixed_ids()
    padding_BT = torch.zeros_like(ids, dtype=torch.bool)
    padding_BT[0, :3] = has_padding
    splits = []
    for few in (0, 10**6):
        monkeypatch.setattr(modality_split_moma, "FEW_POSITIONS", few)
        masked_B = padding_BT.all(dim=-1)
        splits.append(split_modalities(config, token_modalities(config, ids), padding_BT, ids, masked_B))
    assert splits[0].counts == splits[1].counts
    assert (splits[0].order is None) == (splits[1].order is None)
    if splits[0].order is not None:
        assert torch.equal(splits[0].order, splits[1].order) and torch.equal(splits[0].inverse, splits[1].inverse)


@pytest.mark.parametrize("few", [0, 10**6])
def test_bad_rows_are_named_however_they_are_counted(monkeypatch, few):
    monkeypatch.setattr(modality_split_moma, "FEW_POSITIONS", few)
    config, ids = tiny_config(), mixed_ids()
    modality_BT, padding_BT = token_modalities(config, ids), torch.zeros_like(ids, dtype=torch.bool)
    padding_BT[1] = True
    with pytest.raises(ValueError, match="0 in all of row 1"):
        split_modalities(config, modality_BT, padding_BT, ids, padding_BT.all(dim=-1))
    with pytest.raises(IndexError, match="holds the id -7"):
        split_modalities(config, modality_BT, None, torch.where(padding_BT, -7, ids))
