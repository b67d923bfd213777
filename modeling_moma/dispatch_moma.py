# SPDX-License-Identifier: Apache-2.0
"""How packed experts multiply: implementations for the experts interface of Transformers, by name.

`model.set_experts_implementation(name)` picks one of these, of Transformers' own or of a caller's, for every mode and
every rule. A model starts with `"moma"`.

Shape suffixes:
    D hidden size, E experts of the group, K tokens that one expert takes, F inner width of one expert,
    P (token, expert) pairs.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from .experts_in_turn_moma import are_plain, run_from_left, run_in_turn
from .host_moma import is_on_host, product_dtype
from .padded_experts_moma import is_whole
from .step_products_moma import wants_weights_left


if TYPE_CHECKING:
    from .experts_moma import MomaExperts


DEFAULT_IMPLEMENTATION = "moma"

# whose experts are counted faster one by one than by an operation
_FEW_ROWS = 128


def moma_experts_forward(
    self: "MomaExperts",
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_taken: int | None = None,
    is_sorted: bool = False,
    ends_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Equal shares as two batched products, others expert by expert on a CPU and as grouped products elsewhere.

    On a CPU equal shares run expert by expert, too, where autocast would cast the weights.

    Args:
        self (`MomaExperts`): packed experts.
        hidden_states (`torch.Tensor`): `[P, D]`.
        top_k_index (`torch.LongTensor`): experts of each row, `[P, k]`.
        top_k_weights (`torch.Tensor`): gates, `[P, k]`.
        num_taken (`int`, *optional*): the `K` rows of each expert where all have as many and the rows come expert by
            expert, one expert each.
        is_sorted (`bool`, *optional*, defaults to `False`): whether the rows come expert by expert, one expert each.
        ends_E (`torch.IntTensor`, *optional*): where each expert's rows end, of sorted rows, `[E]`; what is given for
            rows after the last end means nothing.

    Returns:
        `torch.Tensor`: weighted sums, `[P, D]`.
    """
    on_host = is_on_host(hidden_states) and not torch.compiler.is_compiling()
    # a copy of all weights that the backward waits for is what running in turn spares
    casts = on_host and product_dtype(self.down_proj) != self.down_proj.dtype
    if num_taken is not None and not (casts and _runs_in_turn(self)):
        return _run_equal_shares(self, hidden_states, top_k_weights, num_taken)
    is_sorted = is_sorted or num_taken is not None
    if on_host and _runs_in_turn(self):
        return _run_in_order(self, hidden_states, top_k_index, top_k_weights, is_sorted, _in_turn)
    if ends_E is not None:
        run = partial(_grouped, ends_E=ends_E)
        return _run_in_order(self, hidden_states, top_k_index, top_k_weights, True, run)
    # a compiler that captures dynamic shapes in training must not meet the last question
    may_step = not is_on_host(hidden_states) and not torch.is_grad_enabled()
    if may_step and top_k_index.numel() <= self.num_experts:
        return batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    is_aligned = all(is_whole(size, self.down_proj.dtype) for size in self.down_proj.shape[1:])
    # the library's way gathers and scatters by indexing, whose gradients are slow there, and knows no autocast
    if on_host or not is_aligned:
        return _run_in_order(self, hidden_states, top_k_index, top_k_weights, is_sorted, _grouped)
    return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def _runs_in_turn(experts: "MomaExperts") -> bool:
    """Whether each expert can run by itself: without gradients any, with them those of plain weights."""
    return not torch.is_grad_enabled() or are_plain(experts.gate_up_proj, experts.down_proj)


def _run_equal_shares(
    experts: "MomaExperts", x_PD: torch.Tensor, weight_P1: torch.Tensor, num_taken: int
) -> torch.Tensor:
    # weights on the left: the products then read them row by row, and stay transposed in between
    x_EDK = x_PD.unflatten(0, (experts.num_experts, num_taken)).transpose(1, 2)
    gate_EFK, up_EFK = torch.bmm(experts.gate_up_proj, x_EDK).chunk(2, dim=1)
    y_EDK = torch.bmm(experts.down_proj, experts.act_fn(gate_EFK) * up_EFK)
    return y_EDK.transpose(1, 2).flatten(0, 1) * weight_P1.to(y_EDK.dtype)


def _run_in_order(
    experts: "MomaExperts",
    x_ND: torch.Tensor,
    expert_Nk: torch.Tensor,
    weight_Nk: torch.Tensor,
    is_sorted: bool,
    run: Callable[["MomaExperts", torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Bring the pairs expert by expert, let `run` make outputs of their rows and experts, and bring those back."""
    num_slots = expert_Nk.shape[1]
    expert_P, weight_P1, rows_PD, order_P = expert_Nk.flatten(), weight_Nk.reshape(-1, 1), x_ND, None
    if not is_sorted:
        expert_P, order_P = expert_P.sort()
        rows_PD, weight_P1 = x_ND.index_select(0, order_P // num_slots), weight_P1.index_select(0, order_P)
    y_PD = run(experts, rows_PD, expert_P)
    if run is _in_turn and not torch.is_grad_enabled():
        # nothing is kept for a backward
        y_PD.mul_(weight_P1)
    else:
        y_PD = y_PD * weight_P1.to(y_PD.dtype)
    if order_P is None:
        return y_PD
    y_PD = torch.zeros_like(y_PD).index_copy(0, order_P, y_PD)
    return y_PD.unflatten(0, expert_Nk.shape).sum(1).to(x_ND.dtype)


def _in_turn(experts: "MomaExperts", rows_PD: torch.Tensor, expert_P: torch.Tensor) -> torch.Tensor:
    """Each expert's weights are read once, and no others; what it makes of its rows stays in the caches."""
    counts = _rows_of_experts(expert_P)
    if torch.is_grad_enabled():
        return run_in_turn(rows_PD, experts.gate_up_proj, experts.down_proj, counts, experts.act_fn)
    return run_counted(experts, rows_PD, counts)


def run_counted(experts: "MomaExperts", rows_PD: torch.Tensor, counts: list[tuple[int, int]]) -> torch.Tensor:
    """Experts one after the other without gradients.

    Args:
        experts (`MomaExperts`): packed experts.
        rows_PD (`torch.Tensor`): `[P, D]`, expert by expert.
        counts (`list[tuple[int, int]]`): the experts that have rows, in order, and how many.

    Returns:
        `torch.Tensor`: `[P, D]`, not weighed yet; zeros for experts elsewhere, which expert parallelism counts beyond
        those that are here.
    """
    # a module looks each of them up by name
    gate_up_EGD, down_EDF, act_fn = experts.gate_up_proj, experts.down_proj, experts.act_fn
    is_plain_half = product_dtype(down_EDF) == torch.bfloat16 and are_plain(gate_up_EGD, down_EDF)
    parts, begin = [], 0
    for expert, count in counts:
        rows_KD = rows_PD[begin : begin + count]
        begin += count
        if expert >= experts.num_experts:
            parts.append(torch.zeros_like(rows_KD))
        elif is_plain_half and wants_weights_left(count):
            parts.append(run_from_left(rows_KD, gate_up_EGD[expert], down_EDF[expert], act_fn))
        else:
            parts.append(experts._run_one(expert, rows_KD))
    if not parts:
        return torch.zeros_like(rows_PD)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rows_of_experts(expert_P: torch.Tensor) -> list[tuple[int, int]]:
    """The experts that occur, in order, and how often each does."""
    if expert_P.numel() <= _FEW_ROWS:
        experts = expert_P.tolist()
        return [(expert, experts.count(expert)) for expert in sorted(set(experts))]
    return [(expert, count) for expert, count in enumerate(torch.bincount(expert_P).tolist()) if count]


def _grouped(
    experts: "MomaExperts", rows_PD: torch.Tensor, expert_P: torch.Tensor, ends_E: torch.Tensor | None = None
) -> torch.Tensor:
    """Grouped products, of any width; where no kernel takes it, with a wait for how many rows each expert has."""
    if ends_E is None:
        experts_E = torch.arange(experts.num_experts, device=rows_PD.device)
        ends_E = torch.searchsorted(expert_P, experts_E, right=True).int()
    gate_up_PF = _multiply_in_turn(rows_PD, experts.gate_up_proj, ends_E)
    return _multiply_in_turn(experts._apply_gate(gate_up_PF), experts.down_proj, ends_E)


def _multiply_in_turn(x_PD: torch.Tensor, weight_EFD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    dtype = product_dtype(weight_EFD)
    x_PD, weight_EDF = x_PD.to(dtype), weight_EFD.to(dtype).transpose(1, 2)
    # newer than the oldest torch that is supported
    kernel = getattr(torch.nn.functional, "grouped_mm", None)
    if kernel is not None and not is_on_host(x_PD) and all(is_whole(size, dtype) for size in weight_EFD.shape[1:]):
        return kernel(x_PD.contiguous(), weight_EDF, offs=ends_E)
    # rows after the last end, of experts elsewhere, get zeros
    return torch.ops.transformers.grouped_mm_fallback(x_PD, weight_EDF, ends_E)


ALL_EXPERTS_FUNCTIONS.register(DEFAULT_IMPLEMENTATION, moma_experts_forward)


__all__ = ["DEFAULT_IMPLEMENTATION", "moma_experts_forward", "run_counted"]
