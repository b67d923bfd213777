# SPDX-License-Identifier: Apache-2.0
"""The pretended device itself: numbers, and what it counts and refuses."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from helpers.cuda.device import open_device


if open_device() is None:
    pytest.skip(
        "no CUDA device; `make test-cuda` pretends one, for a torch that is built for CUDA", allow_module_level=True
    )
DEVICE = torch.device("cuda", 0)


def numbers(*shape, device=DEVICE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def waits_of(device, work):
    with device.counting() as counts:
        work()
    return counts.waits


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, 3, device="cuda"),
        lambda: torch.arange(3, device=DEVICE),
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: torch.as_tensor([1, 2], device="cuda:0"),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.ones(2).cuda(),
        lambda: torch.ones(2).to(torch.ones(3, device="cuda")),
        lambda: torch.ones(3, device="cuda").new_tensor([2.0]),
        lambda: torch.zeros_like(torch.ones(3, device="cuda")),
        lambda: torch.ones(3, device="cuda")[None].expand(2, -1)[:, 1:],
    ],
)
def test_tensors_are_where_they_are_asked_for(device, make):
    assert make().device == DEVICE
    assert make().cpu().device.type == "cpu"


@pytest.mark.parametrize(
    ("work", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x[torch.tensor([0, 1])], 1),
        (lambda x: x[[0, 1]], 1),
        (lambda x: x + torch.ones(4).to("cuda"), 1),
        (lambda x: torch.tensor([1.0], device="cuda"), 1),
        (lambda x: torch.zeros(4).copy_(x), 1),
        (lambda x: x.copy_(torch.zeros(4)), 1),
        (lambda x: torch.bincount((x > 0).int()), 2),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.long)), 1),
        (lambda x: torch.cuda.synchronize(), 1),
        (lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.long), output_size=4), 0),
        (lambda x: torch.zeros(4).to("cuda", non_blocking=True), 0),
        (lambda x: x.masked_fill(x > 0, 0), 0),
        (lambda x: torch.where(x > 0, x, 0.0).topk(2), 0),
        (lambda x: x.__setitem__(x > 0, 0.0), 0),
        (lambda x: x[torch.arange(2, device="cuda")] * 2 + torch.tensor(3.0), 0),
        (lambda x: F.one_hot((x > 0).long(), 2), 0),
    ],
)
def test_waits_are_those_of_cuda(pretended, work, waits):
    x = numbers(4)
    assert waits_of(pretended, lambda: work(x)) == waits


def test_launches_are_those_of_cuda(pretended):
    x = numbers(2, 4, 8, 16)
    with pretended.counting() as counts:
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True).transpose(1, 2).reshape(2, 8, -1)
        F.silu(F.rms_norm(y, (64,)) @ numbers(64, 8) + torch.zeros(8, device="cuda"))
    assert counts.kernels == {
        name: 1 for name in ("scaled_dot_product_attention", "rms_norm", "mm", "add", "silu")
    } | {"clone": counts.kernels["clone"]}
    # the matrix and the zeros
    assert counts.fills == 2 and counts.waits == 1


def test_inference_mode_launches_what_no_grad_does(pretended):
    weight, x = numbers(8, 8), numbers(2, 4, 8)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pretended.counting() as counts:
            F.silu(F.linear(x, weight)).reshape(8, 8).to(torch.float32).contiguous()
        found.append(counts.kernels)
    assert found[0] == found[1] and found[0].total() == 2


@pytest.mark.parametrize(
    "work",
    [
        lambda x, host: x + host,
        lambda x, host: torch.cat([x, host]),
        lambda x, host: x.masked_fill(host > 0, 0),
        lambda x, host: x[None] @ host[:, None],
        lambda x, host: x.index_add(0, torch.arange(4), x),
        lambda x, host: host[(x > 0).long()],
        lambda x, host: x.index_put((torch.arange(4, device="cuda"),), host),
        lambda x, host: F.scaled_dot_product_attention(
            x[None, None], x[None, None], x[None, None], host[None, None] > 0
        ),
    ],
)
def test_tensors_of_two_devices_are_refused(device, work):
    with pytest.raises(RuntimeError, match="device"):
        work(numbers(4), numbers(4, device="cpu"))


def test_grouped_products_take_what_the_kernel_takes(pretended):
    offsets = torch.tensor([2, 4], dtype=torch.int32, device="cuda")
    x, weight = numbers(4, 16).bfloat16(), numbers(2, 16, 8).bfloat16()
    assert F.grouped_mm(x, weight, offs=offsets).shape == (4, 8)
    for wrong in (
        lambda: F.grouped_mm(x, numbers(2, 16, 7).bfloat16(), offs=offsets),
        lambda: F.grouped_mm(x[:, 1:], weight[:, 1:], offs=offsets),
        lambda: F.grouped_mm(x, weight, offs=offsets.long()),
    ):
        with pytest.raises(RuntimeError, match="grouped_mm"):
            wrong()
    assert waits_of(pretended, lambda: F.grouped_mm(x, weight, offs=offsets)) == 0
    assert waits_of(pretended, lambda: F.grouped_mm(x.float(), weight.float(), offs=offsets)) == 1


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_equal_those_of_the_cpu(device, is_checkpointed):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RMSNorm(8), torch.nn.Linear(8, 1))
    copied = copy.deepcopy(layers).to("cuda")

    def step(model, x):
        y = checkpoint(model, x, use_reentrant=False) if is_checkpointed else model(x)
        y.square().mean().backward()
        return [parameter.grad.cpu() for parameter in model.parameters()]

    for found, expected in zip(step(copied, numbers(4, 8)), step(layers, numbers(4, 8, device="cpu"))):
        torch.testing.assert_close(found, expected)


def test_a_module_that_moves_keeps_ties_and_optimizer(device):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.to("cuda")
    assert model[0].weight is model[1].weight and model[0].weight.device == DEVICE
    before = model[0].weight.detach().clone()
    model(numbers(2, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)
    copied = copy.deepcopy(model)
    assert copied[0].weight is copied[1].weight and copied[0].weight.device == DEVICE


def test_values_survive_pickling(device):
    x = numbers(3)
    assert torch.equal(pickle.loads(pickle.dumps(x)).cpu(), x.cpu())


def test_counts_tell_the_line(pretended):
    with pretended.counting(with_places=True) as counts:
        numbers(3).sum().item()
    assert any("test_device.py" in name for name in counts.syncs)
    assert all("test_device.py" in name for name in counts.kernels)
