# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modeling_moma import cpu_moma
from modeling_moma.cpu_moma import run_sequentially


WIDTH, INNER = 6, 5
COUNTS = ([3, 1, 2], [0, 4, 0], [0, 0, 0], [2, 0, 1, 3])
# of three experts; rows of a fourth are of an expert elsewhere
NUM_EXPERTS = 3


def parts(counts, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(counts), WIDTH), (NUM_EXPERTS, 2 * INNER, WIDTH), (NUM_EXPERTS, WIDTH, INNER))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def run(x_PD, gate_up_EWD, down_EDF, counts, has_backward=True):
    experts = SimpleNamespace(
        num_experts=NUM_EXPERTS, gate_up_proj=gate_up_EWD, down_proj=down_EDF, act_fn=nn.functional.silu
    )
    expert_P = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return run_sequentially(experts, x_PD, expert_P, has_backward)


def plain_loop(x_PD, gate_up_EWD, down_EDF, counts):
    outputs, begin = [], 0
    for expert, count in enumerate(counts):
        rows = x_PD[begin : begin + count]
        begin += count
        if expert >= NUM_EXPERTS:
            outputs.append(rows * 0)
            continue
        gate, up = (rows @ gate_up_EWD[expert].T).chunk(2, dim=-1)
        outputs.append((nn.functional.silu(gate) * up) @ down_EDF[expert].T)
    return torch.cat(outputs)


@pytest.mark.parametrize("counts", COUNTS)
def test_outputs_and_gradients_are_those_of_a_plain_loop(counts):
    mine, others = parts(counts), parts(counts)
    output, expected = run(*mine, counts), plain_loop(*others, counts)
    torch.testing.assert_close(output, expected)
    change = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    output.backward(change)
    expected.backward(change)
    for one, other in zip(mine, others):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("counts", [[0, 4, 0], [1, 2, 1]])
def test_experts_with_their_weights_on_the_left_are_those_of_a_plain_loop(counts, monkeypatch):
    monkeypatch.setattr(cpu_moma, "wants_weights_left", lambda num_rows: True)
    inputs = [each.detach().bfloat16() for each in parts(counts)]
    expected = plain_loop(*(each.float() for each in inputs), counts)
    torch.testing.assert_close(run(*inputs, counts, has_backward=False).float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
def test_what_is_frozen_gets_no_gradient(frozen):
    mine, others = parts(COUNTS[0]), parts(COUNTS[0])
    for tensors in (mine, others):
        for index in frozen:
            tensors[index].requires_grad_(False)
    output = run(*mine, COUNTS[0])
    assert output.requires_grad == (len(frozen) < 3)
    if output.requires_grad:
        output.sum().backward()
        plain_loop(*others, COUNTS[0]).sum().backward()
    for index, (one, other) in enumerate(zip(mine, others)):
        assert (one.grad is None) == (index in frozen)
        torch.testing.assert_close(one.grad, other.grad)


def test_under_autocast_products_are_in_bf16_and_gradients_in_the_type_of_the_weights():
    mine, others = parts(COUNTS[0], torch.float32), parts(COUNTS[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(*mine, COUNTS[0])
    assert output.dtype == torch.bfloat16
    expected = plain_loop(*others, COUNTS[0])
    output.float().square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.2)
    for one, other in zip(mine, others):
        assert one.grad.dtype == torch.float32
        assert (one.grad - other.grad).norm() < 0.05 * other.grad.norm()


def test_no_copy_of_all_weights_waits_for_the_backward():
    held = []
    mine = parts(COUNTS[0], torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (held.append(x), x)[1], lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            run(*mine, COUNTS[0])
    weights = {tensor.data_ptr() for tensor in mine[1:]}
    copies = [x for x in held if x.shape in (mine[1].shape, mine[2].shape) and x.data_ptr() not in weights]
    assert held and not copies
