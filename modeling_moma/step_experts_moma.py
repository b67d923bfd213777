# SPDX-License-Identifier: Apache-2.0
"""A group's experts in a step of decoding on a CPU, in few operations.

Between two layers' weights, which leave the caches no room, what an operation takes is mostly to begin it. So the host
looks at the scores itself, and no selection is made; what comes out is that of the way through the experts interface.

Shape suffixes:
    D hidden size, N tokens of one group in the step, E experts of the group, P (token, expert) pairs.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .dispatch_moma import run_counted
from .expert_forms_moma import STEP_MEMBERS
from .onlookers_moma import is_hooked
from .routing_context_moma import RoutingContext
from .routing_moma import MomaRouter


if TYPE_CHECKING:
    from .experts_moma import MomaExperts


def runs_in_step(router: nn.Module, experts: nn.Module, context: RoutingContext) -> bool:
    """Whether [`run_step`] is the way for a group: a call of its router or its experts does nothing but their forward.

    Args:
        router (`nn.Module`): the group's.
        experts (`nn.Module`): the group's.
        context (`RoutingContext`): the routing of this forward.
    """
    if not context.is_step or context.routing not in STEP_MEMBERS:
        return False
    for module in (router, experts):
        # what wraps a class, shares experts out or watches them shows in this
        if is_hooked(module):
            return False
    return type(router) is MomaRouter and not getattr(experts, "_is_expert_parallel", False)


def run_step(router: MomaRouter, experts: "MomaExperts", x_ND: torch.Tensor, context: RoutingContext) -> torch.Tensor:
    """Outputs of a group's tokens `[N, D]`, each the sum of its experts' by their gates; zeros where it has none.

    Args:
        router (`MomaRouter`): the group's.
        experts (`MomaExperts`): the group's.
        x_ND (`torch.Tensor`): `[N, D]`.
        context (`RoutingContext`): the routing of this forward, of a rule of `STEP_MEMBERS`.
    """
    num_tokens, num_experts = x_ND.shape[0], experts.num_experts
    # as the router's own, which has to think of autocast and of training
    scores_NE = torch.sigmoid(nn.functional.linear(x_ND.float(), router.weight.float()))
    is_taken = STEP_MEMBERS[context.routing](router, x_ND, scores_NE, context).tolist()
    if num_tokens == 1:
        return _run_token(experts, x_ND, is_taken[0], scores_NE)
    counts, tokens, places = [], [], []
    for expert in range(num_experts):
        own = [token for token, taken in enumerate(is_taken) if taken[expert]]
        if own:
            counts.append((expert, len(own)))
            tokens += own
            places += [token * num_experts + expert for token in own]
    if not counts:
        return torch.zeros_like(x_ND)
    token_P, place_P = torch.tensor((tokens, places), device=x_ND.device).unbind()
    y_PD = run_counted(experts, x_ND.index_select(0, token_P), counts)
    y_PD.mul_(scores_NE.view(-1, 1).index_select(0, place_P))
    return y_PD.new_zeros(x_ND.shape).index_add_(0, token_P, y_PD)


def _run_token(
    experts: "MomaExperts", x_1D: torch.Tensor, is_taken: list[bool], scores_1E: torch.Tensor
) -> torch.Tensor:
    """One token through its experts."""
    if True not in is_taken:
        return torch.zeros_like(x_1D)
    gates = scores_1E.tolist()[0]
    parts = [
        run_counted(experts, x_1D, [(expert, 1)]).mul_(gates[expert]) for expert, taken in enumerate(is_taken) if taken
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


__all__ = ["run_step", "runs_in_step"]
