# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at best: the rate of products of a model's shapes, and the bandwidth of its memory."""

import statistics

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from benchmarks.speed.clock import seconds
from benchmarks.speed.shapes import Shape
from benchmarks.speed.work import Runner


_REPEATS = 9
# beyond what caches hold
_STREAMED_BYTES = 256 * 2**20


def matmul_rate(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the products of a feed-forward network, forward and backward, as libraries call them."""
    x_ND = torch.randn(tokens, shape.hidden_size, device=device, dtype=dtype)
    weight_FD = torch.randn(2 * shape.intermediate_size, shape.hidden_size, device=device, dtype=dtype)
    y_NF = torch.randn(tokens, 2 * shape.intermediate_size, device=device, dtype=dtype)

    def products():
        torch.nn.functional.linear(x_ND, weight_FD)
        torch.mm(y_NF, weight_FD)
        torch.mm(y_NF.t(), x_ND)

    return 3 * 2 * tokens * weight_FD.numel() / _median_seconds(products, device)


def bandwidth(device: str) -> float:
    """Bytes a second that a product with one vector reads of a matrix beyond the caches."""
    rows = _STREAMED_BYTES // 4 // 4096
    matrix, vector = torch.randn(rows, 4096, device=device), torch.randn(4096, device=device)
    return _STREAMED_BYTES / _median_seconds(lambda: torch.mv(matrix, vector), device)


def flops(runner: Runner) -> int:
    """FLOPs of one piece of work, counted by operation."""
    runner.prepare()
    with FlopCounterMode(display=False) as counter:
        runner.work()
    return counter.get_total_flops()


def bytes_read(runner: Runner) -> float:
    """Bytes of the weights that a piece of decoding has to read: all, of experts those that tokens chose."""
    model, chosen = runner.model, 0
    expert_bytes = {}
    for experts in _expert_modules(model):
        own = sum(parameter.nbytes for parameter in experts.parameters())
        expert_bytes[experts] = own / experts.num_experts

    def count(module, args, *_):
        nonlocal chosen
        index, weight = args[1], args[2]
        is_taken = weight.reshape(index.shape) != 0
        chosen += index[is_taken].unique().numel() * expert_bytes[module]

    handles = [module.register_forward_pre_hook(count) for module in expert_bytes]
    runner.prepare()
    chosen = 0
    steps = _count_forwards(runner)
    for handle in handles:
        handle.remove()
    embedding = model.get_input_embeddings().weight
    is_tied = model.get_output_embeddings().weight is embedding
    others = sum(parameter.nbytes for parameter in model.parameters())
    others -= sum(each * module.num_experts for module, each in expert_bytes.items())
    others -= 0 if is_tied else embedding.nbytes
    return others * steps + chosen


def _count_forwards(runner: Runner) -> int:
    number = 0

    def count(*_):
        nonlocal number
        number += 1

    handle = runner.model.register_forward_pre_hook(count)
    runner.work()
    handle.remove()
    return number


def _expert_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")]


def _median_seconds(work, device: str) -> float:
    times = [seconds(work, device) for _ in range(_REPEATS + 2)]
    return statistics.median(times[2:])
