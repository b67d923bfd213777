# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers.reference import GROUPS
from helpers.tiny import IMAGE_IDS, tiny_config
from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.modeling_moma import MomaForCausalLM
from modeling_moma.planning.costs import Eta, eta, flops_per_token, training_flops
from modeling_moma.routing_moma import MomaAuxiliaryRouter, MomaRouterBase


# capacities divide these numbers of tokens, so K = ceil(c * N / E) rounds nothing
TEXT_TOKENS, IMAGE_TOKENS, LENGTH = 48, 32, 40
CONFIGS = {
    **GROUPS,
    "untied": {"num_experts": {"text": 4, "image": 4}, "untied_attention": True},
    "gqa": {"num_experts": {"text": 4, "image": 4}, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "tied": {"num_experts": 4, "tie_word_embeddings": True, "attention_bias": True, "norm_placement": "pre"},
    "two_per_token": {"num_experts": {"text": 4, "image": 2}, "num_experts_per_tok": 2},
}


# capacities that divide a row of 20 words and 20 codes
DEPTH_TOKENS = 20
DEPTHS = {
    "dense": {"num_experts": 1},
    "dense_everywhere": {"num_experts": 1, "depth_layers": [0, 1, 2]},
    "1t1i": {"num_experts": {"text": 1, "image": 1}, "norm_placement": "pre"},
    "untied": {"num_experts": {"text": 1, "image": 1}, "untied_attention": True},
    "8x": {"num_experts": 8},
    "8x_half": {"num_experts": 8, "expert_capacity_factor": 0.4, "depth_capacity": 0.5},
    "by_modality": {"num_experts": {"text": 4, "image": 4}, "depth_capacity": {"text": 0.4, "image": 0.2}},
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_experts": 8},
    "shared": {"num_experts": 8, "shared_expert_intermediate_size": 24},
}


def each_by_turns(names):
    """Each under one rule and with one attention, in turn."""
    rules = [(rule, attention) for attention in ("sdpa", "eager") for rule in ("expert_choice", "token_choice")]
    return [(name, *rules[index % 4]) for index, name in enumerate(names)]


def build(config, attention):
    model = MomaForCausalLM._from_config(config, attn_implementation=attention)
    model.set_experts_implementation("eager")
    return model


def ids():
    flat = torch.cat([torch.arange(TEXT_TOKENS) % 14 + 26, torch.arange(IMAGE_TOKENS) % 16 + IMAGE_IDS[0]])
    order = torch.randperm(flat.shape[0], generator=torch.Generator().manual_seed(0))
    return flat[order].view(-1, LENGTH)


def expected(config, **kwargs):
    return sum(
        count * flops_per_token(config, modality, LENGTH, **kwargs)
        for modality, count in (("text", TEXT_TOKENS), ("image", IMAGE_TOKENS))
    )


@pytest.mark.parametrize("name, routing, attention", each_by_turns(CONFIGS))
def test_flops_equal_the_counter_of_torch(name, routing, attention):
    config = tiny_config(**CONFIGS[name], training_routing="expert_choice")
    model = build(config, attention)
    # the counter knows the CPU's own fused kernel not, only its parts
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model.eval()(ids(), routing=routing)
        with FlopCounterMode(display=False) as training:
            model.train()(ids(), routing=routing).logits.sum().backward()
    assert forward.get_total_flops() == pytest.approx(expected(config, routing=routing), rel=0.01)
    assert training.get_total_flops() == pytest.approx(expected(config, training=True, routing=routing), rel=0.01)


def test_flops_of_auxiliary_routers_equal_the_counter_of_torch():
    # every expert takes every token, so that the load is no chance
    config = tiny_config(num_experts={"text": 4, "image": 2}, auxiliary_routers=True)
    config.expert_capacity_factor = {"text": 4.0, "image": 2.0}
    model = build(config, "eager").eval()
    for module in model.modules():
        if isinstance(module, MomaAuxiliaryRouter):
            module.threshold.zero_()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(ids(), routing="auxiliary")
    count = expected(config, routing="auxiliary")
    assert forward.get_total_flops() == pytest.approx(count, rel=1e-6)
    assert count > expected(config, routing="threshold")


@pytest.mark.parametrize(
    "depth, experts", [("auxiliary", "threshold"), ("threshold", "auxiliary"), (None, "auxiliary")]
)
def test_a_depth_router_costs_what_its_own_rule_does(depth, experts):
    fields = {"num_hidden_layers": 3, "depth_layers": [0, 2], "auxiliary_routers": True, "inference_routing": experts}
    config = tiny_config(**fields, depth_inference_routing=depth)
    model = build(config, "eager").eval()
    for module in model.modules():
        if isinstance(module, (MomaAuxiliaryRouter, MomaRouterBase)):
            module.threshold.fill_(2.0)
    # what is left where nothing is taken: routers, the layer that none skips, and the head
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(ids())
    config.depth_capacity, config.expert_capacity_factor = 1e-9, 1e-9
    assert forward.get_total_flops() == pytest.approx(expected(config), rel=1e-6)


@pytest.mark.parametrize("name, routing, attention", each_by_turns(DEPTHS))
def test_flops_with_depth_equal_the_counter_of_torch(name, routing, attention):
    fields = {"num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.4, **DEPTHS[name]}
    config = tiny_config(**fields)
    model = build(config, attention)
    generator = torch.Generator().manual_seed(0)
    row = torch.cat([torch.arange(DEPTH_TOKENS) % 14 + 26, torch.arange(DEPTH_TOKENS) % 16 + IMAGE_IDS[0]])
    # a single row, which cannot pack raggedly
    batch = row[torch.randperm(LENGTH, generator=generator)].unsqueeze(0)
    arguments = {"routing": routing, "depth_routing": "expert_choice"}
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model.eval()(batch, **arguments)
        with FlopCounterMode(display=False) as training:
            model.train()(batch, **arguments).logits.sum().backward()
    for counter, is_training in ((forward, False), (training, True)):
        count = sum(
            DEPTH_TOKENS * flops_per_token(config, modality, LENGTH, training=is_training, routing=routing)
            for modality in config.modalities
        )
        assert counter.get_total_flops() == pytest.approx(count, rel=0.001)


def test_flops_with_depth_are_what_a_hand_computes():
    config = tiny_config(num_hidden_layers=3, depth_layers=[0, 2], depth_capacity=0.25)
    projections, feed_forward = 4 * 2 * 16 * 16, 3 * 2 * 16 * 32 + 2 * 16 * 4
    full = projections + 2 * 2 * 100 * 16 + feed_forward
    # a quarter of the tokens, each of which looks at a quarter of the keys; the router sees all
    depth = 0.25 * (projections + 2 * 2 * 25 * 16 + feed_forward) + 2 * 16
    expected = full + 2 * depth + 2 * 16 * 40
    assert flops_per_token(config, "text", 100) == pytest.approx(expected)
    assert flops_per_token(config, "text", 100, training=True) == pytest.approx(3 * expected)
    config.depth_capacity = {"text": 0.5, "image": 0.1}
    # keys of both modalities, as if alike frequent
    depth = 0.1 * (projections + 2 * 2 * 30 * 16 + feed_forward) + 2 * 16
    assert flops_per_token(config, "image", 100) == pytest.approx(full + 2 * depth + 2 * 16 * 40)


def test_rows_of_table_1_with_depth_match_those_without():
    for plain, depth in (("90m", "mod-110m"), ("435m", "mod-635m"), ("1.4b", "mod-2.3b")):
        full, sparse = (
            flops_per_token(MomaConfig.from_preset(f"moma-{size}-4t4i"), "text", 4096) for size in (plain, depth)
        )
        assert sparse == pytest.approx(full, rel=0.02)


def test_training_flops_add_up_the_modalities():
    config = tiny_config(**GROUPS["6t2i"])
    total = training_flops(config, {"text": TEXT_TOKENS, "image": IMAGE_TOKENS}, LENGTH)
    assert total == pytest.approx(expected(config, training=True))
    assert training_flops(config, {}, LENGTH) == 0


def test_defaults_follow_the_routing_of_the_mode():
    config = tiny_config(num_experts=4, num_experts_per_tok=2, inference_routing="token_choice")
    forward = flops_per_token(config, "text", LENGTH)
    assert forward == flops_per_token(config, "text", LENGTH, routing="token_choice")
    assert flops_per_token(config, "text", LENGTH, training=True) < 3 * forward


def test_rows_of_table_1_are_compute_matched():
    for size in ("90m", "435m", "1.4b"):
        dense = flops_per_token(MomaConfig.from_preset(f"moma-{size}-dense"), "image", 4096)
        for experts in ("1t1i", "8x", "4t4i"):
            sparse = flops_per_token(MomaConfig.from_preset(f"moma-{size}-{experts}"), "image", 4096)
            assert dense <= sparse < 1.001 * dense


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"modality": "audio"}, "modality"),
        ({"sequence_length": 0}, "sequence_length"),
        ({"routing": "soft"}, "routing"),
    ],
)
def test_bad_arguments_of_flops_are_named(change, match):
    arguments = {"config": tiny_config(), "modality": "text", "sequence_length": 8, **change}
    with pytest.raises(ValueError, match=match):
        flops_per_token(**arguments)


@pytest.mark.parametrize("tokens", [{"text": -1}, {"text": math.nan}, {"audio": 1}])
def test_bad_token_counts_are_refused(tokens):
    with pytest.raises(ValueError):
        training_flops(tiny_config(), tokens, 8)


DENSE = [(1, 5.0), (2, 4.0), (4, 3.0), (8, 2.0)]


@pytest.mark.parametrize(
    ("sparse", "value", "bound"),
    [
        (DENSE, 1.0, "exact"),
        ([(1, 4.0), (2, 2.0), (8, 1.0)], 4.0, "exact"),
        # halfway between 3 and 1, halfway between 2 and 4
        ([(1, 5.0), (2, 3.0), (4, 1.0)], 8 / 3, "exact"),
        # the rise at 2 counts as 4: halfway down from there
        ([(1, 4.0), (2, 6.0), (4, 0.0)], 8 / 3, "exact"),
        # an early dip reaches the loss, whatever follows
        ([(1, 4.0), (4, 2.0), (8, 3.0)], 2.0, "exact"),
        ([(1, 5.0), (4, 3.0)], 2.0, "at_most"),
        ([(2, 1.0), (4, 0.5)], 4.0, "at_least"),
        ([(2, 2.0)], 4.0, "exact"),
    ],
)
def test_eta_of_hand_made_curves(sparse, value, bound):
    result = eta(DENSE, sparse)
    assert result.value == pytest.approx(value)
    assert result.bound == bound


def test_a_noisy_end_of_the_dense_curve_favours_nobody():
    noisy = [*DENSE, (16, 2.5)]
    assert eta(noisy, noisy) == Eta(1.0)
    assert eta(noisy, DENSE) == Eta(1.0)


def test_eta_prints_its_bound():
    assert [str(Eta(3.7, bound)) for bound in ("exact", "at_most", "at_least")] == ["3.70x", "<3.70x", ">=3.70x"]


@pytest.mark.parametrize(
    ("curve", "error"),
    [
        ([], ValueError),
        ([(1, math.nan)], ValueError),
        ([(0, 1.0)], ValueError),
        ([(2, 1.0), (1, 0.5)], ValueError),
        ([1.0, 2.0], TypeError),
        (None, TypeError),
    ],
)
def test_bad_curves_are_refused_by_name(curve, error):
    with pytest.raises(error, match="dense"):
        eta(curve, DENSE)
    with pytest.raises(error, match="sparse"):
        eta(DENSE, curve)
