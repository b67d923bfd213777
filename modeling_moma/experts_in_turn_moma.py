# SPDX-License-Identifier: Apache-2.0
"""Training on a CPU: one expert after the other, forward and backward.

Shape suffixes:
    P (token, expert) pairs, expert by expert, K pairs of one expert, D hidden size, E experts of the group,
    F inner width of one expert, G gates and ups, `2 * F`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn


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
        gate_up_PG = x_PD.new_empty(x_PD.shape[0], gate_up_EGD.shape[1])
        y_PD = torch.empty_like(x_PD)
        end = 0
        for expert, rows in slices:
            end = rows.stop
            torch.mm(x_PD[rows], gate_up_EGD[expert].to(x_PD.dtype).t(), out=gate_up_PG[rows])
            inner_KF = _gated(gate_up_PG[rows], act_fn)
            torch.mm(inner_KF, down_EDF[expert].to(x_PD.dtype).t(), out=y_PD[rows])
        y_PD[end:].zero_()
        ctx.slices, ctx.act_fn = slices, act_fn
        ctx.save_for_backward(x_PD, gate_up_PG, gate_up_EGD, down_EDF)
        return y_PD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, change_PD: torch.Tensor):
        x_PD, gate_up_PG, gate_up_EGD, down_EDF = ctx.saved_tensors
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
            inner_change_KF = torch.mm(change_PD[rows], down_EDF[expert].to(x_PD.dtype))
            with torch.enable_grad():
                gate_up_KG = gate_up_PG[rows].detach().requires_grad_()
                inner_KF = _gated(gate_up_KG, ctx.act_fn)
            (gate_up_change_KG,) = torch.autograd.grad(inner_KF, gate_up_KG, inner_change_KF)
            if down_change_EDF is not None:
                down_change_EDF[expert].copy_(torch.mm(change_PD[rows].t(), inner_KF.detach()))
            if gate_up_change_EGD is not None:
                gate_up_change_EGD[expert].copy_(torch.mm(gate_up_change_KG.t(), x_PD[rows]))
            if x_change_PD is not None:
                torch.mm(gate_up_change_KG, gate_up_EGD[expert].to(x_PD.dtype), out=x_change_PD[rows])
        for expert in idle:
            for weight_change in (gate_up_change_EGD, down_change_EDF):
                if weight_change is not None:
                    weight_change[expert].zero_()
        return x_change_PD, gate_up_change_EGD, down_change_EDF, None, None


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The type in which a product with a weight is computed, autocast or not."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


def are_plain(*weights: torch.Tensor) -> bool:
    """Whether weights are tensors that lie whole on this process, neither quantised nor shared out."""
    return all(type(weight) in (torch.Tensor, nn.Parameter) for weight in weights)


def _gated(gate_up_KG: torch.Tensor, act_fn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    gate_KF, up_KF = gate_up_KG.chunk(2, dim=-1)
    return act_fn(gate_KF) * up_KF


__all__ = ["are_plain", "product_dtype", "run_in_turn"]
