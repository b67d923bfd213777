# SPDX-License-Identifier: Apache-2.0
"""Experts of any width for the library's grouped products, whose kernels want rows of whole words.

Shape suffixes:
    P rows, D hidden size, E experts, F inner width of one expert, G = 2 * F.
"""

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .experts_in_turn_moma import are_plain


if TYPE_CHECKING:
    from .experts_moma import MomaExperts


Class = TypeVar("Class", bound=type[nn.Module])

# what grouped matrix products want whole words of, in every row, on every device
_WORD_BYTES = 16
# the implementation of the library that brings weights to them as they are
_GROUPED = "grouped_mm"


def is_whole(size: int, dtype: torch.dtype) -> bool:
    """Whether rows of so many elements are made of whole words."""
    return size * dtype.itemsize % _WORD_BYTES == 0


def takes_any_width(experts_class: Class) -> Class:
    """Let a class of the experts interface run `"grouped_mm"` at any width, which it pads for the call.

    Args:
        experts_class (`type`): with `gate_up_proj` `[E, 2 * F, D]` and `down_proj` `[E, D, F]`.
    """
    forward: Any = experts_class.forward

    @functools.wraps(forward)
    def padded_forward(self: "MomaExperts", hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.config._experts_implementation != _GROUPED or not are_plain(self.gate_up_proj, self.down_proj):
            return forward(self, hidden_states, *args, **kwargs)
        size, width = self.down_proj.shape[1:]
        dtype = self.down_proj.dtype
        if is_whole(size, dtype) and is_whole(width, dtype):
            return forward(self, hidden_states, *args, **kwargs)
        more_size, more_width = _missing(size, dtype), _missing(width, dtype)
        rows_PD = nn.functional.pad(hidden_states, (0, more_size))
        return forward(_PaddedExperts(self, more_size, more_width), rows_PD, *args, **kwargs)[:, :size]

    experts_class.forward = padded_forward
    return experts_class


class _PaddedExperts:
    """Experts with wider weights, in all else what they are; no module, so that what wraps theirs runs once."""

    def __init__(self, experts: "MomaExperts", more_size: int, more_width: int):
        self.experts = experts
        gate_EFD, up_EFD = experts.gate_up_proj.chunk(2, dim=1)
        padding = (0, more_size, 0, more_width)
        # zeros make zeros of whatever lies between them
        self.gate_up_proj = torch.cat([nn.functional.pad(part, padding) for part in (gate_EFD, up_EFD)], dim=1)
        self.down_proj = nn.functional.pad(experts.down_proj, (0, more_width, 0, more_size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


def _missing(size: int, dtype: torch.dtype) -> int:
    return -size % (_WORD_BYTES // dtype.itemsize)


__all__ = ["is_whole", "takes_any_width"]
