# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

from helpers.failures import must_not_raise
from helpers.reference import GROUPS, assert_near, context_of, fields_of, reference_group
from helpers.tiny import mixed_ids, tiny_config, tiny_model
from modeling_moma.configuration_moma import RULES
from modeling_moma.experts_implementations_moma import takes_hints
from modeling_moma.modeling_moma import MomaExpertGroup
from modeling_moma.routing_moma import Selection


IMPLEMENTATIONS = ["moma", "eager", "grouped_mm", "batched_mm"]
WIDTHS = [(width, name) for width in (13, 32) for name in IMPLEMENTATIONS]
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


@pytest.mark.parametrize(("dtype", "relative"), PRECISIONS)
@pytest.mark.parametrize("routing", ["threshold", "token_choice", "expert_choice"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [1365, 2730, 5461])
def test_odd_widths_run_and_equal_the_plain_loop(width, implementation, routing, dtype, relative):
    config, group = group_of(width, implementation, dtype)
    x = torch.randn(7, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    output = run(config, group, x, routing)
    expected = reference_group(group, x, routing)[0]
    assert_near(output, expected, relative)
    for gradient, wanted in zip(gradients(group, output, x), gradients(group, expected, x)):
        assert_near(gradient, wanted, relative)


@pytest.mark.parametrize("routing", ["threshold", "token_choice", "expert_choice"])
@pytest.mark.parametrize(("width", "implementation"), WIDTHS)
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


@pytest.mark.parametrize(("dtype", "relative"), PRECISIONS)
@pytest.mark.parametrize(("width", "implementation"), WIDTHS)
def test_equal_shares_equal_the_same_pairs_in_another_order(width, implementation, dtype, relative):
    config, group = group_of(width, implementation, dtype)
    token_EK = torch.tensor([[0, 2, 3], [2, 4, 6], [0, 1, 2]])
    weight_EK = torch.rand(3, 3, generator=torch.Generator().manual_seed(3))
    equal = Selection.from_topk(token_EK, weight_EK)
    order_P = torch.randperm(9, generator=torch.Generator().manual_seed(4))
    mixed = Selection(equal.token_P[order_P], equal.expert_P[order_P], equal.weight_P[order_P])
    x = torch.randn(7, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(selection):
        hints = selection.hints() if takes_hints(config) else {}
        pairs = selection.expert_P.unsqueeze(-1), selection.weight_P.unsqueeze(-1)
        return selection.combine(group.experts(selection.dispatch(x), *pairs, **hints), 7)

    outputs = [run(selection) for selection in (equal, mixed)]
    assert_near(outputs[0], outputs[1], relative)
    assert torch.allclose(equal.gates(7), mixed.gates(7))
    assert not outputs[0][5].any()


@pytest.fixture
def calls():
    """How often a kernel of a caller's own ran, under the name "counted"."""
    seen = []

    def counted(experts, hidden_states, top_k_index, top_k_weights):
        seen.append(tuple(hidden_states.shape))
        return batched_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)

    ALL_EXPERTS_FUNCTIONS.register("counted", counted)
    yield seen
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop("counted")


@pytest.mark.parametrize("routing", RULES)
@pytest.mark.parametrize("is_training", [True, False])
def test_what_a_user_sets_is_what_runs(calls, is_training, routing):
    fields = {**GROUPS["4t4i"], **fields_of(routing)}
    oracle = tiny_model(**fields).train(is_training)
    model = tiny_model(**fields).train(is_training)
    model.set_experts_implementation("counted")
    ids = mixed_ids()
    logits = model(ids, routing=routing).logits
    assert len(calls) == 2 * model.config.num_hidden_layers
    torch.testing.assert_close(logits, oracle(ids, routing=routing).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", ["threshold", "token_choice"])
def test_what_a_user_sets_runs_in_steps_with_a_static_cache(calls, routing):
    model = tiny_model(**GROUPS["4t4i"], **fields_of(routing)).eval()
    ids = mixed_ids(rows=1)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")
    model.set_experts_implementation("counted")
    actual = model.generate(ids, max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert actual.tolist() == expected.tolist()
    assert len(calls) == 3 * 2 * model.config.num_hidden_layers


def test_models_start_with_the_implementation_of_this_package():
    model = tiny_model(**GROUPS["4t4i"])
    assert model.config._experts_implementation == "moma"
    model.set_experts_implementation("grouped_mm")
    assert model.config._experts_implementation == "grouped_mm"
    with pytest.raises(ValueError, match="nearest"):
        model.set_experts_implementation("nearest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_size", [16, 20, 22])
@pytest.mark.parametrize("width", [12, 13, 20])
def test_grouped_products_run_at_any_width_in_any_type(width, hidden_size, dtype):
    fields = {"intermediate_size": width, "hidden_size": hidden_size, "depth_layers": [0]}
    if hidden_size % 4:
        fields["head_dim"] = 8
    model = tiny_model(**GROUPS["4t4i"], **fields).to(dtype).eval()
    ids = mixed_ids(rows=2)
    model.set_experts_implementation("eager")
    expected = model(ids, routing="token_choice").logits.detach()
    with must_not_raise(ValueError, RuntimeError):
        model.set_experts_implementation("grouped_mm")
        found = model(ids, routing="token_choice").logits.detach()
    assert_near(found, expected, 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("width", [13, 32])
def test_one_token_on_an_accelerator_meets_no_grouped_product(width):
    """A meta tensor stands for one, on which nothing may wait for a number of rows."""
    config, group = group_of(width, "moma")
    experts = group.experts.to("meta")
    rows = torch.empty(2, config.hidden_size, device="meta")
    with torch.no_grad():
        index, weights = torch.zeros(2, 1, dtype=torch.long, device="meta"), torch.ones(2, 1, device="meta")
        assert experts(rows, index, weights).shape == rows.shape


class WeightProducts(TorchDispatchMode):
    """Types of the operands of all products with weights."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.out, torch.ops.aten.mm.default):
            self.dtypes.append({argument.dtype for argument in args[:2]})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("routing", ["threshold", "token_choice"])
def test_products_of_unequal_shares_follow_autocast(routing):
    config, group = group_of(32, "moma")
    x = torch.randn(7, config.hidden_size, requires_grad=True)
    with WeightProducts() as seen, torch.autocast("cpu", torch.bfloat16):
        output = run(config, group, x, routing)
    # the router's alone is in fp32
    assert seen.dtypes[0] == {torch.float32}
    assert len(seen.dtypes) > 2 and all(dtypes == {torch.bfloat16} for dtypes in seen.dtypes[1:])
    assert_near(output, reference_group(group, x, routing)[0], 2e-2)
    gradients(group, output, x)
    assert group.experts.gate_up_proj.dtype == torch.float32
