# SPDX-License-Identifier: Apache-2.0
"""Mixture of depths: which tokens a layer processes (MoMa section 2.3).

Shape suffixes:
    B rows, T positions, D hidden size, N = B * T positions in one line, G pools by modality, Q pools in which tokens
    compete (G of the batch, or G of each row).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .capacity_moma import ceil_share, exact_share
from .configuration_moma import MomaConfig
from .errors_moma import InputError
from .router_base_moma import MomaRouterBase
from .routing_context_moma import RouterState, RoutingContext
from .routing_rules_moma import rule_of
from .thresholds_moma import lower_scores, thresholds_between


# a token's score has to pass this one when `token_choice` decides, the middle of the sigmoid
_MIDDLE = 0.5


@dataclass
class DepthSelection:
    """What a depth layer does with every token.

    Attributes:
        chosen_BT (`torch.BoolTensor`): True where the layer processes the token, `[B, T]`.
        weight_BT (`torch.Tensor`): by what it scales the layer's change, fp32, `[B, T]`.
    """

    chosen_BT: torch.Tensor
    weight_BT: torch.Tensor


class MomaDepthRouter(MomaRouterBase):
    """Scores tokens of all modalities for one layer (MoMa equation 2), and chooses.

    With `K = ceil(c * n)` for a pool of `n` tokens and its capacity `c`:

    - `expert_choice` takes the `K` best of each pool. Not causal: for training. Of equal scores earlier positions come
      first, and several rows at the last position together, so that equal rows fare alike: `K` may be exceeded by less
      than the number of rows.
    - `threshold` takes a token iff its score reaches the running mean of the cuts of the batches, midway between the
      K-th best score and the next lower one; in the first `routing_warmup_steps` of training as above.
    - `token_choice` takes a token iff its score, with a bias that training nudges towards the capacity, is at least
      one half. The bias does not weigh.
    - `auxiliary` takes a token iff the auxiliary router predicts so.

    State dict:
        weight           [1, D]  fp32
        threshold        [G]     fp32, running mean of each pool's cut
        balance_bias     [G]     fp32
        num_updates      [G]     fp32, training steps that the running mean has seen
        auxiliary.       see [`MomaAuxiliaryRouter`], with `config.auxiliary_routers`
    """

    def __init__(self, config: MomaConfig):
        num_pools = len(config.depth_pools)
        momentum = config.depth_threshold_momentum
        super().__init__(config, num_scores=1, num_cuts=num_pools, momentum=momentum, updates_shape=(num_pools,))
        self.capacities = [config.pool_depth_capacity(pool) for pool in config.depth_pools]
        self.taken_shares = [exact_share(capacity) for capacity in self.capacities]
        self.is_pooled_by_row = config.depth_pool == "row"

    def forward(self, hidden_BTD: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, DepthSelection]:
        """Score the tokens and choose.

        Args:
            hidden_BTD (`torch.Tensor`): the residual stream, `[B, T, D]`.
            context (`RoutingContext`): routing, modality and padding of this forward; padding is never chosen.

        Returns:
            `tuple`: router logits `[B, T]` in fp32, and the selection.
        """
        logits_BT = self.logits(hidden_BTD).squeeze(-1)
        scores_BT = torch.sigmoid(logits_BT)
        chosen_BT = self._choose(hidden_BTD, scores_BT.detach(), context)
        return logits_BT, DepthSelection(chosen_BT, scores_BT)

    @torch.no_grad()
    def _choose(self, hidden_BTD: torch.Tensor, scores_BT: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        tokens = DepthTokens(self, context, hidden_BTD, scores_BT)
        chosen_BT = depth_form_of(context.depth_routing)(tokens)
        if context.padding_BT is not None:
            chosen_BT = chosen_BT & ~context.padding_BT
        if context.track:
            context.record(self, tokens.ranks[1], *self._load(chosen_BT, tokens.pool_BT, tokens.is_token_BT))
        return chosen_BT

    def rank(
        self, scores_BT: torch.Tensor, pool_BT: torch.Tensor, is_token_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Membership in the top K of each pool, and the cut of each modality's pools in the mean."""
        num_rows, num_modalities = scores_BT.shape[0], len(self.capacities)
        num_pools = num_modalities
        if self.is_pooled_by_row:
            rows_B1 = torch.arange(num_rows, device=scores_BT.device).unsqueeze(-1)
            pool_BT = rows_B1 * num_modalities + pool_BT
            num_pools = num_rows * num_modalities
        # padding competes in a pool of its own, which takes nobody
        pool_BT = torch.where(is_token_BT, pool_BT, num_pools)
        # position by position, so that none of several equal rows comes before the others
        pool_N, scores_N = pool_BT.t().flatten(), scores_BT.t().flatten()
        order_N = scores_N.argsort(descending=True, stable=True)
        order_N = order_N[pool_N[order_N].argsort(stable=True)]
        pool_N = pool_N[order_N]
        # bincount would wait for the largest pool
        count_Q = torch.zeros(num_pools + 1, dtype=torch.long, device=pool_N.device)
        count_Q.scatter_add_(0, pool_N, torch.ones_like(pool_N))
        share_2G = torch.tensor(self.taken_shares, device=pool_N.device).t()
        take_Q = ceil_share(share_2G.repeat(1, num_pools // num_modalities), count_Q[:-1])
        take_Q = torch.cat([take_Q, count_Q.new_zeros(1)])
        start_Q = count_Q.cumsum(0) - count_Q
        rank_N = torch.arange(pool_N.shape[0], device=pool_N.device) - start_Q[pool_N]
        best_N = torch.zeros_like(is_token_BT.flatten()).scatter_(0, order_N, rank_N < take_Q[pool_N])
        best_BT = best_N.view(-1, num_rows).t()
        last_Q = order_N[(start_Q + take_Q - 1)[:-1].clamp(min=0)]
        kth_Q = scores_N[last_Q]
        # padding ties with nobody
        kth_BT = torch.cat([kth_Q, kth_Q.new_full((1,), torch.inf)])[pool_BT]
        place_BT = torch.cat([last_Q // num_rows, last_Q.new_full((1,), -1)])[pool_BT]
        is_at_place_BT = place_BT == torch.arange(scores_BT.shape[1], device=place_BT.device)
        best_BT = best_BT | ((scores_BT == kth_BT) & is_at_place_BT)
        is_used_BG = (count_Q[:-1] > 0).view(-1, num_modalities)
        lower_N = lower_scores(scores_BT, kth_BT).flatten()
        lower_Q = kth_Q.new_full((num_pools + 1,), -1.0).scatter_reduce(0, pool_BT.flatten(), lower_N, "amax")[:-1]
        threshold_QG = thresholds_between(kth_Q, lower_Q).view(-1, num_modalities)
        threshold_G = (threshold_QG * is_used_BG).sum(0) / is_used_BG.sum(0).clamp(min=1)
        return best_BT, threshold_G

    def _load(
        self, chosen_BT: torch.Tensor, pool_BT: torch.Tensor, is_token_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """By how much the share of chosen tokens lags behind the capacity, and whether a pool had tokens at all."""
        in_pool_GBT = torch.stack([(pool_BT == pool) & is_token_BT for pool in range(len(self.capacities))])
        count_G = in_pool_GBT.sum((1, 2))
        chosen_G = (in_pool_GBT & chosen_BT).sum((1, 2))
        capacity_G = torch.tensor(self.capacities, dtype=torch.float32, device=count_G.device)
        return capacity_G - chosen_G / count_G.clamp(min=1), (count_G > 0).float()


@dataclass
class DepthTokens:
    """What a rule chooses from for a depth layer.

    Attributes:
        router (`MomaDepthRouter`): whose scores these are.
        context (`RoutingContext`): of this forward.
        hidden_BTD (`torch.Tensor`): the residual stream, `[B, T, D]`.
        scores_BT (`torch.Tensor`): fp32, detached, `[B, T]`.
    """

    router: MomaDepthRouter
    context: RoutingContext
    hidden_BTD: torch.Tensor
    scores_BT: torch.Tensor
    _ranks: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def state(self) -> RouterState | MomaRouterBase:
        """The router's buffers to choose with."""
        return self.context.router_state(self.router)

    @property
    def pool_BT(self) -> torch.Tensor:
        """The pool by modality in which each token competes, `[B, T]`."""
        if len(self.router.capacities) > 1:
            return self.context.modality_BT
        return torch.zeros_like(self.scores_BT, dtype=torch.long)

    @property
    def is_token_BT(self) -> torch.Tensor:
        """False at padding, `[B, T]`."""
        padding_BT = self.context.padding_BT
        return torch.ones_like(self.scores_BT, dtype=torch.bool) if padding_BT is None else ~padding_BT

    def by_pool(self, values_G: torch.Tensor) -> torch.Tensor:
        """Each token's own of one value for each pool, `[B, T]`, or `[1]` where there is one pool."""
        return values_G if values_G.shape[0] == 1 else values_G[self.pool_BT]

    @property
    def ranks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`MomaDepthRouter.rank`]; only training and rules that look at the batch need it."""
        # functools.cached_property takes a lock, which breaks the graph of a compiled forward
        if self._ranks is None:
            self._ranks = self.router.rank(self.scores_BT, self.pool_BT, self.is_token_BT)
        return self._ranks


DepthForm = Callable[[DepthTokens], torch.Tensor]
# how depth layers choose, by the name of a rule of `RULES`
DEPTH_FORMS: dict[str, DepthForm] = {}


def depth_form(name: str) -> Callable[[DepthForm], DepthForm]:
    """Let a function choose for depth layers under a rule of `RULES`.

    It is called with [`DepthTokens`] and gives a mask `[B, T]`.
    """

    def keep(function: DepthForm) -> DepthForm:
        DEPTH_FORMS[rule_of(name).name] = function
        return function

    return keep


def depth_form_of(name: str) -> DepthForm:
    """How depth layers choose under a rule.

    Raises:
        ValueError: the rule is none, or is one for experts alone.
    """
    if rule_of(name, "depth_routing").name not in DEPTH_FORMS:
        raise InputError(
            f"`depth_routing` = {name!r}: this rule has no form for depth layers; those that have one are "
            f"{sorted(DEPTH_FORMS)}."
        )
    return DEPTH_FORMS[name]


@depth_form("expert_choice")
def _take_the_best(tokens: DepthTokens) -> torch.Tensor:
    return tokens.ranks[0]


@depth_form("threshold")
def _take_what_reaches_the_cut(tokens: DepthTokens) -> torch.Tensor:
    router, state = tokens.router, tokens.state
    chosen_BT = tokens.scores_BT >= tokens.by_pool(state.threshold)
    if tokens.context.track and router.warmup_steps and not router.is_frozen:
        is_warming = tokens.by_pool(state.num_updates < router.warmup_steps)
        chosen_BT = torch.where(is_warming, tokens.ranks[0], chosen_BT)
    return chosen_BT


@depth_form("token_choice")
def _take_what_passes_the_middle(tokens: DepthTokens) -> torch.Tensor:
    return tokens.scores_BT + tokens.by_pool(tokens.state.balance_bias) >= _MIDDLE


@depth_form("auxiliary")
def _take_what_is_predicted(tokens: DepthTokens) -> torch.Tensor:
    predicted_BT = tokens.router.predicted_scores(tokens.hidden_BTD).squeeze(-1)
    return predicted_BT >= tokens.by_pool(tokens.router.auxiliary.threshold)


__all__ = ["DEPTH_FORMS", "DepthSelection", "DepthTokens", "MomaDepthRouter", "depth_form", "depth_form_of"]
