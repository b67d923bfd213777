# SPDX-License-Identifier: Apache-2.0
import math
from fractions import Fraction

import pytest
import torch

from helpers.depth_reference import SelectionLog, reference_choice, reference_cuts
from helpers.reference import GROUPS, assert_near, fields_of
from helpers.tiny import mixed_ids, randomize_auxiliary, tiny_config, tiny_model
from modeling_moma.configuration_moma import RULES, rule_names
from modeling_moma.depth_moma import MomaDepthRouter
from modeling_moma.documents_moma import Rows
from modeling_moma.routing_moma import update_routers
from modeling_moma.token_groups_moma import RoutingContext, split_modalities, token_modalities


ROWS, LENGTH = 3, 13
DEPTH = {"num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.4}
CAPACITIES = {"one": 0.3, "by_modality": {"text": 0.7, "image": 0.2}}
ENDINGS = ("threshold", "balance_bias", "num_updates")


def build_router(seed=0, **fields):
    """A config and a depth router of it that tells tokens apart."""
    config = tiny_config(**fields)
    torch.manual_seed(seed)
    router = MomaDepthRouter(config)
    torch.nn.init.normal_(router.weight, std=0.5)
    randomize_auxiliary(router, seed)
    return config, router


def batch(config, seed=0, with_padding=True):
    """Hidden states, modalities and padding of rows with 13, 8 and 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden_BTD = torch.randn(ROWS, LENGTH, config.hidden_size, generator=generator)
    modality_BT = token_modalities(config, mixed_ids(ROWS, LENGTH, seed))
    padding_BT = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    if with_padding:
        padding_BT[1, :5] = True
        padding_BT[2, 1:] = True
    return hidden_BTD, modality_BT, padding_BT


def context_of(config, modality_BT, padding_BT, depth_routing, track=False):
    split, _ = split_modalities(config, modality_BT, padding_BT)
    return RoutingContext("expert_choice", split, track, depth_routing, modality_BT, Rows(padding_BT))


def scores_of(router, hidden_BTD):
    return torch.sigmoid(hidden_BTD @ router.weight[0]).detach()


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("routing", RULES)
def test_every_rule_equals_plain_sorting(routing, capacity):
    config, router = build_router(depth_capacity=CAPACITIES[capacity], **fields_of(routing))
    num_pools = len(config.depth_pools)
    router.threshold.copy_(torch.tensor([0.45, 0.7])[:num_pools])
    router.balance_bias.copy_(torch.tensor([-0.2, 0.1])[:num_pools])
    for seed in range(3):
        hidden_BTD, modality_BT, padding_BT = batch(config, seed)
        # at padding the best score there is: it must neither be chosen nor compete
        hidden_BTD[padding_BT] = 100 * router.weight[0].detach()
        logits_BT, selection = router(hidden_BTD, context_of(config, modality_BT, padding_BT, routing))
        scores_BT = scores_of(router, hidden_BTD)
        expected = reference_choice(config, router, hidden_BTD, scores_BT, modality_BT, routing, padding_BT)
        assert 0 < expected.sum() < (~padding_BT).sum()
        assert torch.equal(selection.chosen_BT, expected)
        assert torch.equal(selection.scores_BT, torch.sigmoid(logits_BT))
        assert_near(selection.scores_BT, scores_BT, 1e-6)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("rows, length, kinds", [(3, 9, 9), (5, 8, 2)])
def test_equal_rows_fare_alike(capacity, rows, length, kinds):
    """Whether all positions of a row differ or, as in the first layer, tokens come more than once."""
    config, router = build_router(depth_capacity=CAPACITIES[capacity])
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randn(kinds, config.hidden_size, generator=generator)
    ids = torch.randint(kinds, (length,), generator=generator) if kinds < length else torch.arange(length)
    hidden_BTD = tokens[ids].expand(rows, -1, -1)
    modality_BT = (ids % 2).expand(rows, -1)
    padding_BT = torch.zeros(rows, length, dtype=torch.bool)
    padding_BT[:, -1] = True
    context = context_of(config, modality_BT, padding_BT, "expert_choice")
    _, selection = router(hidden_BTD, context)
    assert (selection.chosen_BT == selection.chosen_BT[:1]).all() and not selection.chosen_BT[:, -1].any()
    scores_BT = torch.sigmoid(router.logits(hidden_BTD).squeeze(-1))
    expected_BT = reference_choice(config, router, hidden_BTD, scores_BT, modality_BT, "expert_choice", padding_BT)
    assert torch.equal(selection.chosen_BT, expected_BT)


@pytest.mark.parametrize("share", [0.55, 0.07, 0.29, 0.58, 1 / 3, 2 / 3, 0.1 + 0.2])
def test_a_share_of_tokens_is_that_of_its_decimal_number(share):
    exact = Fraction(share).limit_denominator(1000)
    config, router = build_router(depth_capacity=share)
    for length in (9, 20, 29, 55, 100, 200, 700):
        hidden_BTD = torch.randn(1, length, config.hidden_size, generator=torch.Generator().manual_seed(length))
        modality_BT = torch.zeros(1, length, dtype=torch.long)
        _, selection = router(hidden_BTD, context_of(config, modality_BT, None, "expert_choice"))
        assert selection.chosen_BT.sum().item() == math.ceil(exact * length)


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("routing", RULES)
def test_the_threshold_is_the_running_mean_of_the_cuts(routing, capacity):
    config, router = build_router(depth_capacity=CAPACITIES[capacity], **fields_of(routing))
    num_pools = len(config.depth_pools)
    expected, updates = [0.5] * num_pools, [0] * num_pools
    for step in range(5):
        hidden_BTD, modality_BT, padding_BT = batch(config, step)
        if step == 2:
            modality_BT = torch.zeros_like(modality_BT)
        context = context_of(config, modality_BT, padding_BT, routing, track=True)
        router(hidden_BTD, context)
        update_routers(context, 0.001)
        cuts = reference_cuts(config, scores_of(router, hidden_BTD), modality_BT, padding_BT)
        for index, value in enumerate(cuts):
            # without a token of its own the pool keeps what it has
            if value is None:
                assert step == 2 and index == 1
                continue
            # the first step is copied, the next ones are a plain mean until the momentum is lower
            decay = min(0.5, updates[index] / (updates[index] + 1))
            expected[index] = decay * expected[index] + (1 - decay) * value
            updates[index] += 1
        assert router.threshold.tolist() == pytest.approx(expected, abs=1e-6)
        assert router.num_updates.tolist() == updates


def test_threshold_selects_like_expert_choice_until_it_is_warm():
    warmup = 3
    fields = {**GROUPS["4t4i"], **DEPTH, "depth_capacity": CAPACITIES["by_modality"]}
    model = tiny_model(**fields, training_routing="threshold", routing_warmup_steps=warmup)
    oracle = tiny_model(**fields)
    for step in range(warmup + 1):
        # no id twice: rounding differs between the two ways, and would break ties between equal tokens
        ids = torch.randperm(40, generator=torch.Generator().manual_seed(step))[:36].view(3, 12)
        logits, oracle_logits = model(ids).logits, oracle(ids).logits
        if step == warmup:
            assert not torch.allclose(logits, oracle_logits, atol=1e-2)
            break
        assert_near(logits, oracle_logits, 1e-5)
        for key, value in oracle.state_dict().items():
            assert torch.allclose(model.state_dict()[key], value, atol=1e-6), key


def test_the_warm_up_counts_training_steps_alone():
    model = tiny_model(**DEPTH, training_routing="threshold", routing_warmup_steps=2)
    log = SelectionLog(model)
    for layer in (model.model.layers[index] for index in DEPTH["depth_layers"]):
        layer.depth_router.threshold.fill_(2.0)
    # nothing reaches a cut of 2, so only the warm-up chooses
    model.eval()(mixed_ids())
    assert not log.chosen[0][-1].any()
    model.train()(mixed_ids())
    assert log.chosen[0][-1].sum() == math.ceil(0.4 * 24)


def test_without_warm_up_the_first_step_uses_the_threshold():
    model = tiny_model(**DEPTH, training_routing="threshold", routing_warmup_steps=0)
    log = SelectionLog(model)
    model(mixed_ids())
    for index in DEPTH["depth_layers"]:
        assert torch.equal(log.chosen[index][0], log.scores[index][0] >= 0.5)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_token_choice_bias_moves_towards_the_capacity(capacity):
    rate = 0.02
    config, router = build_router(depth_capacity=CAPACITIES[capacity])
    hidden_BTD = torch.randn(8, 40, config.hidden_size, generator=torch.Generator().manual_seed(0))
    modality_BT = token_modalities(config, mixed_ids(8, 40))
    router.balance_bias.fill_(1.0)
    shares = []
    for step in range(100):
        context = context_of(config, modality_BT, None, "token_choice", track=True)
        chosen_BT = router(hidden_BTD, context)[1].chosen_BT
        before = router.balance_bias.clone()
        update_routers(context, rate)
        pools = [modality_BT == pool for pool in range(2)] if router.balance_bias.numel() == 2 else [modality_BT >= 0]
        shares = [chosen_BT[pool].float().mean().item() for pool in pools]
        lags = [target - share for target, share in zip(router.capacities, shares)]
        moved = [math.copysign(rate, lag) if lag else 0.0 for lag in lags]
        assert (router.balance_bias - before).tolist() == pytest.approx(moved, abs=1e-6)
        if step == 0:
            assert shares == [1.0] * len(shares)
    assert shares == pytest.approx(router.capacities, abs=0.06)


def test_a_bias_moves_under_its_own_routers_rule_alone():
    fields = {**GROUPS["4t4i"], **DEPTH, "router_bias_update_rate": 0.1}
    for depth_routing, routing in (("token_choice", "expert_choice"), ("threshold", "token_choice")):
        model = tiny_model(**fields)
        model(mixed_ids(), routing=routing, depth_routing=depth_routing)
        for key, value in model.state_dict().items():
            if key.endswith("balance_bias"):
                rule = depth_routing if "depth_router" in key else routing
                assert value.any() == (rule == "token_choice"), key


def test_eval_changes_no_router():
    model = tiny_model(**GROUPS["4t4i"], **DEPTH, **fields_of(*RULES)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for routing in RULES:
        model(mixed_ids(), routing=routing)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("routing", rule_names(may_train=True))
def test_checkpointing_counts_once_and_selects_the_same(routing):
    # the warm-up ends between the second step's forward and its recomputation
    fields = {**GROUPS["4t4i"], **DEPTH, "training_routing": routing, "routing_warmup_steps": 2}
    states, grads, logs = [], [], []
    for checkpointing in (False, True):
        model = tiny_model(**fields, router_bias_update_rate=0.2)
        if checkpointing:
            model.activation_checkpointing_enable()
        logs.append(SelectionLog(model))
        for step in range(4):
            ids = mixed_ids(seed=step)
            model(ids, labels=ids, use_cache=False).loss.backward()
        states.append({key: value for key, value in model.state_dict().items() if key.endswith(ENDINGS)})
        grads.append({key: parameter.grad for key, parameter in model.named_parameters()})
    plain, checkpointed = logs
    for index in DEPTH["depth_layers"]:
        assert len(plain.chosen[index]) == 4 and len(checkpointed.chosen[index]) == 8
        for step, chosen_BT in enumerate(plain.chosen[index]):
            forward, recomputed = checkpointed.chosen[index][2 * step : 2 * step + 2]
            assert torch.equal(forward, chosen_BT) and torch.equal(recomputed, chosen_BT)
        assert model.model.layers[index].depth_router.num_updates.tolist() == [4]
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], atol=1e-6), key
    for key, gradient in grads[0].items():
        assert_near(grads[1][key], gradient, 1e-5)


EXPERT = "expert_choice"
RESOLUTIONS = [
    # config fields, train(), arguments, routing of experts and of depth
    ({}, True, {}, (EXPERT, EXPERT)),
    ({}, False, {}, ("threshold", "threshold")),
    ({"inference_routing": "token_choice"}, False, {}, ("token_choice", "token_choice")),
    ({"depth_training_routing": "threshold"}, True, {}, (EXPERT, "threshold")),
    ({"depth_inference_routing": "token_choice"}, False, {}, ("threshold", "token_choice")),
    ({"depth_training_routing": "threshold"}, True, {"routing": "token_choice"}, ("token_choice", "token_choice")),
    ({"depth_training_routing": "threshold"}, True, {"depth_routing": "token_choice"}, (EXPERT, "token_choice")),
    ({"depth_inference_routing": "token_choice"}, False, {"routing": EXPERT}, (EXPERT,) * 2),
    ({"auxiliary_routers": True, "inference_routing": "auxiliary"}, False, {}, ("auxiliary", "auxiliary")),
    ({}, False, {"routing": "token_choice", "depth_routing": EXPERT}, ("token_choice", EXPERT)),
]


@pytest.mark.parametrize(("fields", "training", "arguments", "expected"), RESOLUTIONS)
def test_routing_comes_from_the_call_then_the_config(fields, training, arguments, expected):
    model = tiny_model(**DEPTH, **fields).train(training)
    log = SelectionLog(model)
    model.model(mixed_ids(), **arguments)
    assert [(context.routing, context.depth_routing) for context in log.contexts] == [expected] * 2
