# SPDX-License-Identifier: Apache-2.0
"""A rule is a record and one function, or two with depth; whoever asks for what it lacks hears so."""

import pytest
import torch

from helpers.reference import GROUPS
from helpers.tiny import mixed_ids, tiny_config, tiny_model
from modeling_moma.configuration_moma import RULES, MomaConfig, rule_names, rule_of
from modeling_moma.depth_moma import depth_rule
from modeling_moma.modeling_moma import MomaForCausalLM
from modeling_moma.planning.costs import flops_per_token
from modeling_moma.routing_moma import Selection, routing_rule


DEPTH = {"depth_layers": [1], "depth_capacity": 0.5}


@pytest.fixture
def first_experts():
    """A rule of its own: every token takes the first two experts."""

    @routing_rule("first_experts", is_causal=True, may_train=True, counts_experts=True)
    def select(router, x_ND, scores_NE, context):
        is_taken_NE = torch.zeros_like(scores_NE, dtype=torch.bool)
        is_taken_NE[:, :2] = True
        return Selection.from_mask(is_taken_NE, scores_NE, context.has_fixed_shapes)

    yield "first_experts"
    RULES.pop("first_experts")


def test_names_come_from_the_records():
    assert set(rule_names(may_train=True)) == {"expert_choice", "threshold", "token_choice"}
    assert set(rule_names(is_causal=True)) == {"threshold", "token_choice", "auxiliary"}
    assert set(rule_names(takes_noise=True)) == {"expert_choice", "token_choice"}
    assert all(rule.choose is not None for rule in RULES.values())
    with pytest.raises(ValueError, match="`depth_routing` must be one of .*expert_choice.*got 'nearest'"):
        rule_of("nearest", "depth_routing")


def test_a_rule_is_one_function_that_configurations_may_name_at_once(first_experts):
    config = MomaConfig(training_routing=first_experts, inference_routing=first_experts)
    assert (config.training_routing, config.inference_routing) == (first_experts, first_experts)


def test_a_configuration_without_the_code_of_rules_takes_their_names_and_the_model_checks_them():
    entered = dict(RULES)
    RULES.clear()
    try:
        config = tiny_config(training_routing="nearest")
    finally:
        RULES.update(entered)
    with pytest.raises(ValueError, match="`training_routing` = 'nearest': must be one of"):
        MomaForCausalLM(config)


def test_a_new_rule_decides_who_runs(first_experts):
    model = tiny_model(**GROUPS["4t4i"]).eval()
    ids = mixed_ids()
    logits = model(ids, routing=first_experts).logits
    for layer in model.model.layers:
        for group in layer.mlp.groups.values():
            group.experts.down_proj.data[2:] = 0
    torch.testing.assert_close(model(ids, routing=first_experts).logits, logits)
    for layer in model.model.layers:
        for group in layer.mlp.groups.values():
            group.experts.down_proj.data[:2] = 0
    assert not torch.allclose(model(ids, routing=first_experts).logits, logits)


def test_a_rule_without_a_depth_form_raises_by_name(first_experts):
    model = tiny_model(**GROUPS["4t4i"], **DEPTH).eval()
    with pytest.raises(ValueError, match="`depth_routing` = 'first_experts': this rule has no form for depth layers"):
        model(mixed_ids(), routing=first_experts)
    # experts may follow it where depth layers follow another
    assert model(mixed_ids(), routing=first_experts, depth_routing="threshold").logits.isfinite().all()


def test_depth_layers_follow_the_form_that_a_rule_brings(first_experts):
    asked = []

    @depth_rule(first_experts)
    def choose(tokens):
        asked.append(tokens.scores_BT.shape)
        return torch.zeros_like(tokens.is_token_BT)

    model = tiny_model(**GROUPS["4t4i"], **DEPTH).eval()
    ids = mixed_ids()
    model(ids, routing=first_experts)
    assert asked == [ids.shape]


@torch.no_grad()
@pytest.mark.parametrize("field, value", [("num_experts_per_tok", 2), ("normalize_gates", True)])
def test_fields_that_change_no_weight_are_read_in_every_forward(field, value):
    model, ids = tiny_model(**GROUPS["4t4i"], num_experts_per_tok=1).eval(), mixed_ids(4, 16)
    setattr(model.config, field, value)
    wanted = MomaForCausalLM(MomaConfig.from_dict(model.config.to_dict())).eval()
    wanted.load_state_dict(model.state_dict())
    assert torch.equal(model(ids, routing="token_choice").logits, wanted(ids, routing="token_choice").logits)


@pytest.mark.parametrize(
    "field, value",
    [
        ("expert_capacity_factor", 2.5),
        ("depth_capacity", 0.9),
        ("routing_warmup_steps", 0),
        ("threshold_momentum", 0.1),
    ],
)
def test_training_reads_fields_that_change_no_weight_as_a_loaded_model_does(field, value):
    rules = {"training_routing": "threshold", "depth_training_routing": "expert_choice", "routing_warmup_steps": 3}
    model, ids = tiny_model(**{**GROUPS["4t4i"], **DEPTH, **rules}).train(), mixed_ids(4, 16)
    setattr(model.config, field, value)
    wanted = MomaForCausalLM(MomaConfig.from_dict(model.config.to_dict())).train()
    wanted.load_state_dict(model.state_dict())
    for _ in range(3):
        assert torch.equal(model(ids, labels=ids).loss, wanted(ids, labels=ids).loss)
    buffers = dict(wanted.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@torch.no_grad()
@pytest.mark.parametrize("field", ["expert_capacity_factor", "depth_capacity"])
def test_the_smallest_capacities_take_one_token(field):
    model, ids = tiny_model(**{**GROUPS["4t4i"], **DEPTH, field: 4e-7}), mixed_ids(4, 16)
    assert model(ids, labels=ids).loss.isfinite()


def test_costs_read_the_record(first_experts):
    config = tiny_config(num_experts={"text": 4, "image": 4}, num_experts_per_tok=2)
    assert flops_per_token(config, "text", 8, routing=first_experts) == flops_per_token(
        config, "text", 8, routing="token_choice"
    )
    with pytest.raises(ValueError, match="`routing` must be one of"):
        flops_per_token(config, "text", 8, routing="nearest")
