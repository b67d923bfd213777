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
    DepthCacheView,
    chosen_mask,
    depth_cache_layer,
    pack_chosen,
    packed_causal_mask,
    places_of,
    step_mask,
)
from .documents_moma import FLASH_LENGTHS, uses_flash_attention_mask
from .routing_moma import MomaRouterBase, ceil_share, exact_share, lower_scores, midpoints
from .token_groups_moma import (
    ModalitySplit,
    RouterState,
    RouterStatistics,
    RoutingContext,
    is_distributed,
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

    State dict:
        weight           [1, D]  fp32
        threshold        [G]     fp32, running mean of each pool's threshold
        balance_bias     [G]     fp32
        num_updates      [G]     fp32, training steps that the running mean has seen
        auxiliary.       see [`MomaAuxiliaryRouter`], with `config.auxiliary_routers`
    """

    def __init__(self, config: MomaConfig):
        num_pools = len(config.depth_pools)
        super().__init__(config, num_scores=1, num_thresholds=num_pools, updates_shape=(num_pools,))
        # known before a graph is compiled
        for capacity in self.capacities:
            exact_share(capacity)

    @property
    def momentum(self) -> float:
        """See [`MomaRouterBase`]."""
        return self.config.depth_threshold_momentum

    @property
    def capacities(self) -> list[float]:
        """Share of each pool's tokens that the layer takes."""
        return [self.config.pool_depth_capacity(pool) for pool in self.config.depth_pools]

    @property
    def capacity_fractions(self) -> list[tuple[int, int]]:
        """Those shares, numerator and denominator."""
        return [exact_share(capacity) for capacity in self.capacities]

    @property
    def capacity(self) -> float:
        """The largest share, for which a static cache allocates."""
        return max(self.capacities)

    @property
    def is_pooled_by_row(self) -> bool:
        """Whether each row is a pool of its own."""
        return self.config.depth_pool == "row"

    def forward(self, hidden_BTD: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, DepthSelection]:
        """Score the tokens and choose."""
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
            moves_bias = rule_of(context.depth_routing).moves_bias
            ranks, load_deficit_G = tokens.ranks, None
            if moves_bias:
                load_deficit_G = self._load_deficit(chosen_BT, ranks.member_LGN, ranks.count_LG)
            count_G = None if ranks.count_LG is None else (ranks.count_LG.sum(0) > 0).float()
            context.record(self, RouterStatistics(ranks.kth_G, ranks.lower_G, load_deficit_G, count_G))
        return chosen_BT

    def rank(
        self, scores_BT: torch.Tensor, pool_BT: torch.Tensor | None, is_token_BT: torch.Tensor | None
    ) -> "DepthRanks":
        """Return membership in the top K of each pool, and where each modality's pools part."""
        scores_LGN, member_LGN = self._lines(scores_BT).unsqueeze(1), None
        if pool_BT is not None:
            pools_G1 = torch.arange(len(self.capacities), device=scores_BT.device).unsqueeze(-1)
            member_LGN = self._lines(pool_BT).unsqueeze(1) == pools_G1
        if is_token_BT is not None:
            is_token_L1N = self._lines(is_token_BT).unsqueeze(1)
            member_LGN = is_token_L1N if member_LGN is None else member_LGN & is_token_L1N
        count_LG, count = None, scores_LGN.shape[-1]
        if member_LGN is not None:
            # scores of tokens are higher
            scores_LGN = torch.where(member_LGN, scores_LGN, -1.0)
            count = count_LG = member_LGN.sum(-1)
        sorted_LGN, order_LGN = scores_LGN.sort(dim=-1, descending=True, stable=True)
        kth_LG1, place_LG1 = (self._at_last(x_LGN, count) for x_LGN in (sorted_LGN, order_LGN))
        tokens_at_place = scores_LGN.shape[-1] // scores_BT.shape[1]
        if tokens_at_place > 1:
            # rows that come together at the last position
            place_LG1 = (place_LG1 // tokens_at_place + 1) * tokens_at_place - 1
        place_N = torch.arange(scores_LGN.shape[-1], device=scores_BT.device)
        best_LGN = (scores_LGN > kth_LG1) | ((scores_LGN == kth_LG1) & (place_N <= place_LG1))
        if member_LGN is not None:
            best_LGN = best_LGN & member_LGN
        best_LN = best_LGN[:, 0] if best_LGN.shape[1] == 1 else best_LGN.any(1)
        best_BT = best_LN if self.is_pooled_by_row else best_LN.view(-1, scores_BT.shape[0]).t()
        kth_LG, lower_LG = kth_LG1.squeeze(-1), lower_scores(scores_LGN, kth_LG1).amax(-1)
        if not self.is_pooled_by_row:
            return DepthRanks(best_BT, kth_LG[0], lower_LG[0], member_LGN, count_LG)
        threshold_LG = midpoints(kth_LG, lower_LG)
        is_used_LG = torch.ones_like(threshold_LG) if count_LG is None else count_LG > 0
        threshold_G = (threshold_LG * is_used_LG).sum(0) / is_used_LG.sum(0).clamp(min=1)
        return DepthRanks(best_BT, threshold_G, threshold_G, member_LGN, count_LG)

    def _lines(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Return lines of tokens that may compete, `[L, N]`: each row, or all rows position by position."""
        # so that none of several equal rows comes before the others
        return x_BT if self.is_pooled_by_row else x_BT.t().reshape(1, -1)

    def _at_last(self, x_LGN: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
        """Return what stands at the last place that is within a pool's capacity, `[L, G, 1]`."""
        if not isinstance(count, torch.Tensor):
            last = ceil_share(self.capacity_fractions[0], count) - 1
            return x_LGN[..., last : last + 1]
        taken = [ceil_share(share, part) for share, part in zip(self.capacity_fractions, count.split(1, dim=1))]
        last_LG1 = (torch.cat(taken, dim=1) - 1).clamp(min=0).unsqueeze(-1)
        return x_LGN.gather(-1, last_LG1)

    def _load_deficit(
        self, chosen_BT: torch.Tensor, member_LGN: torch.Tensor | None, count_LG: torch.Tensor | None
    ) -> torch.Tensor:
        """Return how far the share of chosen tokens lags behind the capacity, `[G]`."""
        chosen_L1N = self._lines(chosen_BT).unsqueeze(1)
        if member_LGN is None or count_LG is None:
            return self.capacity - chosen_L1N.sum((0, 2)) / chosen_BT.numel()
        share_G = (member_LGN & chosen_L1N).sum((0, 2)) / count_LG.sum(0).clamp(min=1)
        return torch.cat([capacity - part for capacity, part in zip(self.capacities, share_G.split(1))])


@dataclass
class DepthRanks:
    """What the top K of each pool are, in `L` lines of `N` tokens: each row, or all rows position by position.

    Attributes:
        best_BT (`torch.BoolTensor`):
            membership, `[B, T]`.
        kth_G (`torch.Tensor`):
            the K-th best scores, or the means of the rows' thresholds, `[G]`.
        lower_G (`torch.Tensor`):
            see [`RouterStatistics`], `[G]`.
        member_LGN (`torch.BoolTensor`, *optional*):
            tokens of each pool; `None` where there is one, and no padding.
        count_LG (`torch.LongTensor`, *optional*):
            how many these are.
    """

    best_BT: torch.Tensor
    kth_G: torch.Tensor
    lower_G: torch.Tensor
    member_LGN: torch.Tensor | None
    count_LG: torch.Tensor | None


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
    _ranks: DepthRanks | None = None

    @property
    def state(self) -> RouterState | MomaRouterBase:
        """The router's buffers to choose with."""
        return self.context.router_state(self.router)

    @property
    def pool_BT(self) -> torch.Tensor | None:
        """The pool by modality in which each token competes, `[B, T]`; `None` where there is one."""
        return self.context.modality_BT if len(self.router.capacities) > 1 else None

    @property
    def is_token_BT(self) -> torch.Tensor:
        """False at padding, `[B, T]`, for rules that choose by more than scores."""
        padding_BT = self.context.padding_BT
        return torch.ones_like(self.scores_BT, dtype=torch.bool) if padding_BT is None else ~padding_BT

    def by_pool(self, values_G: torch.Tensor) -> torch.Tensor:
        """Give each token its pool's value, `[B, T]`, or `[1]` where there is one pool."""
        pool_BT = self.pool_BT
        return values_G if pool_BT is None else values_G[pool_BT]

    @property
    def ranks(self) -> DepthRanks:
        """See [`MomaDepthRouter.rank`]; only training and rules that look at the batch need it."""
        # functools.cached_property takes a lock, which breaks the graph of a compiled forward
        if self._ranks is None:
            padding_BT = self.context.padding_BT
            is_token_BT = None if padding_BT is None else ~padding_BT
            self._ranks = self.router.rank(self.scores_BT, self.pool_BT, is_token_BT)
        return self._ranks


DepthFunction = Callable[[DepthTokens], torch.Tensor]


def depth_rule(name: str) -> Callable[[DepthFunction], DepthFunction]:
    """Let a function choose for depth layers under a rule that is entered for experts.

    It is called with [`DepthTokens`] and gives a mask `[B, T]`.
    """

    def enter(function: DepthFunction) -> DepthFunction:
        rule_of(name).choose = function
        return function

    return enter


@depth_rule("expert_choice")
def depth_expert_choice(tokens: DepthTokens) -> torch.Tensor:
    """Return the best tokens of each pool, `[B, T]`."""
    return tokens.ranks.best_BT


@depth_rule("threshold")
def depth_threshold(tokens: DepthTokens) -> torch.Tensor:
    """Return the tokens whose scores reach the threshold of their pool, `[B, T]`."""
    router, state = tokens.router, tokens.state
    chosen_BT = tokens.scores_BT >= tokens.by_pool(state.threshold)
    if tokens.context.track and router.warmup_steps and not router.is_frozen:
        is_warming = tokens.by_pool(state.num_updates < router.warmup_steps)
        chosen_BT = torch.where(is_warming, tokens.ranks.best_BT, chosen_BT)
    return chosen_BT


@depth_rule("token_choice")
def depth_token_choice(tokens: DepthTokens) -> torch.Tensor:
    """Return the tokens whose scores, with the bias of their pool, reach the middle, `[B, T]`."""
    return tokens.scores_BT + tokens.by_pool(tokens.state.balance_bias) >= _MIDDLE


@depth_rule("auxiliary")
def depth_auxiliary(tokens: DepthTokens) -> torch.Tensor:
    """Return the tokens of which the auxiliary router predicts that their pool would take them, `[B, T]`."""
    predicted_BT = tokens.router.predicted_scores(tokens.hidden_BTD).squeeze(-1)
    return predicted_BT >= tokens.by_pool(tokens.router.auxiliary.threshold)


class DepthLayer(nn.Module):
    """The forward of a decoder layer for the tokens that its depth router chooses (MoMa section 2.3).

    To be mixed into a decoder layer. Attention and experts see the chosen tokens alone: attention packed to the front
    of their rows, all else as one row without padding. The update that the layer makes to a token is scaled by
    the token's score. All other tokens leave as they came.

    `forward` does so in one of four ways, which give the same:

    - `_run_masked`, where a context's `masks_depth` says that to compute all tokens and hide those that were not
      chosen costs less than a device sync for their number;
    - `_step`, with a cache and one token in each row, of which there is nothing to pack;
    - `_skip`, where no token was chosen;
    - packed tokens, in all other cases.
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
        has_attentions = bool(kwargs.get("output_attentions", self.config.output_attentions))
        _, selection = self.depth_router(hidden_states, routing_context)
        # weights take part in every training step and wherever processes wait for one another; a recorded layer has
        # attentions and router logits in every step
        keep_empty_rows = self.training or is_distributed() or routing_context.is_recorded
        if cache is not None and routing_context.hidden is not None:
            depth_cache_layer(cache, self.layer_idx).hide(*routing_context.hidden)
        # not passed on: position ids count all tokens, those that were not chosen too
        kwargs.pop("position_ids", None)
        lengths: Any = {name: kwargs.pop(name, None) for name in FLASH_LENGTHS}
        # a training step may have made its cache after it was decided to run all tokens, which only one may then do
        if routing_context.masks_depth and (cache is None or hidden_states.shape[1] == 1):
            return self._run_masked(hidden_states, selection, routing_context, position_embeddings, cache, **kwargs)
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
        packing.is_recorded, packed_cache = has_attentions, None
        if cache is not None:
            cache_layer = depth_cache_layer(cache, self.layer_idx)
            packing.slot_RS, packing.past = cache_layer.stored_slots(packing), cache_layer.get_seq_length()
            packed_cache = DepthCacheView(cache, self.depth_router.capacity, packing=packing)
        x_1PD = packing.choose(hidden_states)
        if lengths["cu_seq_lens_q"] is not None and uses_flash_attention_mask(self.config) and any(packing.counts):
            # nothing but lengths tells rows apart, either
            layout = {"attention_mask": None, **packing.chosen_lengths(lengths)}
        else:
            mask = packed_causal_mask(self.config, packing, routing_context, x_1PD.dtype)
            layout = {"attention_mask": mask, "packing": packing}
        modality_1P = None
        if self.config.balance_bias_by_modality:
            modality_1P = packing.choose(routing_context.modality_BT.unsqueeze(-1)).squeeze(-1)
        packed_context = routing_context.with_split(packing.split, modality_1P)
        attention_update_1PD = self.attention_update(
            x_1PD,
            packed_context,
            position_embeddings=tuple(
                packing.choose(part)
                for part in position_embeddings  # pyright: ignore[reportOptionalIterable]
            ),
            cache=packed_cache,
            **layout,
            **kwargs,  # pyright: ignore[reportCallIssue]
        )
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
        split = routing_context.split
        # the only device sync of the packing; -1 where a row's token is not chosen
        groups = torch.where(selection.chosen_BT, split.group_BT, -1).flatten().tolist()
        rows = [row for row, group in enumerate(groups) if group >= 0]
        if not rows:
            self._skip(hidden_B1D, cache)
            return hidden_B1D
        weight_R1, x_R1D, context = selection.weight_BT, hidden_B1D, routing_context
        row_R = None
        if len(rows) < num_rows:
            row_R = places_of(selection.chosen_BT.flatten(), len(rows))
            weight_R1, x_R1D = weight_R1.index_select(0, row_R), x_R1D.index_select(0, row_R)
            position_embeddings = tuple(  # pyright: ignore[reportAssignmentType]
                part if part.shape[0] == 1 else part.index_select(0, row_R)
                for part in position_embeddings  # pyright: ignore[reportOptionalIterable]
            )
            counts = {name: groups.count(index) for index, name in enumerate(split.counts)}  # pyright: ignore[reportAttributeAccessIssue]
            context = routing_context.with_split(
                ModalitySplit.from_groups(split.group_BT.index_select(0, row_R), counts),
                routing_context.modality_BT.index_select(0, row_R) if self.config.balance_bias_by_modality else None,
            )
        is_key_RS = depth_cache_layer(cache, self.layer_idx).step_keys(rows, row_R)
        attention_update_R1D = self.attention_update(
            x_R1D,
            context,
            position_embeddings=position_embeddings,
            attention_mask=step_mask(self.config, is_key_RS, x_R1D.dtype),
            cache=DepthCacheView(cache, self.depth_router.capacity, rows=rows, row_R=row_R, num_rows=num_rows),
            **kwargs,
        )
        update_R1D = attention_update_R1D + self.ffn_update(x_R1D + attention_update_R1D, context)
        update_R1D = (update_R1D * weight_R1.unsqueeze(-1).to(update_R1D.dtype)).to(hidden_B1D.dtype)
        return hidden_B1D + update_R1D if row_R is None else hidden_B1D.index_add(0, row_R, update_R1D)

    def _run_masked(
        self,
        hidden_BTD: torch.Tensor,
        selection: DepthSelection,
        routing_context: RoutingContext,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        cache: Cache | None,
        **kwargs,
    ) -> torch.Tensor:
        """Run all tokens: those that were not chosen are no keys, compete for no expert, and get no update."""
        chosen_BT, masked_cache, context = selection.chosen_BT, None, routing_context
        if cache is None:
            mask = chosen_mask(chosen_BT, context.document_BT)
        else:
            is_key_BS = depth_cache_layer(cache, self.layer_idx).prepare_masked_step()
            mask = step_mask(self.config, is_key_BS, hidden_BTD.dtype)
            masked_cache = DepthCacheView(cache, self.depth_router.capacity, chosen_B=chosen_BT[:, 0])
        if context.track:
            context = context.with_skipping(~chosen_BT)
        # what the layer does not see must not overflow in it: infinity times 0 is NaN
        chosen_BT1 = chosen_BT.unsqueeze(-1)
        x_BTD = torch.where(chosen_BT1, hidden_BTD, 0.0)
        attention_update = self.attention_update(
            x_BTD,
            context,
            position_embeddings=position_embeddings,
            attention_mask=mask,
            cache=masked_cache,
            **kwargs,
        )
        update = attention_update + self.ffn_update(x_BTD + attention_update, context)
        update = torch.where(chosen_BT1, update * selection.weight_BT.unsqueeze(-1).to(update.dtype), 0.0)
        return hidden_BTD + update.to(hidden_BTD.dtype)

    def _skip(self, hidden_states: torch.Tensor, cache: Cache | None) -> None:
        if cache is None:
            return
        depth_cache_layer(cache, self.layer_idx)
        nothing = hidden_states.new_empty(hidden_states.shape[0], 1, 0, 1)
        cache.update(nothing, nothing, self.layer_idx, num_skipped=hidden_states.shape[1])
