# SPDX-License-Identifier: Apache-2.0
"""Experts on a CPU, one after the other, with gradients and without.

Shape suffixes:
    P (token, expert) pairs, expert by expert, K pairs of one expert, D hidden size, E experts of the group,
    F inner width of one expert, G gates and ups, `2 * F`; flat for what lies expert by expert, each one's `[G, K]`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .host_moma import product_dtype


def run_in_turn(
    x_PD: torch.Tensor,
    gate_up_EGD: torch.Tensor,
    down_EDF: torch.Tensor,
    counts: Sequence[tuple[int, int]],
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """SwiGLU experts on rows that come expert by expert, with gradients.

    What an expert makes of its rows stays in the caches. Under autocast its weights are cast when it runs, in the
    forward and again in the backward: no copy of all weights waits in between, and gradients reach the weights in
    their own type. Gradients of gradients are refused.

    Args:
        x_PD (`torch.Tensor`): `[P, D]`.
        gate_up_EGD (`torch.Tensor`): `[E, 2 * F, D]`.
        down_EDF (`torch.Tensor`): `[E, D, F]`.
        counts (`Sequence[tuple[int, int]]`): the experts that have rows, in order, and how many each has; rows of
            experts from `E` on, which are elsewhere, get zeros.
        act_fn (`Callable`): between the products, elementwise.

    Returns:
        `torch.Tensor`: `[P, D]`, in the type of the products.
    """
    slices, begin = [], 0
    for expert, count in counts:
        if expert < gate_up_EGD.shape[0]:
            slices.append((expert, slice(begin, begin + count)))
        begin += count
    return _InTurn.apply(x_PD.to(product_dtype(gate_up_EGD)), gate_up_EGD, down_EDF, slices, act_fn)


class _InTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_PD: torch.Tensor, gate_up_EGD: torch.Tensor, down_EDF: torch.Tensor, slices, act_fn):
        width = gate_up_EGD.shape[1]
        gate_up_flat = x_PD.new_empty(x_PD.shape[0] * width)
        y_PD = torch.empty_like(x_PD)
        end = 0
        for expert, rows in slices:
            end = rows.stop
            gate_up_GK = _columns(gate_up_flat, rows, width)
            torch.mm(gate_up_EGD[expert].to(x_PD.dtype), x_PD[rows].t(), out=gate_up_GK)
            gate_FK, up_FK = gate_up_GK.chunk(2)
            y_PD[rows] = torch.mm(down_EDF[expert].to(x_PD.dtype), act_fn(gate_FK) * up_FK).t()
        y_PD[end:].zero_()
        ctx.slices, ctx.act_fn = slices, act_fn
        ctx.save_for_backward(x_PD, gate_up_flat, gate_up_EGD, down_EDF)
        return y_PD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, change_PD: torch.Tensor):
        x_PD, gate_up_flat, gate_up_EGD, down_EDF = ctx.saved_tensors
        needs_x, *needs_weights = ctx.needs_input_grad[:3]
        change_PD = change_PD.to(x_PD.dtype)
        x_change_PD = torch.zeros_like(x_PD) if needs_x else None
        gate_up_change_EGD, down_change_EDF = (
            torch.empty_like(weight) if is_needed else None
            for weight, is_needed in zip((gate_up_EGD, down_EDF), needs_weights)
        )
        idle = set(range(gate_up_EGD.shape[0]))
        for expert, rows in ctx.slices:
            idle.discard(expert)
            change_DK = change_PD[rows].t().contiguous()
            inner_change_FK = torch.mm(down_EDF[expert].to(x_PD.dtype).t(), change_DK)
            gate_up_GK = _columns(gate_up_flat, rows, gate_up_EGD.shape[1])
            inner_FK, gate_up_change_GK = _gate_backward(gate_up_GK, inner_change_FK, ctx.act_fn)
            if down_change_EDF is not None:
                down_change_EDF[expert].copy_(torch.mm(change_DK, inner_FK.t()))
            if gate_up_change_EGD is not None:
                gate_up_change_EGD[expert].copy_(torch.mm(gate_up_change_GK, x_PD[rows]))
            if x_change_PD is not None:
                torch.mm(gate_up_change_GK.t(), gate_up_EGD[expert].to(x_PD.dtype), out=x_change_PD[rows])
        for expert in idle:
            for weight_change in (gate_up_change_EGD, down_change_EDF):
                if weight_change is not None:
                    weight_change[expert].zero_()
        return x_change_PD, gate_up_change_EGD, down_change_EDF, None, None


def run_from_left(
    x_KD: torch.Tensor,
    gate_up_GD: torch.Tensor,
    down_DF: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """One SwiGLU expert without gradients, with its weights on the left of the products.

    Matrix units want the right operand of a product in an order of their own: to bring a few tokens into it costs
    less than an expert's weights (`python -m benchmarks.decode_parts`).

    Args:
        x_KD (`torch.Tensor`): `[K, D]`.
        gate_up_GD (`torch.Tensor`): `[2 * F, D]`.
        down_DF (`torch.Tensor`): `[D, F]`.
        act_fn (`Callable`): between the products, elementwise.

    Returns:
        `torch.Tensor`: `[K, D]`, a view of `[D, K]`.
    """
    if x_KD.shape[0] == 1:
        # products with a vector read weights faster than those with a matrix of one column
        # autocast knows nothing of `mv`, which begins sooner
        multiply = torch.mv if x_KD.dtype == gate_up_GD.dtype == torch.bfloat16 else torch.matmul
        gate_F, up_F = multiply(gate_up_GD, x_KD[0]).chunk(2)
        return multiply(down_DF, act_fn(gate_F).mul_(up_F)).unsqueeze(0)
    gate_FK, up_FK = torch.mm(gate_up_GD, x_KD.t()).chunk(2)
    return torch.mm(down_DF, act_fn(gate_FK).mul_(up_FK)).t()


def _columns(values_flat: torch.Tensor, rows: slice, width: int) -> torch.Tensor:
    """One expert's `[G, K]` of what lies in memory expert by expert."""
    return values_flat[rows.start * width : rows.stop * width].view(width, rows.stop - rows.start)


def _gate_backward(
    gate_up_GK: torch.Tensor, inner_change_FK: torch.Tensor, act_fn: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What lay between the products, `[F, K]`, and the gradients of gates and ups, `[G, K]`."""
    up_FK = gate_up_GK.chunk(2)[1]
    with torch.enable_grad():
        # a part of a leaf: what counts FLOPs by module refuses leaves
        gate_FK = gate_up_GK.detach().requires_grad_().chunk(2)[0]
        active_FK = act_fn(gate_FK)
    gate_up_change_GK = torch.empty_like(gate_up_GK)
    gate_change_FK, up_change_FK = gate_up_change_GK.chunk(2)
    gate_change_FK.copy_(torch.autograd.grad(active_FK, gate_FK, inner_change_FK * up_FK)[0])
    active_FK = active_FK.detach()
    torch.mul(inner_change_FK, active_FK, out=up_change_FK)
    return active_FK * up_FK, gate_up_change_GK


def are_plain(*weights: torch.Tensor) -> bool:
    """Whether weights are tensors that lie whole on this process, neither quantised nor shared out."""
    return all(type(weight) in (torch.Tensor, nn.Parameter) for weight in weights)


__all__ = ["are_plain", "run_from_left", "run_in_turn"]
