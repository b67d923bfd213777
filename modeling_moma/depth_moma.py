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
"""Mixture of depths: which tokens a layer processes, and how they are packed for it (MoMa section 2.3).

Shape suffixes:
    B rows, T positions, D hidden size, N = B * T positions in one line, G pools by modality, Q pools in which tokens
    compete (G of the batch, or G of each row), R rows with chosen tokens, C places of a packed row, P chosen tokens,
    S keys that the cache holds, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, causal_mask_function
from transformers.masking_utils import packed_sequence_mask_function as same_document

from .cache_moma import MomaDepthCacheLayer, MomaStaticDepthCacheLayer
from .capacity_moma import ceil_share, exact_share
from .configuration_moma import DEPTH_LAYER_TYPE, MomaConfig
from .modality_split_moma import ModalitySplit
from .routing_context_moma import RouterState, RoutingContext
from .routing_moma import MomaRouterBase
from .routing_rules_moma import rule_of


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
    - `threshold` takes a token iff its score reaches the running mean of the K-th best score; in the first
      `routing_warmup_steps` of training as above.
    - `token_choice` takes a token iff its score, with a bias that training nudges towards the capacity, is at least
      one half. The bias does not weigh.
    - `auxiliary` takes a token iff the auxiliary router predicts so.

    State dict:
        weight           [1, D]  fp32
        threshold        [G]     fp32, running mean of the K-th best score
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
    def _choose(self, hidden_BTD, scores_BT, context):
        pool_BT = torch.zeros_like(scores_BT, dtype=torch.long)
        if len(self.capacities) > 1:
            pool_BT = context.modality_BT
        is_token_BT = torch.ones_like(scores_BT, dtype=torch.bool)
        if context.padding_BT is not None:
            is_token_BT = ~context.padding_BT
        tokens = DepthTokens(self, context, hidden_BTD, scores_BT, pool_BT, is_token_BT)
        chosen_BT = depth_form_of(context.depth_routing)(tokens) & is_token_BT
        if context.track:
            context.record(self, tokens.ranks[1], *self._load(chosen_BT, pool_BT, is_token_BT))
        return chosen_BT

    def rank(
        self, scores_BT: torch.Tensor, pool_BT: torch.Tensor, is_token_BT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Membership in the top K of each pool, and the K-th best score of each modality's pools in the mean."""
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
        kth_G = (kth_Q.view(-1, num_modalities) * is_used_BG).sum(0) / is_used_BG.sum(0).clamp(min=1)
        return best_BT, kth_G

    def _load(self, chosen_BT, pool_BT, is_token_BT):
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
        pool_BT (`torch.LongTensor`): the pool by modality in which each token competes, `[B, T]`.
        is_token_BT (`torch.BoolTensor`): False at padding, `[B, T]`.
    """

    router: MomaDepthRouter
    context: RoutingContext
    hidden_BTD: torch.Tensor
    scores_BT: torch.Tensor
    pool_BT: torch.Tensor
    is_token_BT: torch.Tensor
    _ranks: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def state(self) -> RouterState:
        """The router's buffers to choose with."""
        return self.context.router_state(self.router)

    @property
    def ranks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`MomaDepthRouter.rank`]; only training and rules that look at the batch need it."""
        # functools.cached_property takes a lock, which breaks the graph of a compiled forward
        if self._ranks is None:
            self._ranks = self.router.rank(self.scores_BT, self.pool_BT, self.is_token_BT)
        return self._ranks


# how depth layers choose, by the name of a rule of `RULES`
DEPTH_FORMS: dict[str, Callable[[DepthTokens], torch.Tensor]] = {}


def depth_form(name: str) -> Callable:
    """Let a function choose for depth layers under a rule of `RULES`.

    It is called with [`DepthTokens`] and gives a mask `[B, T]`.
    """

    def keep(function):
        DEPTH_FORMS[rule_of(name).name] = function
        return function

    return keep


def depth_form_of(name: str) -> Callable[[DepthTokens], torch.Tensor]:
    """How depth layers choose under a rule.

    Raises:
        ValueError: the rule is none, or is one for experts alone.
    """
    if rule_of(name, "depth_routing").name not in DEPTH_FORMS:
        raise ValueError(
            f"`depth_routing` = {name!r}: this rule has no form for depth layers; those that have one are "
            f"{sorted(DEPTH_FORMS)}."
        )
    return DEPTH_FORMS[name]


@depth_form("expert_choice")
def _take_the_best(tokens):
    return tokens.ranks[0]


@depth_form("threshold")
def _take_what_reaches_the_cut(tokens):
    router, state, pool_BT = tokens.router, tokens.state, tokens.pool_BT
    chosen_BT = tokens.scores_BT >= state.threshold[pool_BT]
    if tokens.context.track and router.warmup_steps and not router.is_frozen:
        is_warming_G = state.num_updates < router.warmup_steps
        chosen_BT = torch.where(is_warming_G[pool_BT], tokens.ranks[0], chosen_BT)
    return chosen_BT


@depth_form("token_choice")
def _take_what_passes_the_middle(tokens):
    return tokens.scores_BT + tokens.state.balance_bias[tokens.pool_BT] >= _MIDDLE


@depth_form("auxiliary")
def _take_what_is_predicted(tokens):
    predicted_BT = tokens.router.predicted_scores(tokens.hidden_BTD).squeeze(-1)
    return predicted_BT >= tokens.router.auxiliary.threshold[tokens.pool_BT]


@dataclass
class DepthPacking:
    """The chosen tokens of a depth layer at the front of the rows that have any, in order.

    Attributes:
        num_rows (`int`): rows `B` of the batch.
        length (`int`): positions `T` of the batch.
        rows (`list[int]`): the `R` rows that take part.
        counts (`list[int]`): chosen tokens of each of those rows.
        row_R (`torch.LongTensor`): the same as `rows`, on the device.
        index_RC (`torch.LongTensor`): the position of each place's token in its row, `[R, C]`.
        valid_RC (`torch.BoolTensor`): False at the holes after a row's last token, `[R, C]`.
        token_P (`torch.LongTensor`): chosen positions in the flat batch, `[P]`.
        place_P (`torch.LongTensor`): their places in the flat packed rows, `[P]`.
        split (`ModalitySplit`): expert groups of the chosen tokens, as one row `[1, P]`.
    """

    num_rows: int
    length: int
    rows: list[int]
    counts: list[int]
    row_R: torch.Tensor
    index_RC: torch.Tensor
    valid_RC: torch.Tensor
    token_P: torch.Tensor
    place_P: torch.Tensor
    split: ModalitySplit

    def pack(self, x_BT: torch.Tensor) -> torch.Tensor:
        """`[B, T, ...]` to `[R, C, ...]`; one row is taken to stand for all. Holes hold some token of their row."""
        return x_BT.expand(self.num_rows, *x_BT.shape[1:])[self.row_R.unsqueeze(-1), self.index_RC]

    def choose(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The chosen tokens of all rows in one, `[B, T, D]` to `[1, P, D]`; one row is taken to stand for all."""
        token_P = self.token_P if x_BTD.shape[0] > 1 else self.token_P % self.length
        # index_select, whose backward is much cheaper than that of indexing on CPU
        return x_BTD.flatten(0, 1).index_select(0, token_P).unsqueeze(0)

    def lay_out(self, states_1HPd: torch.Tensor) -> torch.Tensor:
        """Heads of the chosen tokens in packed rows, `[1, H, P, d]` to `[R, H, C, d]`, with zeros at holes."""
        states_PHd = states_1HPd.squeeze(0).transpose(0, 1)
        rows = states_PHd.new_zeros(self.valid_RC.numel(), *states_PHd.shape[1:])
        rows = rows.index_copy(0, self.place_P, states_PHd)
        return rows.unflatten(0, self.valid_RC.shape).transpose(1, 2)

    def take_out(self, x_RCD: torch.Tensor) -> torch.Tensor:
        """The chosen tokens without the holes, `[R, C, D]` to `[1, P, D]`."""
        return x_RCD.flatten(0, 1).index_select(0, self.place_P).unsqueeze(0)

    def add_back(self, hidden_BTD: torch.Tensor, change_1PD: torch.Tensor, weight_BT: torch.Tensor) -> torch.Tensor:
        """Add the weighted changes of the chosen tokens; the others leave bit for bit as they came."""
        weight_P = weight_BT.flatten().index_select(0, self.token_P)
        change_PD = (change_1PD[0] * weight_P.unsqueeze(-1).to(change_1PD.dtype)).to(hidden_BTD.dtype)
        return hidden_BTD.flatten(0, 1).index_add(0, self.token_P, change_PD).view_as(hidden_BTD)

    def key_slots(self, slot_RS: torch.Tensor | None, past: int) -> torch.Tensor:
        """Where the keys of an attention call stand among the positions seen, -1 at holes, `[R, S + C]`.

        Args:
            slot_RS (`torch.LongTensor`, *optional*): the cached ones, `[R, S]`.
            past (`int`): positions seen before this forward.
        """
        slot_RC = torch.where(self.valid_RC, self.index_RC + past, -1)
        return slot_RC if slot_RS is None else torch.cat([slot_RS, slot_RC], dim=1)

    def unpack_attention(self, weights_RHCS: torch.Tensor, slot_RS: torch.Tensor | None, past: int) -> torch.Tensor:
        """Lay attention weights out over all positions seen, with zeros for the tokens that passed by.

        Args:
            weights_RHCS (`torch.Tensor`): `[R, H, C, S + C]`.
            slot_RS (`torch.LongTensor`, *optional*): where the cached keys stood, -1 at holes, `[R, S]`.
            past (`int`): positions seen before this forward.

        Returns:
            `torch.Tensor`: `[B, H, T, past + T]`.
        """
        slot_RK = self.key_slots(slot_RS, past)
        num_heads, num_places = weights_RHCS.shape[1:3]
        is_key_RK = slot_RK >= 0
        target_RHCK = slot_RK.clamp(min=0)[:, None, None].expand(-1, num_heads, num_places, -1)
        wide = weights_RHCS.new_zeros(*weights_RHCS.shape[:3], past + self.length)
        wide = wide.scatter_add(-1, target_RHCK, weights_RHCS * is_key_RK[:, None, None])
        wide_PH = wide.transpose(1, 2).flatten(0, 1).index_select(0, self.place_P)
        full = wide_PH.new_zeros(self.num_rows * self.length, *wide_PH.shape[1:]).index_copy(0, self.token_P, wide_PH)
        return full.unflatten(0, (self.num_rows, self.length)).transpose(1, 2)


# its wait for the numbers of tokens would break the graph here and in every function around it
@torch.compiler.disable
def pack_chosen(chosen_BT: torch.Tensor, split: ModalitySplit, keep_empty_rows: bool) -> DepthPacking | None:
    """Pack the chosen tokens of each row to its front, with one wait on the device.

    Args:
        chosen_BT (`torch.BoolTensor`): `[B, T]`, False at padding.
        split (`ModalitySplit`): expert groups of the batch.
        keep_empty_rows (`bool`): whether rows without a chosen token take part: in training all weights must.

    Returns:
        `DepthPacking`, or `None` when no row takes part.
    """
    num_rows, length = chosen_BT.shape
    groups = list(split.counts)
    in_group = [(chosen_BT & (split.group_BT == index)).sum() for index in range(len(groups))]
    numbers = torch.cat([chosen_BT.sum(1), torch.stack(in_group)]).tolist()
    row_counts, group_counts = numbers[:num_rows], numbers[num_rows:]
    rows = [row for row, count in enumerate(row_counts) if count or keep_empty_rows]
    if not rows:
        return None
    counts = [row_counts[row] for row in rows]
    num_places, num_chosen = max(1, *counts), sum(counts)
    device = chosen_BT.device
    row_R, count_R = torch.tensor([rows, counts], device=device)
    index_RC = (~chosen_BT).byte().argsort(dim=1, stable=True).index_select(0, row_R)[:, :num_places]
    valid_RC = torch.arange(num_places, device=device) < count_R.unsqueeze(-1)
    # the size is known, so that nothing waits for it
    row_P = torch.repeat_interleave(torch.arange(len(rows), device=device), count_R, output_size=num_chosen)
    start_R = count_R.cumsum(0) - count_R
    place_P = row_P * num_places + torch.arange(num_chosen, device=device) - start_R[row_P]
    token_P = row_R[row_P] * length + index_RC.flatten()[place_P]
    group_1P = split.group_BT.flatten()[token_P].unsqueeze(0)
    packed_split = ModalitySplit.from_groups(group_1P, dict(zip(groups, group_counts)))
    return DepthPacking(num_rows, length, rows, counts, row_R, index_RC, valid_RC, token_P, place_P, packed_split)


def packed_causal_mask(
    config: MomaConfig,
    packing: DepthPacking,
    context: RoutingContext,
    dtype: torch.dtype,
    slot_RS: torch.Tensor | None = None,
    past: int = 0,
):
    """The attention mask of packed tokens over cached keys and themselves, in the form that the backend wants.

    The keys are the `S` columns of the cache, then the `C` packed tokens. Packing keeps the order of a row, so the
    order of the columns is the causal one.

    Args:
        config (`MomaConfig`): gives the attention implementation.
        packing (`DepthPacking`): the queries.
        context (`RoutingContext`): documents and the caller's own mask.
        dtype (`torch.dtype`): of additive masks.
        slot_RS (`torch.LongTensor`, *optional*): where the cached keys stood, -1 at holes, `[R, S]`.
        past (`int`, *optional*, defaults to 0): positions seen before this forward.
    """
    if context.custom_mask_BHQS is not None:
        return _pack_custom_mask(packing, context.custom_mask_BHQS, dtype, slot_RS, past)
    if config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    num_rows, num_places = packing.valid_RC.shape
    num_stored = 0 if slot_RS is None else slot_RS.shape[1]
    is_key_RK = None
    # without cached keys every hole comes after its row's tokens, where none of them looks
    if num_stored:
        is_key_RK = torch.cat([slot_RS >= 0, packing.valid_RC], dim=1)
    mask_function = causal_mask_function
    if context.document_BT is not None:
        mask_function = and_masks(mask_function, same_document(packing.pack(context.document_BT)))
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=num_rows,
        q_length=num_places,
        kv_length=num_stored + num_places,
        q_offset=num_stored,
        kv_offset=0,
        mask_function=mask_function,
        attention_mask=is_key_RK,
        allow_is_causal_skip=context.document_BT is None,
        dtype=dtype,
        config=config,
        device=packing.valid_RC.device,
    )


def _pack_custom_mask(packing, mask_BHQS, dtype, slot_RS, past):
    if mask_BHQS.is_floating_point():
        # FSDP casts a layer's arguments, which the context is not
        mask_BHQS = mask_BHQS.to(dtype)
    slot_RK = packing.key_slots(slot_RS, past)
    mask_RHQS = mask_BHQS.expand(packing.num_rows, -1, -1, -1).index_select(0, packing.row_R)
    query_RHCS = packing.index_RC[:, None, :, None].expand(-1, mask_RHQS.shape[1], -1, mask_RHQS.shape[3])
    mask_RHCS = mask_RHQS.gather(2, query_RHCS)
    key_RHCK = slot_RK.clamp(min=0)[:, None, None].expand(*mask_RHCS.shape[:3], -1)
    mask_RHCK = mask_RHCS.gather(3, key_RHCK)
    hidden = False if mask_RHCK.dtype == torch.bool else torch.finfo(mask_RHCK.dtype).min
    return torch.where((slot_RK >= 0)[:, None, None], mask_RHCK, hidden)


def packed_position_ids(packing: DepthPacking, context: RoutingContext) -> torch.Tensor | None:
    """Positions of packed tokens in their documents' packed part, by which flash attention tells documents apart.

    The rotary embedding keeps the true positions; these restart where a document does and have no gaps.
    """
    if context.document_BT is None:
        return None
    document_RC = packing.pack(context.document_BT)
    place_RC = torch.arange(document_RC.shape[1], device=document_RC.device).expand_as(document_RC)
    is_start_RC = torch.ones_like(document_RC, dtype=torch.bool)
    is_start_RC[:, 1:] = document_RC[:, 1:] != document_RC[:, :-1]
    return place_RC - torch.where(is_start_RC, place_RC, 0).cummax(dim=1).values


class PackedCache:
    """A view of the model's cache that tells a depth layer's part of it where the packed tokens stand."""

    def __init__(self, cache: Cache, packing: DepthPacking, capacity: float):
        self.cache, self.packing, self.capacity = cache, packing, capacity

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, **kwargs):
        """See [`MomaDepthCacheLayer.update`]."""
        return self.cache.update(keys, values, layer_idx, packing=self.packing, capacity=self.capacity)


def depth_cache_layer(cache: Cache, layer_idx: int) -> MomaDepthCacheLayer | MomaStaticDepthCacheLayer:
    """The part of a cache that serves a depth layer.

    Raises:
        TypeError: the cache does not know of depth layers.
    """
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, MomaDepthCacheLayer | MomaStaticDepthCacheLayer):
        raise TypeError(
            f"`cache` has a {type(layer).__name__} for layer {layer_idx}, a {DEPTH_LAYER_TYPE!r} layer. Build it "
            "from the model's config: DynamicCache(config=model.config) or StaticCache(model.config, max_cache_len)."
        )
    return layer
