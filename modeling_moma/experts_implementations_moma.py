# SPDX-License-Identifier: Apache-2.0
"""How packed experts multiply: implementations for the experts interface of Transformers, by name.

`model.set_experts_implementation(name)` picks one of these, of Transformers' own or of a caller's, for every mode and
every rule. A model starts with `"moma"`.

Shape suffixes:
    D hidden size, E experts of the group, K tokens that one expert takes, F inner width of one expert, W = 2 * F,
    P (token, expert) pairs.
"""

import functools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from .configuration_moma import MomaConfig
from .devices_moma import are_plain, is_on_cpu, matmul_dtype
from .token_groups_moma import DispatchLayout, is_distributed


DEFAULT_IMPLEMENTATION = "moma"


def moma_experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_taken: int | None = None,
    is_sorted: bool = False,
    ends_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run equal shares as two batched matmuls, others expert by expert on a CPU and as grouped matmuls elsewhere.

    On a CPU equal shares run expert by expert, too, where autocast would cast the weights.
    """
    on_cpu = is_on_cpu(hidden_states) and not torch.compiler.is_compiling()
    runs_sequentially = on_cpu and _runs_sequentially(self)
    if num_taken is not None:
        # under autocast, running one expert after the other spares a cast copy of all weights kept for the backward
        if not runs_sequentially or matmul_dtype(self.down_proj) == self.down_proj.dtype:
            return _run_equal_shares(self, hidden_states, top_k_weights, num_taken)
        is_sorted = True
    if runs_sequentially and ends_E is None:
        return _run_in_order(self, hidden_states, top_k_index, top_k_weights, is_sorted, _run_sequentially)
    if ends_E is not None:
        if torch.is_grad_enabled():
            hidden_states = _without_rest(hidden_states, ends_E)
        run = partial(_grouped, ends_E=ends_E)
        return _run_in_order(self, hidden_states, top_k_index, top_k_weights, True, run)
    # the size is compared last, so that a compiler with dynamic shapes in training does not specialise on it
    may_step = not is_on_cpu(hidden_states) and not torch.is_grad_enabled()
    if may_step and top_k_index.numel() <= self.num_experts:
        return batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    has_kernel = _has_kernel(matmul_dtype(self.down_proj), self.down_proj.shape[1:])
    # one device sync for all experts, where each matmul would have its own
    if not has_kernel and not torch.compiler.is_compiling() and _runs_sequentially(self):
        return _run_in_order(self, hidden_states, top_k_index, top_k_weights, is_sorted, _run_sequentially)
    # the library's implementation gathers and scatters by indexing and ignores autocast; it knows expert parallelism
    if on_cpu or is_sorted or not has_kernel:
        return _run_in_order(self, hidden_states, top_k_index, top_k_weights, is_sorted, _grouped)
    return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def _without_rest(x_PD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Return rows with zeros after the last end: kernels leave these rows of a gradient as memory was."""
    is_used_P = torch.arange(x_PD.shape[0], device=x_PD.device) < ends_E[-1]
    return torch.where(is_used_P.unsqueeze(-1), x_PD, 0.0)


def _has_kernel(dtype: torch.dtype, sizes: Iterable[int]) -> bool:
    """Return whether a device multiplies rows of these sizes by groups; torch does it one by one elsewhere."""
    return dtype == torch.bfloat16 and all(is_whole(size, dtype) for size in sizes)


def _runs_sequentially(experts: Any) -> bool:
    """Return whether each expert can run by itself: without gradients any, with them those of plain weights."""
    return not torch.is_grad_enabled() or are_plain(experts.gate_up_proj, experts.down_proj)


def _run_sequentially(experts: Any, rows_PD: torch.Tensor, expert_P: torch.Tensor) -> torch.Tensor:
    from .cpu_moma import run_sequentially

    return run_sequentially(experts, rows_PD, expert_P, _has_backward(experts))


def _has_backward(experts: Any) -> bool:
    """Return whether packed experts run as where gradients are wanted, also under checkpointing."""
    # reentrant checkpointing has no gradients in the first of two forwards that have to agree
    return torch.is_grad_enabled() or (experts.training and are_plain(experts.gate_up_proj, experts.down_proj))


def _run_equal_shares(experts: Any, x_PD: torch.Tensor, weight_P1: torch.Tensor, num_taken: int) -> torch.Tensor:
    # weights on the left, so that matmuls read them row by row; activations stay transposed between the two
    x_EDK = x_PD.unflatten(0, (experts.num_experts, num_taken)).transpose(1, 2)
    gate_EFK, up_EFK = torch.bmm(experts.gate_up_proj, x_EDK).chunk(2, dim=1)
    y_EDK = torch.bmm(experts.down_proj, experts.act_fn(gate_EFK) * up_EFK)
    return y_EDK.transpose(1, 2).flatten(0, 1) * weight_P1.to(y_EDK.dtype)


def _run_in_order(
    experts: Any,
    x_ND: torch.Tensor,
    expert_Nk: torch.Tensor,
    weight_Nk: torch.Tensor,
    is_sorted: bool,
    run: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Bring the pairs expert by expert, let `run` make outputs of their rows and experts, and bring those back."""
    expert_P, weight_P1, rows_PD, order_P = expert_Nk.flatten(), weight_Nk, x_ND, None
    if not is_sorted:
        expert_P, order_P = expert_P.sort()
        rows_PD = x_ND.index_select(0, order_P // expert_Nk.shape[1])
        weight_P1 = weight_Nk.reshape(-1, 1).index_select(0, order_P)
    y_PD = run(experts, rows_PD, expert_P)
    if run is _run_sequentially and not _has_backward(experts):
        # in place, as no backward needs the input
        y_PD.mul_(weight_P1)
    else:
        y_PD = y_PD * weight_P1.to(y_PD.dtype)
    if order_P is None:
        return y_PD
    y_PD = torch.zeros_like(y_PD).index_copy(0, order_P, y_PD)
    return y_PD.unflatten(0, expert_Nk.shape).sum(1).to(x_ND.dtype)


def _grouped(
    experts: Any, rows_PD: torch.Tensor, expert_P: torch.Tensor, ends_E: torch.Tensor | None = None
) -> torch.Tensor:
    """Run grouped matmuls, of any width; where no kernel takes it, with a device sync for the rows of each expert."""
    if ends_E is None:
        experts_E = torch.arange(experts.num_experts, device=rows_PD.device)
        ends_E = torch.searchsorted(expert_P, experts_E, right=True, out_int32=True)
    gate_up_PF = _grouped_mm(rows_PD, experts.gate_up_proj, ends_E)
    return _grouped_mm(experts._apply_gate(gate_up_PF), experts.down_proj, ends_E)


def _grouped_mm(x_PD: torch.Tensor, weight_EFD: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    dtype = matmul_dtype(weight_EFD)
    x_PD, weight_EDF = x_PD.to(dtype), weight_EFD.to(dtype).transpose(1, 2)
    if not is_on_cpu(x_PD) and all(is_whole(size, dtype) for size in weight_EFD.shape[1:]):
        return nn.functional.grouped_mm(x_PD.contiguous(), weight_EDF, offs=ends_E)
    # rows after the last end belong to experts on other processes, and get zeros
    return torch.ops.transformers.grouped_mm_fallback(x_PD, weight_EDF, ends_E)


# this implementation uses `Selection.hints`, and slices weights, which quantised ones do not allow
moma_experts_forward.takes_hints = True
moma_experts_forward.takes_quantized = False
ALL_EXPERTS_FUNCTIONS.register(DEFAULT_IMPLEMENTATION, moma_experts_forward)


def takes_hints(config: MomaConfig) -> bool:
    """Return whether a model's experts implementation makes use of what [`Selection.hints`] says of the pairs."""
    return getattr(_implementation(config), "takes_hints", False)


def takes_quantized(config: MomaConfig) -> bool:
    """Return whether a model's experts implementation takes quantised weights; one that does not say takes them."""
    return getattr(_implementation(config), "takes_quantized", True)


# memory that padding rows of a fixed layout may take in a backward of the whole model
_AFFORDABLE_BYTES = 2**28
# so few tokens that running every expert on all of them takes no longer than reading the weights
_FEW_TOKENS = 64


def choose_dispatch_layout(config: MomaConfig, input_ids: torch.Tensor | None, states: torch.Tensor) -> DispatchLayout:
    """Return in what form selections have their pairs: without a device sync where that costs little.

    A row for each pair of token and expert costs memory in a backward, and time with implementations that run it.
    """
    takes_all_pairs = takes_hints(config) and not torch.compiler.is_compiling()
    # with offloading, weights are on another device than the inputs, so the inputs decide
    inputs = states if input_ids is None else input_ids
    if is_on_cpu(inputs) or is_distributed() or not takes_all_pairs:
        return DispatchLayout.RAGGED
    num_tokens = inputs.shape[:2].numel()
    dtype = matmul_dtype(states)
    widths = [config.group_intermediate_size(group) for group in config.expert_groups]
    form = DispatchLayout.SORTED if _has_kernel(dtype, (config.hidden_size, *widths)) else DispatchLayout.PADDED
    if not torch.is_grad_enabled():
        return form if form is DispatchLayout.SORTED or num_tokens <= _FEW_TOKENS else DispatchLayout.RAGGED
    most_experts = max(config.group_num_experts(group) for group in config.expert_groups)
    row_size = 2 * config.hidden_size + 3 * max(widths)
    num_bytes = num_tokens * most_experts * row_size * dtype.itemsize * config.num_hidden_layers
    return form if num_bytes <= _AFFORDABLE_BYTES else DispatchLayout.RAGGED


def _implementation(config: MomaConfig) -> Any:
    return ALL_EXPERTS_FUNCTIONS.get(config._experts_implementation)


Class = TypeVar("Class", bound=type[nn.Module])

# the library's implementation that needs no weights copied or transposed
_GROUPED = "grouped_mm"
# grouped matmuls need rows of a multiple of so many bytes
_WORD_BYTES = 16


def is_whole(size: int, dtype: torch.dtype) -> bool:
    """Return whether rows of so many elements are multiples of [`_WORD_BYTES`]."""
    return size * dtype.itemsize % _WORD_BYTES == 0


def takes_any_width(experts_class: Class) -> Class:
    """Let a class of the experts interface run `"grouped_mm"` at any width, which it pads for the call."""
    forward: Any = experts_class.forward

    @functools.wraps(forward)
    def padded_forward(self: Any, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.config._experts_implementation != _GROUPED:
            return forward(self, hidden_states, *args, **kwargs)
        size, width = self.down_proj.shape[1:]
        dtype = self.down_proj.dtype
        is_aligned = is_whole(size, dtype) and is_whole(width, dtype)
        if is_aligned or not are_plain(self.gate_up_proj, self.down_proj):
            return forward(self, hidden_states, *args, **kwargs)
        more_size, more_width = _missing(size, dtype), _missing(width, dtype)
        rows_PD = nn.functional.pad(hidden_states, (0, more_size))
        return forward(_PaddedExperts(self, more_size, more_width), rows_PD, *args, **kwargs)[:, :size]

    experts_class.forward = padded_forward
    return experts_class


def _missing(size: int, dtype: torch.dtype) -> int:
    return -size % (_WORD_BYTES // dtype.itemsize)


class _PaddedExperts:
    """Experts with wider weights, in all else what they are; no module, so that what wraps theirs runs once."""

    def __init__(self, experts: Any, more_size: int, more_width: int):
        self.experts = experts
        gate_EFD, up_EFD = experts.gate_up_proj.chunk(2, dim=1)
        padding = (0, more_size, 0, more_width)
        # inner units with zero weights give zeros
        self.gate_up_proj = torch.cat([nn.functional.pad(part, padding) for part in (gate_EFD, up_EFD)], dim=1)
        self.down_proj = nn.functional.pad(experts.down_proj, (0, more_width, 0, more_size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)
