# SPDX-License-Identifier: Apache-2.0
"""What a training step moves in the routers, alike on all processes.

Shape suffixes:
    C cuts of a router (one for each expert, or for each pool of a depth router).
"""

import torch
import torch.distributed as dist

from .router_base_moma import MomaRouterBase
from .routing_context_moma import RoutingContext, is_distributed
from .routing_moma import MomaRouter
from .routing_rules_moma import RULES


# of the cuts of each batch, of shortfalls, and of votes
Shares = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.no_grad()
def update_routers(context: RoutingContext, bias_update_rate: float):
    """Move thresholds and balance biases after a training step, averaged over all processes in one collective.

    A process without tokens of a group has no say in that group's average.
    """
    statistics = {router: record for router, record in context.statistics.items() if not router.is_frozen}
    if not statistics:
        return
    sums = {
        router: (threshold_C * votes_C, shortfall_C * votes_C, votes_C)
        for router, (threshold_C, shortfall_C, votes_C) in statistics.items()
    }
    if is_distributed():
        sums = _sum_over_processes(sums)
    for router, (threshold_C, shortfall_C, votes_C) in sums.items():
        has_vote_C = votes_C > 0
        votes_C = votes_C.clamp(min=1)
        threshold_C, shortfall_C = threshold_C / votes_C, shortfall_C / votes_C
        # the plain mean until it has seen enough steps, so that no start value lingers
        decay = (router.num_updates / (router.num_updates + 1)).clamp(max=router.momentum)
        router.threshold.copy_(
            torch.where(has_vote_C, decay * router.threshold + (1 - decay) * threshold_C, router.threshold)
        )
        router.num_updates.add_((has_vote_C if router.num_updates.ndim else has_vote_C[0]).float())
        routing = context.routing if isinstance(router, MomaRouter) else context.depth_routing
        if RULES[routing].moves_bias:
            step_C = bias_update_rate * torch.sign(shortfall_C)
            router.balance_bias.copy_(torch.where(has_vote_C, router.balance_bias + step_C, router.balance_bias))


def _sum_over_processes(sums: dict[MomaRouterBase, Shares]) -> dict[MomaRouterBase, Shares]:
    """In one collective, whatever devices the routers are on; each gets its own back where it is."""
    device = next(iter(sums)).threshold.device
    rows = [row_C.to(device) for parts in sums.values() for row_C in parts]
    flat = torch.cat(rows)
    dist.all_reduce(flat)
    pieces = iter(flat.split([row.shape[0] for row in rows]))
    summed = {}
    for router in sums:
        threshold_C, shortfall_C, votes_C = (next(pieces).to(router.threshold.device) for _ in range(3))
        summed[router] = (threshold_C, shortfall_C, votes_C)
    return summed


__all__ = ["update_routers"]
