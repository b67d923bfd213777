# SPDX-License-Identifier: Apache-2.0
"""The auxiliary router: a small network that predicts, from one token alone, what a router decides from a batch."""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_moma import MomaConfig


class Fp32Buffers(nn.Module):
    """For modules whose cuts and counters `model.bfloat16()` and the like must not round."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def widen_buffers(self):
        """Give buffers back the type that `buffer_dtype` of FSDP1 has taken from them, past `_apply`.

        The values of that moment are rounded; what is added to them later is not lost.
        """
        for buffer in self._buffers.values():
            if buffer is not None and buffer.dtype != torch.float32:
                buffer.data = buffer.float()


class Fp32Linear(nn.Linear):
    """A linear layer that multiplies in fp32, whatever type its weights were given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`, in fp32 also under autocast."""
        with maybe_autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), self.weight.float())


class MomaAuxiliaryRouter(Fp32Buffers):
    """Predicts membership in a router's top K: `Sigmoid(SiLU(x W_1) W_2)` (MoMa section 2.4, equations 3 and 4).

    It decides whether an expert or a depth layer runs; with what weight is the main router's business. Its parameters
    are frozen until [`AuxiliaryRouterTrainer`] trains them, so that the main training neither moves nor misses them.
    Thresholds are compared with fp32 probabilities, which are all 1 for logits above about 17: tokens that tie there
    are taken or left together.

    State dict:
        up_proj.weight    [D // 2, D]       fp32
        down_proj.weight  [scores, D // 2]  fp32
        threshold         [cuts]            fp32, least probability to be taken: 0.5 (the paper's) until calibrated
    """

    def __init__(self, config: MomaConfig, num_scores: int, num_cuts: int):
        super().__init__()
        inner_size = config.hidden_size // 2
        self.up_proj = Fp32Linear(config.hidden_size, inner_size, bias=False, dtype=torch.float32)
        self.down_proj = Fp32Linear(inner_size, num_scores, bias=False, dtype=torch.float32)
        self.threshold = nn.Buffer(torch.full((num_cuts,), 0.5, dtype=torch.float32))
        self.requires_grad_(False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of membership, `[..., D]` to `[..., scores]`, in fp32 also under autocast."""
        # modules are called, and not their weights used, so that what gathers split weights sees the call
        return self.down_proj(nn.functional.silu(self.up_proj(hidden_states)))
