# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import pytest
import torch

from modeling.reference import assert_near, context_of, reference_group, tiny_config
from modeling_moma.experts_moma import MomaExpertGroup
from modeling_moma.routing_moma import ExpertSelection, PairSelection


IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
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
    # padding is for the call alone
    assert group.experts.gate_up_proj.shape == (3, 2 * width, config.hidden_size)
    assert group.state_dict()["experts.down_proj"].shape == (3, config.hidden_size, width)


@pytest.mark.parametrize("routing", ["threshold", "token_choice", "expert_choice"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [13, 32])
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
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [13, 32])
def test_the_batched_path_equals_the_pairs_path(width, implementation, dtype, relative):
    config, group = group_of(width, implementation, dtype)
    token_EK = torch.tensor([[0, 2, 3], [2, 4, 6], [0, 1, 2]])
    weight_EK = torch.rand(3, 3, generator=torch.Generator().manual_seed(3))
    pairs = PairSelection(token_EK.flatten(), torch.arange(3).repeat_interleave(3), weight_EK.flatten())
    x = torch.randn(7, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = [group._run(x, selection, torch.zeros(7)) for selection in (ExpertSelection(token_EK, weight_EK), pairs)]
    assert_near(outputs[0][0], outputs[1][0], relative)
    assert torch.allclose(outputs[0][1], outputs[1][1])
    assert not outputs[0][0][5].any()
