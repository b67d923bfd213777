# SPDX-License-Identifier: Apache-2.0
"""Mixture of depths: which tokens a layer processes, and how (MoMa section 2.3).

Shape suffixes:
    B rows, T positions, D hidden size, N = B * T positions in one line, G pools by modality, Q pools in which tokens
    compete (G of the batch, or G of each row), P chosen tokens, R rows with chosen tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_moma import MomaConfig, rule_of
from .depth_cache_moma import (
    PackedCache,
    StepCache,
    depth_cache_layer,
    pack_chosen,
    packed_causal_mask,
    step_mask,
)
from .routing_moma import MomaRouterBase, ceil_share, exact_share, lower_scores, thresholds_between
from .token_groups_moma import (
    FLASH_LENGTHS,
    RouterState,
    RoutingContext,
    is_distributed,
    uses_flash_attention_mask,
)


# a token's score has to pass this one when `token_choice` decides, the middle of the sigmoid
_MIDDLE = 0.5


@dataclass
class DepthSelection:
    """What a depth layer does with every token.

    Attributes:
        chosen_BT (`torch.BoolTensor`):
            True where the layer processes the token, `[B, T]`.
        weight_BT (`torch.Tensor`):
            by what it scales the layer's update, fp32, `[B, T]`.
    """

    chosen_BT: torch.Tensor
    weight_BT: torch.Tensor


class MomaDepthRouter(MomaRouterBase):
    """Scores tokens of all modalities for one layer (MoMa equation 2), and chooses.

    With `K = ceil(c * n)` for a pool of `n` tokens and its capacity `c`:

    - `expert_choice` takes the `K` best of each pool. Not causal: for training. Of equal scores earlier positions come
      first, and several rows at the last position together, so that equal rows fare alike: `K` may be exceeded by less
      than the number of rows.
    - `threshold` takes a token iff its score reaches the running mean of the batches' thresholds, midway between the
      K-th best score and the next lower one; in the first `routing_warmup_steps` of training as above.
    - `token_choice` takes a token iff its score, with a bias that training nudges towards the capacity, is at least
      one half. The bias does not weigh.
    - `auxiliary` takes a token iff the auxiliary router predicts so.

    Args:
        config (`MomaConfig`):
            gives the pools, their capacities and the rules.

    State dict:
        weight           [1, D]  fp32
        threshold        [G]     fp32, running mean of each pool's threshold
        balance_bias     [G]     fp32
        num_updates      [G]     fp32, training steps that the running mean has seen
        auxiliary.       see [`MomaAuxiliaryRouter`], with `config.auxiliary_routers`
    """

    def __init__(self, config: MomaConfig):
        num_pools = len(config.depth_pools)
        momentum = config.depth_threshold_momentum
        super().__init__(config, num_scores=1, num_thresholds=num_pools, momentum=momentum, updates_shape=(num_pools,))
        self.capacities = [config.pool_depth_capacity(pool) for pool in config.depth_pools]
        self.capacity_fractions = [exact_share(capacity) for capacity in self.capacities]
        # a static cache allocates for the largest capacity
        self.capacity = max(self.capacities)
        self.is_pooled_by_row = config.depth_pool == "row"

    def forward(self, hidden_BTD: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, DepthSelection]:
        """Score the tokens and choose.

        Args:
            hidden_BTD (`torch.Tensor`):
                the residual stream, `[B, T, D]`.
            context (`RoutingContext`):
                routing, modality and padding of this forward; padding is never chosen.

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
        chosen_BT = rule_of(context.depth_routing).choose(tokens)  # pyright: ignore[reportOptionalCall]
        if context.padding_BT is not None:
            chosen_BT = chosen_BT & ~context.padding_BT
        if context.track:
            context.record(self, tokens.ranks[1], *self._load(chosen_BT, tokens.pool_BT, tokens.is_token_BT))
        return chosen_BT

    def rank(
        self, scores_BT: torch.Tensor, pool_BT: torch.Tensor, is_token_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return membership in the top K of each pool, and the mean threshold of each modality's pools."""
        num_rows, num_modalities = scores_BT.shape[0], len(self.capacities)
        num_pools = num_modalities
        if self.is_pooled_by_row:
            rows_B1 = torch.arange(num_rows, device=scores_BT.device).unsqueeze(-1)
            pool_BT = rows_B1 * num_modalities + pool_BT
            num_pools = num_rows * num_modalities
        # padding competes in a pool of its own, which takes no token
        pool_BT = torch.where(is_token_BT, pool_BT, num_pools)
        # position by position, so that none of several equal rows comes before the others
        pool_N, scores_N = pool_BT.t().flatten(), scores_BT.t().flatten()
        order_N = scores_N.argsort(descending=True, stable=True)
        order_N = order_N[pool_N[order_N].argsort(stable=True)]
        pool_N = pool_N[order_N]
        # bincount would sync with the device for the largest pool
        count_Q = torch.zeros(num_pools + 1, dtype=torch.long, device=pool_N.device)
        count_Q.scatter_add_(0, pool_N, torch.ones_like(pool_N))
        share_2G = torch.tensor(self.capacity_fractions, device=pool_N.device).t()
        take_Q = ceil_share(share_2G.repeat(1, num_pools // num_modalities), count_Q[:-1])
        take_Q = torch.cat([take_Q, count_Q.new_zeros(1)])
        start_Q = count_Q.cumsum(0) - count_Q
        rank_N = torch.arange(pool_N.shape[0], device=pool_N.device) - start_Q[pool_N]
        best_N = torch.zeros_like(is_token_BT.flatten()).scatter_(0, order_N, rank_N < take_Q[pool_N])
        best_BT = best_N.view(-1, num_rows).t()
        last_Q = order_N[(start_Q + take_Q - 1)[:-1].clamp(min=0)]
        kth_Q = scores_N[last_Q]
        # padding ties with no token
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
        """Return how far the share of chosen tokens lags behind the capacity, and whether a pool had tokens at all."""
        in_pool_GBT = torch.stack([(pool_BT == pool) & is_token_BT for pool in range(len(self.capacities))])
        count_G = in_pool_GBT.sum((1, 2))
        chosen_G = (in_pool_GBT & chosen_BT).sum((1, 2))
        capacity_G = torch.tensor(self.capacities, dtype=torch.float32, device=count_G.device)
        return capacity_G - chosen_G / count_G.clamp(min=1), (count_G > 0).float()


@dataclass
class DepthTokens:
    """What a rule chooses from for a depth layer.

    Attributes:
        router (`MomaDepthRouter`):
            whose scores these are.
        context (`RoutingContext`):
            of this forward.
        hidden_BTD (`torch.Tensor`):
            the residual stream, `[B, T, D]`.
        scores_BT (`torch.Tensor`):
            fp32, detached, `[B, T]`.
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
        """Give each token its pool's value, `[B, T]`, or `[1]` where there is one pool."""
        return values_G if values_G.shape[0] == 1 else values_G[self.pool_BT]

    @property
    def ranks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`MomaDepthRouter.rank`]; only training and rules that look at the batch need it."""
        # functools.cached_property takes a lock, which breaks the graph of a compiled forward
        if self._ranks is None:
            self._ranks = self.router.rank(self.scores_BT, self.pool_BT, self.is_token_BT)
        return self._ranks


DepthFunction = Callable[[DepthTokens], torch.Tensor]


def depth_rule(name: str) -> Callable[[DepthFunction], DepthFunction]:
    """Let a function choose for depth layers under a rule that is entered for experts.

    It is called with [`DepthTokens`] and gives a mask `[B, T]`.

    Args:
        name (`str`):
            of the rule.

    Raises:
        ValueError: there is no such rule.
    """

    def enter(function: DepthFunction) -> DepthFunction:
        rule_of(name).choose = function
        return function

    return enter


@depth_rule("expert_choice")
def _take_the_best(tokens: DepthTokens) -> torch.Tensor:
    return tokens.ranks[0]


@depth_rule("threshold")
def _take_what_reaches_the_cut(tokens: DepthTokens) -> torch.Tensor:
    router, state = tokens.router, tokens.state
    chosen_BT = tokens.scores_BT >= tokens.by_pool(state.threshold)
    if tokens.context.track and router.warmup_steps and not router.is_frozen:
        is_warming = tokens.by_pool(state.num_updates < router.warmup_steps)
        chosen_BT = torch.where(is_warming, tokens.ranks[0], chosen_BT)
    return chosen_BT


@depth_rule("token_choice")
def _take_what_passes_the_middle(tokens: DepthTokens) -> torch.Tensor:
    return tokens.scores_BT + tokens.by_pool(tokens.state.balance_bias) >= _MIDDLE


@depth_rule("auxiliary")
def _take_what_is_predicted(tokens: DepthTokens) -> torch.Tensor:
    predicted_BT = tokens.router.predicted_scores(tokens.hidden_BTD).squeeze(-1)
    return predicted_BT >= tokens.by_pool(tokens.router.auxiliary.threshold)


class DepthLayer(nn.Module):
    """The forward of a decoder layer for the tokens that its depth router chooses (MoMa section 2.3).

    To be mixed into a decoder layer. Attention and experts see the chosen tokens alone: attention packed to the front
    of their rows, all else as one row without padding. The update that the layer makes to a token is scaled by
    the token's score. All other tokens leave as they came.
    """

    config: MomaConfig
    layer_idx: int
    depth_router: MomaDepthRouter
    # the decoder layer defines these two: the residual updates of attention and of the feed-forward layer
    attention_update: Callable[..., torch.Tensor]
    ffn_update: Callable[[torch.Tensor, RoutingContext], torch.Tensor]

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: torch.Tensor,
        routing_context: RoutingContext,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]
    ) -> torch.Tensor:
        """Map hidden states `[B, T, D]` to those after the layer; tokens that were not chosen stay as they are."""
        is_recorded = bool(kwargs.get("output_attentions", self.config.output_attentions))
        _, selection = self.depth_router(hidden_states, routing_context)
        # weights take part in every training step and wherever processes wait for one another; a recorded layer has
        # attentions in every step
        keep_empty_rows = self.training or is_distributed() or is_recorded
        # not passed on: position ids count all tokens, those that were not chosen too
        kwargs.pop("position_ids", None)
        lengths: Any = {name: kwargs.pop(name, None) for name in FLASH_LENGTHS}
        is_step = hidden_states.shape[1] == 1 and not keep_empty_rows and routing_context.custom_mask_BHQS is None
        if is_step and cache is not None:
            return self._step(hidden_states, selection, routing_context, position_embeddings, cache, **kwargs)
        packing = pack_chosen(
            selection.chosen_BT,
            routing_context.split,  # pyright: ignore[reportCallIssue]
            keep_empty_rows,
        )
        if packing is None:
            self._skip(hidden_states, cache)
            return hidden_states
        packing.is_recorded, packed_cache = is_recorded, None
        if cache is not None:
            cache_layer = depth_cache_layer(cache, self.layer_idx)
            packing.slot_RS, packing.past = cache_layer.stored_slots(packing), cache_layer.get_seq_length()
            packed_cache = PackedCache(cache, packing, self.depth_router.capacity)
        x_1PD = packing.choose(hidden_states)
        if lengths["cu_seq_lens_q"] is not None and uses_flash_attention_mask(self.config) and any(packing.counts):
            # nothing but lengths tells rows apart, either
            layout = {"attention_mask": None, **packing.chosen_lengths(lengths)}
        else:
            mask = packed_causal_mask(self.config, packing, routing_context, x_1PD.dtype)
            layout = {"attention_mask": mask, "packing": packing}
        attention_update_1PD = self.attention_update(
            x_1PD,
            position_embeddings=tuple(
                packing.choose(part)
                for part in position_embeddings  # pyright: ignore[reportOptionalIterable]
            ),
            cache=packed_cache,
            **layout,
            **kwargs,  # pyright: ignore[reportCallIssue]
        )
        packed_context = routing_context.with_split(packing.split)
        update_1PD = attention_update_1PD + self.ffn_update(x_1PD + attention_update_1PD, packed_context)
        return packing.add_back(hidden_states, update_1PD, selection.weight_BT)

    def _step(
        self,
        hidden_B1D: torch.Tensor,
        selection: DepthSelection,
        routing_context: RoutingContext,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        cache: Cache,
        **kwargs,
    ) -> torch.Tensor:
        """Prepare a step of one token in each row: those rows take part that chose it, with nothing to pack."""
        num_rows = hidden_B1D.shape[0]
        # the only device sync of the packing
        rows = [row for row, is_chosen in enumerate(selection.chosen_BT.flatten().tolist()) if is_chosen]
        if not rows:
            self._skip(hidden_B1D, cache)
            return hidden_B1D
        lengths = depth_cache_layer(cache, self.layer_idx).step_lengths(rows)
        weight_R1, x_R1D, context = selection.weight_BT, hidden_B1D, routing_context
        row_R = None
        if len(rows) < num_rows:
            row_R = torch.tensor(rows, device=hidden_B1D.device)
            weight_R1, x_R1D = weight_R1.index_select(0, row_R), x_R1D.index_select(0, row_R)
            position_embeddings = tuple(  # pyright: ignore[reportAssignmentType]
                part if part.shape[0] == 1 else part.index_select(0, row_R)
                for part in position_embeddings  # pyright: ignore[reportOptionalIterable]
            )
            context = routing_context.with_split(
                routing_context.split.select_rows(row_R)  # pyright: ignore[reportAttributeAccessIssue]
            )
        attention_update_R1D = self.attention_update(
            x_R1D,
            position_embeddings=position_embeddings,
            attention_mask=step_mask(self.config, lengths, x_R1D.dtype, x_R1D.device),
            cache=StepCache(cache, rows, num_rows, self.depth_router.capacity),
            **kwargs,
        )
        update_R1D = attention_update_R1D + self.ffn_update(x_R1D + attention_update_R1D, context)
        update_R1D = (update_R1D * weight_R1.unsqueeze(-1).to(update_R1D.dtype)).to(hidden_B1D.dtype)
        return hidden_B1D + update_R1D if row_R is None else hidden_B1D.index_add(0, row_R, update_R1D)

    def _skip(self, hidden_states: torch.Tensor, cache: Cache | None) -> None:
        if cache is None:
            return
        depth_cache_layer(cache, self.layer_idx)
        nothing = hidden_states.new_empty(hidden_states.shape[0], 1, 0, 1)
        cache.update(nothing, nothing, self.layer_idx, num_skipped=hidden_states.shape[1])


__all__ = ["DepthLayer", "DepthSelection", "DepthTokens", "MomaDepthRouter", "depth_rule"]
