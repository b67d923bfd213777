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
"""Running the chosen tokens through packed expert weights, and adding the results back.

Shape suffixes:
    N tokens of one group in the batch, D hidden size, E experts of the group, K tokens that one expert takes,
    F inner width of one expert, P (token, expert) pairs.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_moma import MomaConfig
from .routing_context_moma import RoutingContext
from .routing_moma import ExpertSelection, GateSelection, MomaRouter


# grouped matrix products want rows of whole 16-byte words: eight elements of bf16
_ALIGNMENT = 8


@use_experts_implementation
class MomaPackedExperts(nn.Module):
    """SwiGLU experts stored as 3D tensors, called through the experts interface of Transformers.

    State dict:
        gate_up_proj  [E, 2 * F, D]
        down_proj     [E, D, F]
    """

    def __init__(self, config: MomaConfig, group: str):
        super().__init__()
        self.num_experts = config.group_num_experts(group)
        width = config.group_intermediate_size(group)
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run each token through its experts, one expert after the other (the "eager" implementation).

        Args:
            hidden_states (`torch.Tensor`): `[N, D]`.
            top_k_index (`torch.LongTensor`): experts of each token, `[N, k]`.
            top_k_weights (`torch.Tensor`): gates, `[N, k]`.

        Returns:
            `torch.Tensor`: weighted sums, `[N, D]`.
        """
        return self.run_in_turn(hidden_states, top_k_index, top_k_weights)

    def run_in_turn(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The "eager" implementation itself, whichever the model is set to; see [`MomaPackedExperts.forward`]."""
        output = torch.zeros_like(hidden_states)
        # every expert runs, with zero rows if need be, so that every rank touches every weight
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            expert_output = self._run_one(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, expert_output.to(output.dtype))
        return output

    def _run_one(self, expert, x_KD):
        gate_up = nn.functional.linear(x_KD, self.gate_up_proj[expert])
        return nn.functional.linear(self._apply_gate(gate_up), self.down_proj[expert])


class _PaddedExperts:
    """Experts with wider weights, in all else what they are. Not a module, so nothing that wraps theirs runs twice."""

    def __init__(self, experts: "MomaExperts", gate_up_proj: torch.Tensor, down_proj: torch.Tensor):
        self.experts, self.gate_up_proj, self.down_proj = experts, gate_up_proj, down_proj

    def __getattr__(self, name: str):
        return getattr(self.experts, name)


class MomaExperts(MomaPackedExperts):
    """Packed experts that run at any inner width and, when all take the same number of tokens, as two products."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See [`MomaPackedExperts.forward`]; widths that grouped products refuse are padded for the call.

        Without `top_k_index` and `top_k_weights`, `hidden_states` are the `K` tokens of each expert, `[E, K, D]`, and
        so are the outputs, unweighted.
        """
        if top_k_index is None:
            return self._run_equal(hidden_states)
        padding = -self.down_proj.shape[-1] % _ALIGNMENT
        if padding and self.config._experts_implementation not in ("eager", "batched_mm"):
            gate_EFD, up_EFD = self.gate_up_proj.chunk(2, dim=1)
            pad_rows = (0, 0, 0, padding)
            gate_up_proj = torch.cat([nn.functional.pad(part, pad_rows) for part in (gate_EFD, up_EFD)], dim=1)
            padded = _PaddedExperts(self, gate_up_proj, nn.functional.pad(self.down_proj, (0, padding)))
            return MomaPackedExperts.forward(padded, hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _run_equal(self, x_EKD):
        # weights on the left: the products then read them row by row, and stay transposed in between
        gate_EFK, up_EFK = torch.bmm(self.gate_up_proj, x_EKD.transpose(1, 2)).chunk(2, dim=1)
        return torch.bmm(self.down_proj, self.act_fn(gate_EFK) * up_EFK).transpose(1, 2)


class MomaMLP(nn.Module):
    """A SwiGLU feed-forward network: the expert of a one-expert group, or a shared expert."""

    def __init__(self, config: MomaConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.down_proj(self.act_fn(self.gate_proj(x_ND)) * self.up_proj(x_ND))


class MomaExpertGroup(nn.Module):
    """The experts of one modality, or of all (MoMa section 2.2, equation 1).

    Tokens may be taken by several experts or by none; those that none took get zeros, and the residual stream
    carries them.

    State dict:
        router.weight, .threshold, ...   see [`MomaRouter`]; absent with one expert
        experts.gate_up_proj, .down_proj see [`MomaPackedExperts`]; with one expert `mlp.{gate,up,down}_proj.weight`
        shared_expert.{gate,up,down}_proj.weight, when configured
    """

    def __init__(self, config: MomaConfig, group: str):
        super().__init__()
        self.num_experts = config.group_num_experts(group)
        self.normalizes_gates = config.normalize_gates
        if self.num_experts == 1:
            self.mlp = MomaMLP(config, config.group_intermediate_size(group))
        else:
            self.router = MomaRouter(config, group)
            self.experts = MomaExperts(config, group)
        shared_size = config.group_shared_intermediate_size(group)
        self.shared_expert = MomaMLP(config, shared_size) if shared_size else None

    def forward(self, x_ND: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the group, also on zero tokens: its weights take part in every step on every rank.

        Args:
            x_ND (`torch.Tensor`): the group's tokens, `[N, D]`.
            context (`RoutingContext`): the routing of this forward.

        Returns:
            `tuple`: outputs `[N, D]`, and each token's sum of gates `[N]` (a shared expert counts 1).
        """
        gate_N = x_ND.new_zeros(x_ND.shape[0], dtype=torch.float32)
        if self.num_experts == 1:
            y_ND, gate_N = self.mlp(x_ND), gate_N + 1
        else:
            _, selection = self.router(x_ND, context)
            y_ND, gate_N = self._run(x_ND, selection, gate_N)
        if self.shared_expert is not None:
            y_ND, gate_N = y_ND + self.shared_expert(x_ND), gate_N + 1
        return y_ND, gate_N

    def _run(self, x_ND, selection, gate_N):
        if isinstance(selection, GateSelection):
            return self._run_all(x_ND, selection.weight_NE)
        is_equal = isinstance(selection, ExpertSelection)
        token_P = selection.token_EK.flatten() if is_equal else selection.token_P
        weight_P = selection.weight_EK.flatten() if is_equal else selection.weight_P
        if self.normalizes_gates:
            total_N = gate_N.index_add(0, token_P, weight_P.detach())
            weight_P = weight_P / total_N.index_select(0, token_P).clamp(min=torch.finfo(total_N.dtype).tiny)
        rows_PD = x_ND.index_select(0, token_P)
        if is_equal and not _take_rows_by_id(self.experts):
            y_EKD = self.experts(rows_PD.unflatten(0, selection.token_EK.shape))
            y_PD = y_EKD.flatten(0, 1) * weight_P.unsqueeze(-1).to(y_EKD.dtype)
        else:
            expert_P = _expert_of_pairs(selection) if is_equal else selection.expert_P
            y_PD = self.experts(rows_PD, expert_P.unsqueeze(-1), weight_P.unsqueeze(-1))
        y_ND = y_PD.new_zeros(x_ND.shape).index_add(0, token_P, y_PD)
        return y_ND, gate_N.index_add(0, token_P, weight_P)

    def _run_all(self, x_ND, weight_NE):
        """Every expert on every token, also where its gate is 0."""
        if self.normalizes_gates:
            total_N1 = weight_NE.detach().sum(-1, keepdim=True)
            weight_NE = weight_NE / total_N1.clamp(min=torch.finfo(total_N1.dtype).tiny)
        gate_N = weight_NE.sum(-1)
        if _take_rows_by_id(self.experts):
            expert_NE = torch.arange(self.num_experts, device=x_ND.device).expand_as(weight_NE)
            return self.experts(x_ND, expert_NE, weight_NE), gate_N
        y_END = self.experts(x_ND.expand(self.num_experts, -1, -1))
        weight_EN1 = weight_NE.t().unsqueeze(-1)
        # an expert that nobody chose may overflow in half precision, and infinity times 0 is no number
        y_END = torch.where(weight_EN1 > 0, y_END * weight_EN1, 0.0)
        return y_END.sum(0).to(x_ND.dtype), gate_N


def _take_rows_by_id(experts):
    """Whether tensor or expert parallelism has split the experts, maybe under an adapter: it then brings them rows."""
    return getattr(experts, "_is_hooked", False)


def _expert_of_pairs(selection):
    num_experts, num_taken = selection.token_EK.shape
    return torch.arange(num_experts, device=selection.token_EK.device).repeat_interleave(num_taken)


class MomaFeedForward(nn.Module):
    """Feed-forward layer with one expert group per modality, and optionally an expert that all tokens share.

    State dict:
        groups.{text,image,...}.   see [`MomaExpertGroup`]; one group named "all" when modalities share it
        shared_expert.             see [`MomaMLP`]; when configured
    """

    def __init__(self, config: MomaConfig):
        super().__init__()
        self.groups = nn.ModuleDict({group: MomaExpertGroup(config, group) for group in config.expert_groups})
        shared_size = config.common_shared_intermediate_size
        self.shared_expert = MomaMLP(config, shared_size) if shared_size else None
        self.needs_gate = config.gate_after_norm

    def forward(
        self, hidden_states: torch.Tensor, context: RoutingContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Send each token through its modality's group.

        Args:
            hidden_states (`torch.Tensor`): `[B, T, D]`.
            context (`RoutingContext`): the routing of this forward.

        Returns:
            `tuple`: outputs `[B, T, D]`, and with `gate_after_norm` the sum of each token's gates `[B, T, 1]`.
        """
        tokens = context.split.split(hidden_states)
        outputs = {name: group(tokens[name], context) for name, group in self.groups.items()}
        merged = context.split.merge({name: output[0] for name, output in outputs.items()}, hidden_states)
        gate = None
        if self.needs_gate:
            gate = context.split.merge({name: output[1] for name, output in outputs.items()}, hidden_states)
            gate = gate.unsqueeze(-1).to(merged.dtype)
        if self.shared_expert is not None:
            merged = merged + self.shared_expert(hidden_states)
            gate = gate + 1 if gate is not None else None
        return merged, gate
