# SPDX-License-Identifier: Apache-2.0
"""Gumbel-Sigmoid noise on expert routers (MoMa equation 5): where it counts, where it does not, and how it fades."""

import math

import pytest
import torch

from helpers.reference import GROUPS, assert_near, context_of, fields_of, reference_cut, reference_selection
from helpers.tiny import mixed_ids, tiny_config, tiny_model
from modeling_moma.configuration_moma import RULES, rule_names
from modeling_moma.routing_moma import MomaRouter, midpoints
from modeling_moma.token_groups_moma import logistic_noise_like


NUM_TOKENS = 13


def build_router(**fields):
    config = tiny_config(num_experts=4, **fields)
    torch.manual_seed(0)
    router = MomaRouter(config, "all")
    torch.nn.init.normal_(router.weight, std=0.3)
    router.balance_bias.copy_(0.1 * torch.randn(4))
    x_ND = torch.randn(NUM_TOKENS, config.hidden_size)
    return config, router, x_ND


def select(config, router, x_ND, routing, track=True, seed=5):
    """Logits, (token, expert) pairs, their weights, and the context of one call."""
    context = context_of(config, torch.zeros(1, NUM_TOKENS, dtype=torch.long), routing, track=track)
    torch.manual_seed(seed)
    logits_NE, selection = router(x_ND, context)
    if routing == "expert_choice":
        rows = enumerate(selection.token_EK.tolist())
        pairs = [(token, expert) for expert, row in rows for token in row]
        return logits_NE, pairs, selection.weight_EK.flatten(), context
    return logits_NE, list(zip(selection.token_P.tolist(), selection.expert_P.tolist())), selection.weight_P, context


def noise_of(seed=5):
    """The noise that `select` met, as the difference of logarithms."""
    torch.manual_seed(seed)
    uniform_NE = torch.rand(NUM_TOKENS, 4)
    return uniform_NE.log() - (1 - uniform_NE).log()


def test_the_noise_is_the_difference_of_two_gumbel_samples():
    torch.manual_seed(0)
    noise = logistic_noise_like(torch.empty(200_000))
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 3, rel=0.02)
    gumbel = -torch.log(torch.empty(2, 200_000).exponential_())
    difference = gumbel[0] - gumbel[1]
    for cut in (-4.0, -1.0, 0.5, 3.0):
        below = (difference < cut).float().mean().item()
        assert (noise < cut).float().mean().item() == pytest.approx(below, abs=0.005)


@pytest.mark.parametrize(("routing", "scale"), [("expert_choice", 0.5), ("token_choice", 1)])
def test_selection_and_gates_are_noisy_while_logits_and_statistics_are_not(routing, scale):
    config, router, x_ND = build_router(gumbel_noise=scale)
    logits_NE, pairs, weights, context = select(config, router, x_ND, routing)
    order = sorted(range(len(pairs)), key=pairs.__getitem__)
    clean_NE = x_ND @ router.weight.t()
    noisy_NE = torch.sigmoid(clean_NE + scale * noise_of())
    expected = reference_selection(router, noisy_NE, routing)
    assert sorted(pairs) == sorted(expected) != sorted(reference_selection(router, torch.sigmoid(clean_NE), routing))
    token_P, expert_P = (list(part) for part in zip(*sorted(expected)))
    assert_near(logits_NE, clean_NE, 1e-6)
    assert_near(weights[order], noisy_NE[token_P, expert_P], 1e-5)
    # of 13 tokens for 4 experts
    lines = torch.sigmoid(clean_NE).t().tolist()
    cut_E = torch.tensor([reference_cut(line, math.ceil(NUM_TOKENS / 4)) for line in lines])
    statistics = context.step_of(router).statistics
    assert_near(midpoints(statistics.kth_C, statistics.next_best_C), cut_E, 1e-6)
    (gradient,) = torch.autograd.grad(weights.sum(), router.weight)
    (wanted,) = torch.autograd.grad(noisy_NE[token_P, expert_P].sum(), router.weight)
    assert_near(gradient, wanted, 1e-5)


def test_the_load_that_the_balance_bias_sees_is_that_of_the_noisy_selection():
    config, router, x_ND = build_router(gumbel_noise=2.0)
    _, pairs, _, context = select(config, router, x_ND, "token_choice")
    load_E = torch.tensor([sum(expert == e for _, expert in pairs) for e in range(4)])
    assert_near(context.step_of(router).statistics.load_deficit_C, (load_E.float().mean() - load_E) / NUM_TOKENS, 1e-5)


@pytest.mark.parametrize("routing", RULES)
def test_there_is_no_noise_in_eval(routing):
    fields = {**GROUPS["4t4i"], **fields_of(routing)}
    noisy, plain = (tiny_model(**fields, gumbel_noise=scale).eval() for scale in (1.0, 0.0))
    assert torch.equal(noisy(mixed_ids(), routing=routing).logits, plain(mixed_ids(), routing=routing).logits)


@pytest.mark.parametrize("steps_done", [0, 1, 4, 9])
def test_the_noise_falls_linearly_to_none(steps_done):
    config, router, x_ND = build_router(gumbel_noise=2.0, gumbel_noise_steps=4)
    router.num_updates.fill_(steps_done)
    logits_NE, pairs, weights, _ = select(config, router, x_ND, "expert_choice")
    token_P, expert_P = (list(part) for part in zip(*pairs))
    added_P = torch.logit(weights) - logits_NE[token_P, expert_P]
    scale = 2.0 * max(0.0, 1 - steps_done / 4)
    assert torch.allclose(added_P, scale * noise_of()[token_P, expert_P], atol=1e-3)


@pytest.mark.parametrize(
    ("routing", "depth", "preserve_rng_state"),
    [
        ("expert_choice", {"num_hidden_layers": 3, "depth_layers": [0, 2]}, False),
        ("token_choice", {}, True),
    ],
)
def test_checkpointing_recomputes_with_the_same_noise(depth, routing, preserve_rng_state):
    fields = {**GROUPS["4t4i"], **depth, "training_routing": routing, "router_bias_update_rate": 0.2}
    grads, states = [], []
    for checkpointing in (False, True):
        # the scale falls with every step, after the forward and before its recomputation
        model = tiny_model(**fields, gumbel_noise=1.0, gumbel_noise_steps=4)
        if checkpointing:
            settings = {"use_reentrant": False, "preserve_rng_state": preserve_rng_state}
            model.activation_checkpointing_enable(settings)
        torch.manual_seed(3)
        for step in range(3):
            ids = mixed_ids(seed=step)
            model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({key: parameter.grad for key, parameter in model.named_parameters()})
        states.append({key: value for key, value in model.state_dict().items() if "router." in key})
    for key, gradient in grads[0].items():
        assert_near(grads[1][key], gradient, 1e-5)
    for key, value in states[0].items():
        assert torch.allclose(states[1][key], value, atol=1e-6), key


@pytest.mark.parametrize("routing", rule_names(takes_noise=True))
def test_a_scale_of_zero_is_no_noise_and_draws_nothing(routing):
    fields = {**GROUPS["4t4i"], "training_routing": routing}
    silent, plain = tiny_model(**fields, gumbel_noise=0, gumbel_noise_steps=5), tiny_model(**fields)
    ids = mixed_ids()
    before = torch.get_rng_state()
    losses = [model(ids, labels=ids).loss for model in (silent, plain)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*losses)


@pytest.mark.parametrize("routing", sorted(set(RULES) - set(rule_names(takes_noise=True))))
def test_scores_that_are_compared_with_clean_cuts_are_clean(routing):
    config, router, x_ND = build_router(gumbel_noise=5.0, routing_warmup_steps=0, **fields_of(routing))
    noisy = select(config, router.train(), x_ND, routing)
    config.gumbel_noise = 0.0
    clean = select(config, router, x_ND, routing)
    assert noisy[1] == clean[1]
    assert torch.equal(noisy[2], clean[2])


def test_a_frozen_router_has_no_noise_and_no_warm_up():
    fields = {**GROUPS["4t4i"], "gumbel_noise": 5.0, "gumbel_noise_steps": 4}
    noisy, plain = tiny_model(**fields), tiny_model(**GROUPS["4t4i"])
    for model in (noisy, plain):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("router." not in name)
    ids = mixed_ids()
    for _ in range(2):
        assert torch.equal(noisy(ids).logits, plain(ids).logits)
    cut = tiny_model(**GROUPS["4t4i"], training_routing="threshold", routing_warmup_steps=5, depth_layers=[0])
    for name, parameter in cut.named_parameters():
        parameter.requires_grad_("router." not in name)
    assert torch.equal(cut(ids).logits, cut.eval()(ids).logits)
