# SPDX-License-Identifier: Apache-2.0
"""Experts and the groups of them: from a layer's tokens to each group's, through its experts, and back.

Shape suffixes:
    N tokens of one group in the batch, D hidden size, E experts of the group, K tokens that one expert takes,
    F inner width of one expert, P (token, expert) pairs.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_moma import MomaConfig
from .dispatch_moma import DEFAULT_IMPLEMENTATION
from .padded_experts_moma import takes_any_width
from .routing_context_moma import RoutingContext
from .routing_moma import MomaRouter
from .selection_moma import Selection
from .step_experts_moma import run_step, runs_in_step
from .step_products_moma import project


if TYPE_CHECKING:
    Class = TypeVar("Class")

    # the library's own says that it gives some module
    def use_experts_implementation(experts_class: Class) -> Class: ...
else:
    from transformers.integrations import use_experts_implementation


@takes_any_width
@use_experts_implementation
class MomaExperts(nn.Module):
    """SwiGLU experts stored as 3D tensors, called through the experts interface of Transformers.

    State dict:
        gate_up_proj  [E, 2 * F, D]
        down_proj     [E, D, F]
    """

    # quantised products fail on inputs without rows: `use_quantized_layers` sets it
    needs_rows = False
    # what the decorator adds
    config: MomaConfig
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]

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
        output = torch.zeros_like(hidden_states)
        # every expert runs, with zero rows if need be, so that every rank touches every weight
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            expert_output = self._run_one(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, expert_output.to(output.dtype))
        return output

    def _run_one(self, expert: int, x_KD: torch.Tensor) -> torch.Tensor:
        if self.needs_rows and x_KD.shape[0] == 0:
            return self._run_one(expert, x_KD.new_zeros(1, x_KD.shape[1]))[:0]
        gate_up = nn.functional.linear(x_KD, self.gate_up_proj[expert])
        return nn.functional.linear(self._apply_gate(gate_up), self.down_proj[expert])


class MomaMLP(nn.Module):
    """A SwiGLU feed-forward network: the expert of a one-expert group, or a shared expert."""

    needs_rows = False

    def __init__(self, config: MomaConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to `[..., D]`."""
        if self.needs_rows and x_ND.shape[0] == 0:
            return self(x_ND.new_zeros(1, *x_ND.shape[1:]))[:0]
        inner_NF = self.act_fn(project(self.gate_proj, x_ND)) * project(self.up_proj, x_ND)
        return project(self.down_proj, inner_NF)


class MomaExpertGroup(nn.Module):
    """The experts of one modality, or of all (MoMa section 2.2, equation 1).

    Tokens may be taken by several experts or by none; those that none took get zeros, and the residual stream
    carries them.

    State dict:
        router.weight, .threshold, ...   see [`MomaRouter`]; absent with one expert
        experts.gate_up_proj, .down_proj see [`MomaExperts`]; with one expert `mlp.{gate,up,down}_proj.weight`
        shared_expert.{gate,up,down}_proj.weight, when configured
    """

    def __init__(self, config: MomaConfig, group: str):
        super().__init__()
        self.config = config
        self.num_experts = config.group_num_experts(group)
        self.normalizes_gates, self.needs_gate = config.normalize_gates, config.gate_after_norm
        # whose gates are the scores, and which nobody wants to know
        self.takes_steps = not self.normalizes_gates and not self.needs_gate
        if self.num_experts == 1:
            self.mlp = MomaMLP(config, config.group_intermediate_size(group))
        else:
            self.router = MomaRouter(config, group)
            self.experts = MomaExperts(config, group)
        shared_size = config.group_shared_intermediate_size(group)
        self.shared_expert = MomaMLP(config, shared_size) if shared_size else None

    def forward(self, x_ND: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the group, also on zero tokens: its weights take part in every step on every rank.

        Args:
            x_ND (`torch.Tensor`): the group's tokens, `[N, D]`.
            context (`RoutingContext`): the routing of this forward.

        Returns:
            `tuple`: outputs `[N, D]`, and with `gate_after_norm` each token's sum of gates `[N]` (a shared expert
            counts 1).
        """
        num_tokens, selection = x_ND.shape[0], None
        if self.num_experts == 1:
            y_ND = self.mlp(x_ND)
        elif (
            self.takes_steps and type(self.experts) is MomaExperts and runs_in_step(self.router, self.experts, context)
        ):
            y_ND = run_step(self.router, self.experts, x_ND, context)
        else:
            # experts that a server has put in their place know of no pairs without a token
            is_ours = isinstance(self.experts, MomaExperts)
            _, selection = self.router(x_ND, context if is_ours else context.with_waits())
            if self.normalizes_gates:
                selection = selection.normalized(num_tokens)
            y_ND = selection.combine(self._run_experts(selection.dispatch(x_ND), selection), num_tokens)
        if self.shared_expert is not None:
            y_ND = y_ND + self.shared_expert(x_ND)
        if not self.needs_gate:
            return y_ND, None
        gate_N = x_ND.new_ones(num_tokens, dtype=torch.float32) if selection is None else selection.gates(num_tokens)
        return y_ND, gate_N if self.shared_expert is None else gate_N + 1

    def _run_experts(self, rows_PD: torch.Tensor, selection: Selection) -> torch.Tensor:
        """Weighted outputs of all pairs, by the implementation that the model is set to."""
        hints = {}
        # expert parallelism brings experts other rows than these, in shares that nobody knows
        is_parallel = getattr(self.experts, "_is_expert_parallel", False)
        takes_hints = self.config._experts_implementation == DEFAULT_IMPLEMENTATION and not is_parallel
        if takes_hints and selection.shape_EK is not None:
            hints["num_taken"] = selection.shape_EK[1]
        elif takes_hints and isinstance(self.experts, MomaExperts):
            hints.update(is_sorted=selection.is_sorted, ends_E=selection.ends_E)
        return self.experts(rows_PD, selection.expert_P.unsqueeze(-1), selection.weight_P.unsqueeze(-1), **hints)


class MomaFeedForward(nn.Module):
    """Feed-forward layer with one expert group per modality, and optionally an expert that all tokens share.

    State dict:
        groups.{text,image,...}.   see [`MomaExpertGroup`]; one group named "all" when modalities share it
        shared_expert.             see [`MomaMLP`]; when configured
    """

    # also without a token: set while somebody observes the routers
    runs_all_groups = False

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
        runs_all = context.runs_all_groups or self.runs_all_groups
        names = list(self.groups) if runs_all else context.split.used_groups
        if len(names) == 1 and context.split.is_whole:
            y_ND, gate_N = self.groups[names[0]](hidden_states.flatten(0, 1), context)
            merged = y_ND.view(hidden_states.shape)
            gate = None if gate_N is None else gate_N.view(*hidden_states.shape[:2], 1).to(merged.dtype)
            return self._with_shared(hidden_states, merged, gate)
        tokens = context.split.split(hidden_states)
        # a chunk of padding alone has no tokens in any group
        names = names or list(self.groups)
        outputs = {name: self.groups[name](tokens[name], context) for name in names}
        merged = context.split.merge({name: output[0] for name, output in outputs.items()}, hidden_states)
        gate = None
        if self.needs_gate:
            gates = {name: output[1] for name, output in outputs.items()}
            gate = context.split.merge(gates, hidden_states)  # pyright: ignore[reportArgumentType]
            gate = gate.unsqueeze(-1).to(merged.dtype)
        return self._with_shared(hidden_states, merged, gate)

    def _with_shared(
        self, hidden_BTD: torch.Tensor, merged_BTD: torch.Tensor, gate_BT1: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.shared_expert is None:
            return merged_BTD, gate_BT1
        return merged_BTD + self.shared_expert(hidden_BTD), None if gate_BT1 is None else gate_BT1 + 1
