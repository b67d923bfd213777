# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

from helpers.reference import GROUPS, assert_near, context_of, reference_group
from helpers.tiny import mixed_ids, tiny_config, tiny_model
from modeling_moma.configuration_moma import RULES
from modeling_moma.modeling_moma import MomaExpertGroup


IMPLEMENTATIONS = ["moma", "eager", "grouped_mm", "batched_mm"]
PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def group_of(width, implementation, dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    config = tiny_config(intermediate_size=width, num_experts=3, **kwargs)
    config._experts_implementation = implementation
    group = MomaExpertGroup(config, "all")
    for name, parameter in group.named_parameters():
        fan_in = parameter.shape[-1]
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
        if name != "router.weight":
            parameter.data = parameter.data.to(dtype)
    return config, group


def run(config, group, x, routing):
    # a group looks at the routing alone; the split belongs to the layer
    return group(x, context_of(config, torch.zeros(1, 1, dtype=torch.long), routing))[0]


def gradients(group, output, x):
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((output.float() * weight).sum(), [x, *group.parameters()])


@pytest.mark.parametrize(
    ("implementation", "routing", "dtype", "relative"),
    [
        *(("moma", routing, *precision) for routing in RULES for precision in PRECISIONS if routing != "auxiliary"),
        ("eager", "threshold", *PRECISIONS[0]),
        ("eager", "expert_choice", *PRECISIONS[1]),
        ("grouped_mm", "threshold", *PRECISIONS[1]),
        ("grouped_mm", "token_choice", *PRECISIONS[0]),
        ("batched_mm", "token_choice", *PRECISIONS[1]),
        ("batched_mm", "expert_choice", *PRECISIONS[0]),
    ],
)
@pytest.mark.parametrize("width", [1365, 32])
def test_any_width_runs_and_equals_the_plain_loop(width, implementation, routing, dtype, relative):
    config, group = group_of(width, implementation, dtype)
    x = torch.randn(7, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    output = run(config, group, x, routing)
    expected = reference_group(group, x, routing)[0]
    assert_near(output, expected, relative)
    for gradient, wanted in zip(gradients(group, output, x), gradients(group, expected, x)):
        assert_near(gradient, wanted, relative)


@pytest.mark.parametrize(
    ("width", "implementation", "routing"),
    [
        (13, "moma", "threshold"),
        (32, "moma", "expert_choice"),
        (13, "grouped_mm", "token_choice"),
        (32, "batched_mm", "threshold"),
    ],
)
def test_zero_tokens_give_every_weight_a_zero_gradient(width, implementation, routing):
    config, group = group_of(width, implementation)
    x = torch.zeros(0, config.hidden_size, requires_grad=True)
    output = run(config, group, x, routing)
    assert output.shape == (0, config.hidden_size)
    output.sum().backward()
    for name, parameter in group.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_that_no_expert_takes_give_zeros(implementation):
    config, group = group_of(32, implementation)
    group.router.threshold.fill_(1.0)
    x = torch.randn(5, config.hidden_size)
    output = run(config, group, x, "threshold")
    assert output.shape == x.shape
    assert not output.any()
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in group.parameters())


def test_models_start_with_the_implementation_of_this_package():
    model = tiny_model(**GROUPS["4t4i"])
    assert model.config._experts_implementation == "moma"
    model.set_experts_implementation("grouped_mm")
    assert model.config._experts_implementation == "grouped_mm"
    with pytest.raises(ValueError, match="nearest"):
        model.set_experts_implementation("nearest")


@pytest.mark.parametrize(
    ("width", "hidden_size", "dtype"),
    [
        (12, 16, torch.bfloat16),
        (13, 20, torch.float16),
        (13, 22, torch.float32),
    ],
)
def test_grouped_products_run_at_any_width_in_any_type(width, hidden_size, dtype):
    fields = {"intermediate_size": width, "hidden_size": hidden_size, "depth_layers": [0]}
    if hidden_size % 4:
        fields["head_dim"] = 8
    model = tiny_model(**GROUPS["4t4i"], **fields).to(dtype).eval()
    ids = mixed_ids(rows=2)
    model.set_experts_implementation("eager")
    expected = model(ids, routing="token_choice").logits.detach()
    model.set_experts_implementation("grouped_mm")
    found = model(ids, routing="token_choice").logits.detach()
    assert_near(found, expected, 1e-5 if dtype == torch.float32 else 2e-2)


def test_one_token_on_an_accelerator_meets_no_grouped_product():
    """A meta tensor stands for one, on which nothing may wait for a number of rows."""
    config, group = group_of(13, "moma")
    experts = group.experts.to("meta")
    rows = torch.empty(2, config.hidden_size, device="meta")
    with torch.no_grad():
        index, weights = torch.zeros(2, 1, dtype=torch.long, device="meta"), torch.ones(2, 1, device="meta")
        assert experts(rows, index, weights).shape == rows.shape


@pytest.mark.parametrize(
    ("routing", "takes_hints"), [("expert_choice", True), ("threshold", True), ("threshold", False)]
)
def test_an_implementation_that_is_added_says_itself_whether_it_takes_hints(routing, takes_hints):
    told = []

    def own(self, hidden_states, top_k_index, top_k_weights, **hints):
        told.append(set(hints))
        return batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)

    if takes_hints:
        own.takes_hints = True
    ALL_EXPERTS_FUNCTIONS.register("own", own)
    try:
        model = tiny_model(**GROUPS["4t4i"]).eval()
        expected = model(mixed_ids(), routing=routing).logits
        model.set_experts_implementation("own")
        torch.testing.assert_close(model(mixed_ids(), routing=routing).logits, expected, rtol=1e-4, atol=1e-5)
    finally:
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop("own")
    hints = {"num_taken"} if routing == "expert_choice" else {"is_sorted", "ends_E"}
    assert told and all(each == (hints if takes_hints else set()) for each in told)
