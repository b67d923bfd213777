# SPDX-License-Identifier: Apache-2.0
"""How packed experts multiply: implementations for the experts interface of Transformers, by name.

`model.set_experts_implementation(name)` picks one of these, of Transformers' own or of a caller's, for every mode and
every rule. A model starts with `"moma"`.

Shape suffixes:
    D hidden size, E experts of the group, K tokens that one expert takes, F inner width of one expert,
    P (token, expert) pairs.
"""

from typing import TYPE_CHECKING

import torch
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from .configuration_moma import MomaConfig
from .experts_in_turn_moma import are_plain, run_in_turn
from .host_moma import is_on_host


if TYPE_CHECKING:
    from .experts_moma import MomaExperts


DEFAULT_IMPLEMENTATION = "moma"

# whose experts are counted faster one by one than by an operation
_FEW_ROWS = 128
# what grouped matrix products want whole words of, in every row
_WORD_BYTES = 16


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
    if num_taken is not None and not (on_host and _casts(self.down_proj)):
        return _run_equal_shares(self, hidden_states, top_k_weights, num_taken)
    if on_host and torch.is_grad_enabled() and are_plain(self.gate_up_proj, self.down_proj):
        return _train_in_turn(self, hidden_states, top_k_index, top_k_weights, num_taken, is_sorted)
    if on_host and not torch.is_grad_enabled():
        return _run_chosen(self, hidden_states, top_k_index, top_k_weights, is_sorted or num_taken is not None)
    if num_taken is not None:
        return _run_equal_shares(self, hidden_states, top_k_weights, num_taken)
    if ends_E is not None:
        return _run_sorted(self, hidden_states, top_k_index, top_k_weights, True, ends_E)
    # a compiler that captures dynamic shapes in training must not meet the last question
    may_step = not is_on_host(hidden_states) and not torch.is_grad_enabled()
    if may_step and top_k_index.numel() <= self.num_experts:
        return batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    is_aligned = all(_is_aligned(size, self.down_proj.dtype) for size in self.down_proj.shape[1:])
    # the library's way gathers and scatters by indexing, whose gradients are slow there, and knows no autocast
    if on_host or not is_aligned:
        return _run_sorted(self, hidden_states, top_k_index, top_k_weights, is_sorted)
    return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def check_grouped_widths(config: MomaConfig):
    """Refuse `"grouped_mm"` where torch's grouped products would fail in the middle of a forward.

    Args:
        config (`MomaConfig`): widths, and the type of the weights.

    Raises:
        ValueError: rows of a group's weights are not made of whole 16-byte words.
    """
    dtype = config.dtype or torch.get_default_dtype()
    for group in config.expert_groups:
        for name, size in (
            ("intermediate_size", config.group_intermediate_size(group)),
            ("hidden_size", config.hidden_size),
        ):
            # as a string it stands in files alone
            if config.group_num_experts(group) > 1 and not _is_aligned(size, dtype):  # pyright: ignore[reportArgumentType]
                raise ValueError(
                    f"`experts_implementation` = 'grouped_mm': grouped products want rows of whole {_WORD_BYTES}-byte "
                    f"words, and {name} is {size} in group {group!r}, in {dtype}. Any width runs with "
                    f"{DEFAULT_IMPLEMENTATION!r}, 'eager' or 'batched_mm'."
                )


def _casts(weight: torch.Tensor) -> bool:
    """Whether products would cast a weight."""
    device_type = weight.device.type
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) != weight.dtype


def _is_aligned(size: int, dtype: torch.dtype) -> bool:
    return size * dtype.itemsize % _WORD_BYTES == 0


def _run_equal_shares(
    experts: "MomaExperts", x_PD: torch.Tensor, weight_P1: torch.Tensor, num_taken: int
) -> torch.Tensor:
    # weights on the left: the products then read them row by row, and stay transposed in between
    x_EDK = x_PD.unflatten(0, (experts.num_experts, num_taken)).transpose(1, 2)
    gate_EFK, up_EFK = torch.bmm(experts.gate_up_proj, x_EDK).chunk(2, dim=1)
    y_EDK = torch.bmm(experts.down_proj, experts.act_fn(gate_EFK) * up_EFK)
    return y_EDK.transpose(1, 2).flatten(0, 1) * weight_P1.to(y_EDK.dtype)


def _train_in_turn(
    experts: "MomaExperts",
    x_ND: torch.Tensor,
    expert_Nk: torch.Tensor,
    weight_Nk: torch.Tensor,
    num_taken: int | None,
    is_sorted: bool,
) -> torch.Tensor:
    num_slots = expert_Nk.shape[1]
    expert_P, weight_P1, rows_PD, order_P = expert_Nk.flatten(), weight_Nk.reshape(-1, 1), x_ND, None
    if num_taken is None and not is_sorted:
        expert_P, order_P = expert_P.sort()
        rows_PD, weight_P1 = x_ND.index_select(0, order_P // num_slots), weight_P1.index_select(0, order_P)
    if num_taken is not None:
        counts = [num_taken] * experts.num_experts
    else:
        counts = torch.bincount(expert_P, minlength=experts.num_experts).tolist()
    y_PD = run_in_turn(rows_PD, experts.gate_up_proj, experts.down_proj, counts, experts.act_fn)
    y_PD = y_PD * weight_P1.to(y_PD.dtype)
    if order_P is None:
        return y_PD
    y_PD = torch.zeros_like(y_PD).index_copy(0, order_P, y_PD)
    return y_PD.unflatten(0, expert_Nk.shape).sum(1).to(x_ND.dtype)


def _run_chosen(
    experts: "MomaExperts", x_ND: torch.Tensor, expert_Nk: torch.Tensor, weight_Nk: torch.Tensor, is_sorted: bool
) -> torch.Tensor:
    """Rows through the experts that they chose: each expert's weights are read once, and no others.

    What an expert makes of its rows is small enough to stay in the caches.
    """
    num_slots = expert_Nk.shape[1]
    expert_P, rows_PD, order_P = expert_Nk.flatten(), x_ND, None
    if not is_sorted:
        expert_P, order_P = expert_P.sort()
        rows_PD = x_ND.index_select(0, order_P // num_slots)
    parts, begin = [], 0
    for expert, count in _rows_of_experts(expert_P):
        rows_KD = rows_PD[begin : begin + count]
        # expert parallelism counts those elsewhere beyond its own
        parts.append(experts._run_one(expert, rows_KD) if expert < experts.num_experts else torch.zeros_like(rows_KD))
        begin += count
    if not parts:
        return torch.zeros_like(x_ND)
    y_PD = parts[0] if len(parts) == 1 else torch.cat(parts)
    if order_P is not None:
        y_PD = torch.empty_like(y_PD).index_copy_(0, order_P, y_PD)
    y_PD.mul_(weight_Nk.reshape(-1, 1))
    return y_PD if num_slots == 1 else y_PD.unflatten(0, expert_Nk.shape).sum(1)


def _rows_of_experts(expert_P: torch.Tensor) -> list[tuple[int, int]]:
    """The experts that occur, in order, and how often each does."""
    if expert_P.numel() <= _FEW_ROWS:
        experts = expert_P.tolist()
        return [(expert, experts.count(expert)) for expert in sorted(set(experts))]
    return [(expert, count) for expert, count in enumerate(torch.bincount(expert_P).tolist()) if count]


def _run_sorted(
    experts: "MomaExperts",
    x_ND: torch.Tensor,
    expert_Nk: torch.Tensor,
    weight_Nk: torch.Tensor,
    is_sorted: bool,
    ends_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """One expert after the other, of any width; where no kernel takes it, with a wait for how many rows each has."""
    num_slots = expert_Nk.shape[1]
    expert_P, weight_P1, rows_PD, order_P = expert_Nk.flatten(), weight_Nk.reshape(-1, 1), x_ND, None
    if not is_sorted:
        expert_P, order_P = expert_P.sort()
        rows_PD, weight_P1 = x_ND.index_select(0, order_P // num_slots), weight_P1.index_select(0, order_P)
    if ends_E is None:
        experts_E = torch.arange(experts.num_experts, device=x_ND.device)
        ends_E = torch.searchsorted(expert_P, experts_E, right=True).int()
    gate_up_PF = _multiply_in_turn(rows_PD, experts.gate_up_proj, ends_E)
    y_PD = _multiply_in_turn(experts._apply_gate(gate_up_PF), experts.down_proj, ends_E)
    y_PD = y_PD * weight_P1.to(y_PD.dtype)
    if order_P is None:
        return y_PD
    y_PD = torch.zeros_like(y_PD).index_copy(0, order_P, y_PD)
    return y_PD.unflatten(0, expert_Nk.shape).sum(1).to(x_ND.dtype)


def _multiply_in_turn(x_PD: torch.Tensor, weight_EFD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    dtype = weight_EFD.dtype
    if torch.is_autocast_enabled(x_PD.device.type):
        dtype = torch.get_autocast_dtype(x_PD.device.type)
    x_PD, weight_EDF = x_PD.to(dtype), weight_EFD.to(dtype).transpose(1, 2)
    # newer than the oldest torch that is supported
    kernel = getattr(torch.nn.functional, "grouped_mm", None)
    if kernel is not None and not is_on_host(x_PD) and all(_is_aligned(size, dtype) for size in weight_EFD.shape[1:]):
        return kernel(x_PD.contiguous(), weight_EDF, offs=ends_E)
    # rows after the last end, of experts elsewhere, get zeros
    return torch.ops.transformers.grouped_mm_fallback(x_PD, weight_EDF, ends_E)


ALL_EXPERTS_FUNCTIONS.register(DEFAULT_IMPLEMENTATION, moma_experts_forward)


__all__ = ["DEFAULT_IMPLEMENTATION", "check_grouped_widths", "moma_experts_forward"]
