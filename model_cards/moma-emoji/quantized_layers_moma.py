# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Feed-forward layers whose weights were quantised: their products take whole matrices, and a row at least.

Quantised products know `linear` alone, and torchao and bitsandbytes fail on inputs without rows. A MoMa meets these in
every step: a modality that the batch lacks, an expert that no token chose.

Shape suffixes:
    N tokens of one group in the batch, D hidden size, E experts of the group, K tokens that one expert takes.
"""

import torch
from torch import nn

from .experts_moma import MomaExperts, MomaMLP


class MomaQuantizedExperts(MomaExperts):
    """Packed experts that run one after the other, on a row of zeros where they have none."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See [`MomaExperts.forward`]."""
        if top_k_index is None:
            return self._run_equal(hidden_states)
        return self.run_in_turn(hidden_states, top_k_index, top_k_weights)

    def _run_equal(self, x_EKD):
        return torch.stack([self._run_one(expert, x_KD) for expert, x_KD in enumerate(x_EKD)])

    def _run_one(self, expert, x_KD):
        # so that every rank touches every weight, and its adapter's
        if x_KD.shape[0] == 0:
            return super()._run_one(expert, x_KD.new_zeros(1, x_KD.shape[1]))[:0]
        return super()._run_one(expert, x_KD)


class MomaQuantizedMLP(MomaMLP):
    """A feed-forward network that runs on a row of zeros where it has none, so that every rank touches its weights."""

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to `[..., D]`."""
        if x_ND.shape[0]:
            return super().forward(x_ND)
        return super().forward(x_ND.new_zeros(1, *x_ND.shape[1:]))[:0]


_QUANTIZED = {MomaExperts: MomaQuantizedExperts, MomaMLP: MomaQuantizedMLP}


def use_quantized_layers(model: nn.Module):
    """Give the feed-forward layers of a quantised model the forward that quantised products need, in place.

    Weights and their names stay as they are; a second call changes nothing. [`MomaPreTrainedModel.from_pretrained`]
    calls this itself.

    Args:
        model (`nn.Module`): a MoMa that torchao or bitsandbytes has quantised.
    """
    for module in model.modules():
        if type(module) in _QUANTIZED:
            module.__class__ = _QUANTIZED[type(module)]


__all__ = ["MomaQuantizedExperts", "MomaQuantizedMLP", "use_quantized_layers"]
