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
"""Who goes where: routers that answer with a selection and its weights, and what a training step moves in them.

Shape suffixes:
    D hidden size, N tokens of one group in the batch, E experts of the group, K tokens that one expert takes,
    P (token, expert) pairs, C cuts of a router (one for each expert, or for each pool of a depth router).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils.generic import maybe_autocast

from .auxiliary_moma import Fp32Buffers, MomaAuxiliaryRouter
from .capacity_moma import ceil_share, exact_share
from .configuration_moma import MomaConfig
from .routing_context_moma import RoutingContext, is_distributed
from .routing_rules_moma import RULES, rule_of
from .selection_moma import Selection


# how experts choose, by the name of a rule of `RULES`
EXPERT_FORMS: dict[str, Callable] = {}


class MomaRouterBase(Fp32Buffers, nn.Module):
    """Sigmoid scores, and the state that lets a router choose without looking at other tokens.

    A score is the sigmoid of a projection, so it depends on its token alone. Everything is fp32: bf16 sigmoids tie,
    and a tie changes who is chosen.
    """

    def __init__(
        self, config: MomaConfig, num_scores: int, num_cuts: int, momentum: float, updates_shape: tuple[int, ...] = ()
    ):
        super().__init__()
        self.momentum = momentum
        self.warmup_steps = config.routing_warmup_steps
        self.weight = nn.Parameter(torch.empty(num_scores, config.hidden_size, dtype=torch.float32))
        # an untrained router scores about 0.5
        self.threshold = nn.Buffer(torch.full((num_cuts,), 0.5, dtype=torch.float32))
        self.balance_bias = nn.Buffer(torch.zeros(num_cuts, dtype=torch.float32))
        self.num_updates = nn.Buffer(torch.zeros(updates_shape, dtype=torch.float32))
        self.auxiliary = MomaAuxiliaryRouter(config, num_scores, num_cuts) if config.auxiliary_routers else None

    @property
    def is_frozen(self) -> bool:
        """Whether the router is as it will be: in a frozen group, or of a model under an adapter.

        It then keeps its cuts, so that the model stays as it was saved, and has neither noise nor warm-up.
        """
        return not self.weight.requires_grad

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to `[..., scores]`, in fp32 also under autocast."""
        for module in (self, *self.children()):
            module.widen_buffers()
        with maybe_autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float())

    def predicted_scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Probabilities of membership by the auxiliary router, `[..., D]` to `[..., scores]`.

        Raises:
            ValueError: the model has no auxiliary routers.
        """
        if self.auxiliary is None:
            raise ValueError(
                "`routing` or `depth_routing` = 'auxiliary' needs a model with config.auxiliary_routers=True; "
                "`moma train-auxiliary-routers` adds and trains them."
            )
        return torch.sigmoid(self.auxiliary(hidden_states))


class MomaRouter(MomaRouterBase):
    """Scores of a group's tokens for its experts (MoMa equation 1), and the choice between them.

    State dict:
        weight           [E, D]  fp32
        threshold        [E]     fp32, running mean of each expert's K-th best score
        balance_bias     [E]     fp32, added to the scores when `token_choice` selects
        num_updates      []      fp32, training steps that the running mean has seen
        auxiliary.       see [`MomaAuxiliaryRouter`], with `config.auxiliary_routers`
    """

    def __init__(self, config: MomaConfig, group: str):
        num_experts = config.group_num_experts(group)
        super().__init__(config, num_scores=num_experts, num_cuts=num_experts, momentum=config.threshold_momentum)
        self.num_experts = num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.capacity_factor = config.group_capacity_factor(group)
        self.taken_share = exact_share(self.capacity_factor, num_experts)
        self.gumbel_noise, self.gumbel_noise_steps = config.gumbel_noise, config.gumbel_noise_steps

    def forward(self, x_ND: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, Selection]:
        """Score the tokens and select.

        Args:
            x_ND (`torch.Tensor`): the group's tokens, `[N, D]`, padding excluded: it must not compete.
            context (`RoutingContext`): the routing of this forward.

        Returns:
            `tuple`: router logits `[N, E]` in fp32, without noise, and the selection.
        """
        logits_NE = self.logits(x_ND)
        noisy_NE = logits_NE
        rule = rule_of(context.routing)
        is_noisy = self.training and not self.is_frozen and self.gumbel_noise > 0 and rule.takes_noise
        if is_noisy:
            noisy_NE = logits_NE + self._noise_scale(context) * context.router_noise(self, logits_NE)
        selection = EXPERT_FORMS[rule.name](self, x_ND, torch.sigmoid(noisy_NE), context)
        if context.track:
            context.record(self, *self._statistics(logits_NE.detach(), selection, is_noisy))
        return logits_NE, selection

    def capacity(self, num_tokens: int) -> int:
        """Tokens `K = ceil(c * N / E)` that one expert takes from `num_tokens`."""
        return min(num_tokens, ceil_share(self.taken_share, num_tokens))

    def _noise_scale(self, context):
        if self.gumbel_noise_steps is None:
            return self.gumbel_noise
        steps_left = self.gumbel_noise_steps - context.router_state(self).num_updates
        return self.gumbel_noise * (steps_left / self.gumbel_noise_steps).clamp(min=0)

    def _statistics(self, logits_NE, selection, is_noisy):
        num_tokens = logits_NE.shape[0]
        if num_tokens == 0:
            zeros_E = logits_NE.new_zeros(self.num_experts)
            return zeros_E, zeros_E, zeros_E
        is_by_rank = selection.shape_EK is not None
        if is_by_rank and not is_noisy:
            kth_E = selection.weight_EK[:, -1].detach()
        else:
            # inference cuts scores without noise
            kth_E = torch.sigmoid(logits_NE).t().topk(self.capacity(num_tokens), dim=-1).values[:, -1]
        if is_by_rank:
            load_E = torch.full_like(kth_E, selection.shape_EK[1])
        else:
            load_E = nn.functional.one_hot(selection.expert_P, self.num_experts).sum(0).float()
        return kth_E, (load_E.mean() - load_E) / num_tokens, torch.ones_like(kth_E)


def expert_form(name: str) -> Callable:
    """Let a function choose for experts under a rule of `RULES`.

    It is called with the router, its tokens `[N, D]`, their scores `[N, E]` and the context, and gives a
    [`Selection`].
    """

    def keep(function):
        EXPERT_FORMS[rule_of(name).name] = function
        return function

    return keep


@expert_form("expert_choice")
def expert_choice(
    router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext
) -> Selection:
    """Each expert takes its top `K` tokens of the batch (MoMa section 2.2). Not causal: for training."""
    weight_EK, token_EK = scores_NE.t().topk(router.capacity(scores_NE.shape[0]), dim=-1)
    return Selection.of_equal_shares(token_EK, weight_EK)


@expert_form("threshold")
def threshold(router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext) -> Selection:
    """An expert takes a token iff its score reaches the running mean of the expert's K-th best score.

    In the first `routing_warmup_steps` of training it takes its K best tokens of the batch instead.
    """
    state = context.router_state(router)
    is_taken_NE = scores_NE >= state.threshold
    if context.track and router.warmup_steps and not router.is_frozen:
        token_EK = expert_choice(router, x_ND, scores_NE.detach(), context).token_EK
        is_best_EN = torch.zeros_like(is_taken_NE.t()).scatter_(1, token_EK, True)
        is_taken_NE = torch.where(state.num_updates < router.warmup_steps, is_best_EN.t(), is_taken_NE)
    return Selection.of_members(is_taken_NE, scores_NE, context.has_fixed_shapes)


@expert_form("token_choice")
def token_choice(
    router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext
) -> Selection:
    """Each token takes its best experts; the balance bias selects but does not weigh (arXiv 2408.15664)."""
    bias_E = context.router_state(router).balance_bias
    expert_Nk = (scores_NE + bias_E).topk(router.num_experts_per_tok, dim=-1).indices
    if context.has_fixed_shapes:
        is_taken_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(1, expert_Nk, True)
        return Selection.of_members(is_taken_NE, scores_NE, has_fixed_shapes=True)
    token_N = torch.arange(scores_NE.shape[0], device=scores_NE.device)
    token_P = token_N.repeat_interleave(router.num_experts_per_tok)
    return Selection(token_P, expert_Nk.flatten(), scores_NE.gather(1, expert_Nk).flatten())


@expert_form("auxiliary")
def auxiliary(router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext) -> Selection:
    """An expert takes a token iff the auxiliary router predicts so; the weight is the main router's (section 2.4)."""
    is_taken_NE = router.predicted_scores(x_ND) >= router.auxiliary.threshold
    return Selection.of_members(is_taken_NE, scores_NE, context.has_fixed_shapes)


@torch.no_grad()
def update_routers(context: RoutingContext, bias_update_rate: float):
    """Move thresholds and balance biases after a training step, averaged over all processes in one collective.

    A process without tokens of a group has no say in that group's average.
    """
    statistics = {router: record for router, record in context.statistics.items() if not router.is_frozen}
    if not statistics:
        return
    sums = {
        router: (kth_C * votes_C, shortfall_C * votes_C, votes_C)
        for router, (kth_C, shortfall_C, votes_C) in statistics.items()
    }
    if is_distributed():
        sums = _sum_over_processes(sums)
    for router, (kth_C, shortfall_C, votes_C) in sums.items():
        has_vote_C = votes_C > 0
        votes_C = votes_C.clamp(min=1)
        kth_C, shortfall_C = kth_C / votes_C, shortfall_C / votes_C
        # the plain mean until it has seen enough steps, so that no start value lingers
        decay = (router.num_updates / (router.num_updates + 1)).clamp(max=router.momentum)
        router.threshold.copy_(
            torch.where(has_vote_C, decay * router.threshold + (1 - decay) * kth_C, router.threshold)
        )
        router.num_updates.add_((has_vote_C if router.num_updates.ndim else has_vote_C[0]).float())
        routing = context.routing if isinstance(router, MomaRouter) else context.depth_routing
        if RULES[routing].moves_bias:
            step_C = bias_update_rate * torch.sign(shortfall_C)
            router.balance_bias.copy_(torch.where(has_vote_C, router.balance_bias + step_C, router.balance_bias))


def _sum_over_processes(sums):
    """In one collective, whatever devices the routers are on; each gets its own back where it is."""
    device = next(iter(sums)).threshold.device
    rows = [row_C.to(device) for parts in sums.values() for row_C in parts]
    flat = torch.cat(rows)
    dist.all_reduce(flat)
    pieces = (piece for piece in flat.split([row.shape[0] for row in rows]))
    return {router: tuple(next(pieces).to(router.threshold.device) for _ in parts) for router, parts in sums.items()}
