# SPDX-License-Identifier: Apache-2.0
"""Mixture of depths: which tokens a layer processes, how they are packed for it, and its cache (MoMa section 2.3).

A cache keeps for each row of a depth layer the keys of its own chosen tokens, and no others.

Shape suffixes:
    B rows, T positions, D hidden size, N = B * T positions, G pools by modality, P chosen tokens, R rows with chosen
    tokens, C slots of a packed row, S columns that the cache holds for these rows, K keys of an attention call (S + C,
    in steps S + 1), H heads, d head size, E documents of the batch and one.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, causal_mask_function
from transformers.masking_utils import packed_sequence_mask_function as same_document
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_moma import DEPTH_LAYER_TYPE, MomaConfig, rule_of
from .documents_moma import FLASH_LENGTHS, uses_flash_attention_mask
from .errors_moma import InputError
from .routing_moma import MomaRouterBase, ceil_share, exact_share, lower_scores
from .token_groups_moma import ModalitySplit, RouterStatistics, RoutingContext, is_distributed


# a token's score has to pass this one when `token_choice` decides, the middle of the sigmoid
_MIDDLE = 0.5
# of a threshold's running mean: lower than that of experts, since a layer's threshold moves with all layers before it
_MOMENTUM = 0.5


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
        return _MOMENTUM

    @property
    def capacities(self) -> list[float]:
        """Share of each pool's tokens that the layer takes."""
        return [self.config.pool_depth_capacity(pool) for pool in self.config.depth_pools]

    def forward(self, hidden_BTD: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, "DepthSelection"]:
        """Score the tokens and choose."""
        logits_BT = self.logits(hidden_BTD).squeeze(-1)
        selection = DepthSelection(self, context, hidden_BTD, torch.sigmoid(logits_BT))
        self._choose(selection)
        return logits_BT, selection

    @torch.no_grad()
    def _choose(self, selection: "DepthSelection") -> None:
        context, member_GBT, statistics = selection.context, None, None
        rule = rule_of(context.depth_routing)
        if context.track or not rule.is_causal:
            member_GBT = selection.is_token_BT.unsqueeze(0)
            if len(self.capacities) > 1:
                pool_G11 = torch.arange(len(self.capacities), device=member_GBT.device).view(-1, 1, 1)
                member_GBT = member_GBT & (context.modality_BT == pool_G11)
            selection.best_BT, statistics = self._rank(selection.scores_BT, member_GBT)
        selection.chosen_BT = rule.choose(selection)  # pyright: ignore[reportOptionalCall]
        if context.rows.padding_BT is not None:
            selection.chosen_BT = selection.chosen_BT & ~context.rows.padding_BT
        if not context.track or member_GBT is None or statistics is None:
            return
        if rule.moves_bias:
            share_G = (member_GBT & selection.chosen_BT).sum((1, 2)) / member_GBT.sum((1, 2)).clamp(min=1)
            deficits = [capacity - share for capacity, share in zip(self.capacities, share_G)]
            statistics = statistics._replace(load_deficit_C=torch.stack(deficits))
        context.step_of(self).statistics = statistics

    def _rank(self, scores_BT: torch.Tensor, member_GBT: torch.Tensor) -> tuple[torch.Tensor, RouterStatistics]:
        """Return the top K of all pools, `[B, T]`, and where they part from the others."""
        num_rows, length = scores_BT.shape
        # position by position, so that none of several equal rows comes before the others
        member_GN = member_GBT.transpose(1, 2).flatten(1)
        # scores of tokens are higher
        scores_GN = torch.where(member_GN, scores_BT.t().flatten(), -1.0)
        sorted_GN, order_GN = scores_GN.sort(dim=-1, descending=True, stable=True)
        count_G = member_GN.sum(-1)
        taken = [ceil_share(exact_share(share), count) for share, count in zip(self.capacities, count_G)]
        last_G1 = (torch.stack(taken) - 1).clamp(min=0).unsqueeze(-1)
        kth_G1, place_G1 = sorted_GN.gather(-1, last_G1), order_GN.gather(-1, last_G1) // num_rows
        place_N = torch.arange(scores_GN.shape[-1], device=scores_GN.device) // num_rows
        best_GN = member_GN & ((scores_GN > kth_G1) | ((scores_GN == kth_G1) & (place_N <= place_G1)))
        lower_G, count_G = lower_scores(scores_GN, kth_G1).amax(-1), (count_G > 0).float()
        return best_GN.any(0).view(length, num_rows).t(), RouterStatistics(kth_G1[:, 0], lower_G, count_C=count_G)


class DepthSelection:
    """Which tokens a depth layer processes: from the scores that a rule chooses by to where they lie in the layer.

    Args:
        router ([`MomaDepthRouter`]):
            that gave the scores.
        context ([`RoutingContext`]):
            of the batch.
        hidden_BTD (`torch.Tensor`):
            the residual stream.
        scores_BT (`torch.Tensor`):
            what a rule chooses by; they also scale the layer's update, in fp32.

    Attributes:
        best_BT:
            the top K of each pool, `[B, T]`: known in training and to rules that are not causal.
        chosen_BT:
            True where the layer processes the token, `[B, T]`.
        rows, counts:
            the `R` rows that take part, and how many tokens of each are chosen, on the host.
        split:
            expert groups of the chosen tokens.
        token_P, place_P:
            chosen positions in the flat batch, and their slots in the flat packed rows, `[P]`.
        cache:
            the model's.
        num_stored, slot_RS:
            tokens that the cache has of each row that takes part, and where they stood, -1 at padding, `[R, S]`.
    """

    best_BT: torch.Tensor
    chosen_BT: torch.Tensor
    rows: list[int]
    counts: list[int]
    split: Any
    token_P: torch.Tensor
    place_P: torch.Tensor
    row_R: torch.Tensor
    count_R: torch.Tensor
    cache: Cache
    num_stored: list[int]
    slot_RS: torch.Tensor | None = None
    past = 0
    is_step = False
    is_recorded = False

    def __init__(
        self, router: MomaDepthRouter, context: RoutingContext, hidden_BTD: torch.Tensor, scores_BT: torch.Tensor
    ):
        self.router, self.context = router, context
        self.hidden_BTD, self.scores_BT = hidden_BTD, scores_BT
        self.num_rows, self.length = scores_BT.shape

    @property
    def is_token_BT(self) -> torch.Tensor:
        """False at padding, `[B, T]`."""
        padding_BT = self.context.rows.padding_BT
        return torch.ones_like(self.scores_BT, dtype=torch.bool) if padding_BT is None else ~padding_BT

    def by_pool(self, values_G: torch.Tensor) -> torch.Tensor:
        """Give each token its pool's value, `[B, T]`, or `[1]` where there is one pool."""
        return values_G if len(values_G) == 1 else values_G[self.context.modality_BT]

    # the device sync for numbers of tokens would break the graph here and in every caller
    @torch.compiler.disable
    def pack(self, keep_empty_rows: bool) -> None:
        """Find where the chosen tokens of each row go at its front, with one device sync."""
        chosen_BT = self.chosen_BT
        # never a fixed one: see [`routing_of_batch`]
        split: Any = self.context.split
        groups = list(split.counts)
        group_BT = torch.where(chosen_BT, split.group_BT, len(groups))
        index_G11 = torch.arange(len(groups), device=chosen_BT.device).view(-1, 1, 1)
        count_B = chosen_BT.sum(1)
        numbers = torch.cat([count_B, (group_BT == index_G11).sum((1, 2))]).tolist()
        counts = dict(enumerate(numbers[: self.num_rows]))
        self.rows = [row for row, count in counts.items() if count or keep_empty_rows]
        self.counts = [counts[row] for row in self.rows]
        if not self.rows:
            return
        self.token_P = _places_of(chosen_BT.flatten(), sum(self.counts))
        takes_part_B = (count_B > 0) | keep_empty_rows
        self.row_R = _places_of(takes_part_B, len(self.rows))
        self.count_R = count_B.index_select(0, self.row_R)
        # one before each row's first slot, where the row takes part
        before_B1 = ((takes_part_B.cumsum(0) - 1) * self.num_places - 1).unsqueeze(-1)
        self.place_P = (chosen_BT.cumsum(1) + before_B1).flatten().index_select(0, self.token_P)
        self.split, self.num_stored = split, [0]
        if not (self.is_step and self.is_whole):
            group_counts = dict(zip(groups, numbers[self.num_rows :]))
            self.split = ModalitySplit.from_groups(self.choose(split.group_BT), group_counts)

    def attach(self, cache: Cache, stored: "MomaDepthCacheLayer | MomaStaticDepthCacheLayer") -> None:
        """Stand for the cache in this layer, whose attention knows of keys and values alone."""
        self.cache, self.past = cache, stored.get_seq_length()
        if self.rows and stored.is_initialized:
            self.num_stored = [stored.lengths[row] for row in self.rows]
            self.slot_RS = stored.slots[:, : max(self.num_stored)].index_select(0, self.row_R)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`_RaggedRows.update`]."""
        return self.cache.update(keys, values, layer_idx, selection=self)

    @property
    def num_places(self) -> int:
        """Slots `C` of a packed row."""
        return max(1, *self.counts)

    @property
    def is_whole(self) -> bool:
        """Whether all rows take part."""
        return len(self.rows) == self.num_rows

    @property
    def index_RC(self) -> torch.Tensor:
        """The position of each slot's token in its row, `[R, C]`; padding slots have the last one."""
        last_RC = self.token_P.new_full((len(self.rows) * self.num_places,), self.length - 1)
        return last_RC.index_copy(0, self.place_P, self.token_P % self.length).view(len(self.rows), self.num_places)

    def choose(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Return the chosen tokens, `[1, P, ...]`, of a step `[R, 1, ...]`; one row stands for all."""
        if self.is_step and self.is_whole:
            return x_BT
        token_P = self.token_P if x_BT.shape[0] > 1 else self.token_P % self.length
        # index_select, whose backward is much cheaper than that of indexing on CPU
        return x_BT.flatten(0, 1).index_select(0, token_P).unsqueeze(int(self.is_step))

    def lay_out(self, states_1HPd: torch.Tensor) -> torch.Tensor:
        """Lay out heads of chosen tokens in rows, `[1, H, P, d]` to `[R, H, C, d]`, with zeros at padding slots."""
        states_PHd = states_1HPd.squeeze(0).transpose(0, 1)
        rows = states_PHd.new_zeros(len(self.rows) * self.num_places, *states_PHd.shape[1:])
        rows = rows.index_copy(0, self.place_P, states_PHd)
        return rows.unflatten(0, (len(self.rows), self.num_places)).transpose(1, 2)

    def take_out(self, x_RCD: torch.Tensor) -> torch.Tensor:
        """Return the chosen tokens without the padding slots, `[R, C, ...]` to `[1, P, ...]`."""
        return x_RCD.flatten(0, 1).index_select(0, self.place_P).unsqueeze(0)

    def add_back(self, hidden_BTD: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """Add the weighted updates of the chosen tokens; the others leave bit for bit as they came."""
        weight_P1 = self.scores_BT.flatten().index_select(0, self.token_P).unsqueeze(-1)
        update_PD = (update.flatten(0, 1) * weight_P1.to(update.dtype)).to(hidden_BTD.dtype)
        return hidden_BTD.flatten(0, 1).index_add(0, self.token_P, update_PD).view_as(hidden_BTD)

    def chosen_lengths(self, lengths: FlashAttentionKwargs) -> FlashAttentionKwargs:
        """Return the lengths of documents, counting chosen tokens only, see [`packed_lengths`]; some may be 0.

        The longest document stays as long as it was, for the device sync that its number would cost.
        """
        # chosen tokens lie in the order of the batch: how many come before a document is where it begins among them
        starts_E: Any = lengths.get("cu_seq_lens_q")
        starts_E = torch.searchsorted(self.token_P, starts_E.to(self.token_P.dtype), out_int32=True)
        return {**lengths, "cu_seq_lens_q": starts_E, "cu_seq_lens_k": starts_E}

    def key_slots(self) -> torch.Tensor:
        """Return where the keys of an attention call stand among the positions seen, -1 at padding, `[R, K]`."""
        is_slot_RC = torch.arange(self.num_places, device=self.count_R.device) < self.count_R.unsqueeze(-1)
        slot_RC = torch.where(is_slot_RC, self.index_RC + self.past, -1)
        return slot_RC if self.slot_RS is None else torch.cat([self.slot_RS, slot_RC], dim=1)

    def mask(self, config: MomaConfig, dtype: torch.dtype) -> torch.Tensor | BlockMask | None:
        """Return the attention mask over cached keys and the chosen tokens, in the form that the backend wants.

        Packing keeps the order of a row, so the order of the columns is the causal one.
        """
        name, rows = config._attn_implementation, self.context.rows
        if rows.own_mask_BHQS is not None:
            return self._pack_own_mask(rows.own_mask_BHQS, dtype)
        if name not in ALL_MASK_ATTENTION_FUNCTIONS:
            return None
        num_stored, is_key_RK = max(self.num_stored), None
        if self.is_step:
            if self.slot_RS is None or min(self.num_stored) == num_stored:
                return None
            # a row's new token stands right behind its stored ones
            is_key_RK = pad(self.slot_RS >= 0, (1, 0), value=True)
            if name == "sdpa":
                return is_key_RK[:, None, None]
        elif num_stored:
            # no mask for padding slots alone: without cached keys they come after their row's tokens
            is_key_RK = self.key_slots() >= 0
        mask_function = causal_mask_function
        if rows.document_BT is not None:
            document_RC = rows.document_BT.expand(self.num_rows, -1)[self.row_R.unsqueeze(-1), self.index_RC]
            mask_function = and_masks(mask_function, same_document(document_RC))
        return ALL_MASK_ATTENTION_FUNCTIONS[name](
            batch_size=len(self.rows),
            q_length=self.num_places,
            kv_length=num_stored + self.num_places,
            q_offset=num_stored,
            kv_offset=0,
            mask_function=mask_function,
            attention_mask=is_key_RK,
            allow_is_causal_skip=not self.is_step and rows.document_BT is None,
            dtype=dtype,
            config=config,
            device=self.token_P.device,
        )

    def _pack_own_mask(self, mask_BHQS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if mask_BHQS.is_floating_point():
            # FSDP casts a layer's arguments, which the context is not
            mask_BHQS = mask_BHQS.to(dtype)
        slot_R1K = self.key_slots().unsqueeze(1)
        mask_HBQS = mask_BHQS.expand(self.num_rows, -1, -1, -1).transpose(0, 1)
        mask_HRCK = mask_HBQS[:, self.row_R.view(-1, 1, 1), self.index_RC.unsqueeze(-1), slot_R1K.clamp(min=0)]
        hidden = False if mask_BHQS.dtype == torch.bool else torch.finfo(dtype).min
        return torch.where(slot_R1K >= 0, mask_HRCK, hidden).transpose(0, 1)

    def unpack_attention(self, weights_RHCK: torch.Tensor | None) -> torch.Tensor | None:
        """Lay attention weights out over all positions seen, with zeros for the tokens that passed by."""
        if weights_RHCK is None or not self.is_recorded:
            return None
        num_seen = self.past + self.length
        # padding goes to one more column
        slot_RHCK = (self.key_slots() % (num_seen + 1))[:, None, None].expand_as(weights_RHCK)
        wide = weights_RHCK.new_zeros(*weights_RHCK.shape[:3], num_seen + 1).scatter(-1, slot_RHCK, weights_RHCK)
        wide_PHS = self.take_out(wide[..., :num_seen].transpose(1, 2)).squeeze(0)
        full = wide_PHS.new_zeros(self.num_rows * self.length, *wide_PHS.shape[1:])
        return full.index_copy(0, self.token_P, wide_PHS).unflatten(0, (self.num_rows, self.length)).transpose(1, 2)


def _places_of(is_wanted_N: torch.Tensor, number: int) -> torch.Tensor:
    """Return the places of what is True, in order, where their number is known: so no device sync is needed."""
    return is_wanted_N.byte().argsort(descending=True, stable=True)[:number]


DepthFunction = Callable[[DepthSelection], torch.Tensor]


def depth_rule(name: str) -> Callable[[DepthFunction], DepthFunction]:
    """Let a function choose for depth layers under a rule that is entered for experts.

    It is called with a [`DepthSelection`] to be and gives a mask `[B, T]`.
    """

    def enter(function: DepthFunction) -> DepthFunction:
        rule_of(name).choose = function
        return function

    return enter


@depth_rule("expert_choice")
def depth_expert_choice(tokens: DepthSelection) -> torch.Tensor:
    """Return the best tokens of each pool, `[B, T]`."""
    return tokens.best_BT


@depth_rule("threshold")
def depth_threshold(tokens: DepthSelection) -> torch.Tensor:
    """Return the tokens whose scores reach the threshold of their pool, `[B, T]`."""
    router, state = tokens.router, tokens.context.router_state(tokens.router)
    chosen_BT = tokens.scores_BT >= tokens.by_pool(state.threshold)
    if tokens.context.track and router.warmup_steps and not router.is_frozen:
        chosen_BT = torch.where(tokens.by_pool(state.num_updates < router.warmup_steps), tokens.best_BT, chosen_BT)
    return chosen_BT


@depth_rule("token_choice")
def depth_token_choice(tokens: DepthSelection) -> torch.Tensor:
    """Return the tokens whose scores, with the bias of their pool, reach the middle, `[B, T]`."""
    return tokens.scores_BT + tokens.by_pool(tokens.context.router_state(tokens.router).balance_bias) >= _MIDDLE


@depth_rule("auxiliary")
def depth_auxiliary(tokens: DepthSelection) -> torch.Tensor:
    """Return the tokens of which the auxiliary router predicts that their pool would take them, `[B, T]`."""
    predicted_BT = tokens.router.predicted_scores(tokens.hidden_BTD).squeeze(-1)
    return predicted_BT >= tokens.by_pool(tokens.router.auxiliary.threshold)


class DepthLayer(nn.Module):
    """The forward of a decoder layer for the tokens that its depth router chooses (MoMa section 2.3).

    To be mixed into a decoder layer. Attention and experts see the chosen tokens alone: attention packed to the front
    of their rows, all else as one row without padding. The update that the layer makes to a token is scaled by
    the token's score. All other tokens leave as they came.

    In steps of one token with a cache there is nothing to pack: those rows take part that have chosen their token.
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
        _, selection = self.depth_router(hidden_states, routing_context)
        # weights take part in every training step and wherever processes wait for one another; a recorded layer has
        # attentions and router logits in every step
        selection.is_recorded = any(
            kwargs.get(name, getattr(self.config, name)) for name in ("output_attentions", "output_router_logits")
        )
        keep_empty_rows = self.training or is_distributed() or selection.is_recorded
        # not passed on: position ids and tiles count all tokens, those that were not chosen too
        kwargs.pop("position_ids", None)
        kwargs.pop("tiles", None)
        lengths: Any = {name: kwargs.pop(name, None) for name in FLASH_LENGTHS}
        stored = None if cache is None else depth_cache_layer(cache, self.layer_idx)
        is_step = stored is not None and hidden_states.shape[1] == 1 and routing_context.rows.own_mask_BHQS is None
        selection.is_step = is_step and not keep_empty_rows
        selection.pack(keep_empty_rows)
        packed_cache = None
        if cache is not None and stored is not None:
            if routing_context.rows.hidden is not None:
                stored.hide(*routing_context.rows.hidden)
            selection.attach(cache, stored)
            packed_cache = selection
        if not selection.rows:
            if packed_cache is not None:
                nothing = hidden_states.new_empty(hidden_states.shape[0], 1, 0, 1)
                packed_cache.update(nothing, nothing, self.layer_idx)
            return hidden_states
        x = selection.choose(hidden_states)
        if lengths["cu_seq_lens_q"] is not None and uses_flash_attention_mask(self.config) and any(selection.counts):
            # nothing but lengths tells rows apart, either
            layout = {"attention_mask": None, **selection.chosen_lengths(lengths)}
        else:
            packing = None if selection.is_step else selection
            layout = {"attention_mask": selection.mask(self.config, x.dtype), "packing": packing}
        context = routing_context.for_tokens(selection.split, selection.choose(routing_context.modality_BT))
        attention_update = self.attention_update(
            x,
            context,
            position_embeddings=tuple(map(selection.choose, position_embeddings)),  # pyright: ignore[reportArgumentType]
            cache=packed_cache,
            **layout,
            **kwargs,
        )
        update = attention_update + self.ffn_update(x + attention_update, context)
        return selection.add_back(hidden_states, update)


class _RaggedRows:
    """What both layers share: rows of different lengths behind the interface of a cache layer.

    As in the library's dynamic layer, nothing is written to memory that a copy of the layer or a backward may read.
    """

    # where the stored tokens stand among those seen, -1 behind the last one, `[B, S]`
    slots: Any
    keys: Any
    values: Any
    device: torch.device
    is_initialized: bool
    num_hidden = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cumulative_length: int = 0
        self.lengths: list[int] = []

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.slots = None
        self.is_initialized, self.cumulative_length, self.lengths, self.num_hidden = False, 0, [], 0

    def get_seq_length(self) -> int:
        """Return the tokens seen, chosen or not: what masks and positions count by."""
        return self.cumulative_length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, selection: DepthSelection, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the chosen tokens, and return the keys and values that they see, `[R, H, K, d]`."""
        position, self.cumulative_length = self.cumulative_length, self.cumulative_length + selection.length
        if not selection.rows:
            return key_states, value_states
        if not self.is_initialized:
            self.device, self.is_initialized, self.lengths = key_states.device, True, [0] * selection.num_rows
            self.slots = selection.row_R.new_empty(selection.num_rows, 0)
            self.keys, self.values = (
                x.new_empty(selection.num_rows, x.shape[1], 0, x.shape[3]) for x in (key_states, value_states)
            )
        num_stored, before = max(selection.num_stored), (self.keys, self.values)
        row_P, place_P = selection.token_P // selection.length, selection.token_P % selection.length
        column_P = (self.slots >= 0).sum(1).index_select(0, row_P) + selection.place_P % selection.num_places
        new = dict(zip(selection.rows, selection.counts))
        self.lengths = [length + new.get(row, 0) for row, length in enumerate(self.lengths)]
        more = max(self.lengths) - self.slots.shape[1]
        self.keys, self.values = (pad(x, (0, 0, 0, more)) for x in before)
        self.slots = pad(self.slots, (0, more), value=-1)
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            kept[row_P, :, column_P] = selection.take_out(states.transpose(1, 2)).squeeze(0)
        self.slots[row_P, column_P] = place_P + position
        if not selection.is_step:
            old = (x[:, :, :num_stored].index_select(0, selection.row_R) for x in before)
            keys, values = (torch.cat(pair, dim=2) for pair in zip(old, (key_states, value_states)))
            return keys, values
        keys, values = (x[:, :, : num_stored + 1] for x in (self.keys, self.values))
        if selection.is_whole:
            return keys, values
        return keys.index_select(0, selection.row_R), values.index_select(0, selection.row_R)

    def hide(self, mask_BS: torch.Tensor, num_before: int, num_after: int) -> None:
        """Forget, for good, tokens that a mask hides and that none hid when they were stored."""
        if self.is_initialized and num_before != self.num_hidden:
            is_seen_BS = mask_BS.to(self.device) != 0
            self._keep(is_seen_BS.gather(1, self.slots.clamp(min=0)))
        self.num_hidden = num_after

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens seen, and those of them that were stored."""
        if not 0 <= -tokens_to_remove <= self.cumulative_length:
            raise InputError(
                f"`tokens_to_remove` = {tokens_to_remove}: crop takes minus the number of tokens to remove, of the "
                f"{self.cumulative_length} that have been seen."
            )
        self.cumulative_length += tokens_to_remove
        # how many of them are among those that are left is not known
        self.num_hidden = -1 if self.num_hidden else 0
        if self.is_initialized:
            self._keep(self.slots < self.cumulative_length)

    def _keep(self, is_kept_BS: torch.Tensor) -> None:
        """Forget all other stored tokens."""
        is_kept_BS = is_kept_BS & (self.slots >= 0)
        order_BS = is_kept_BS.byte().argsort(dim=1, descending=True, stable=True)
        self.keys, self.values = (
            x.take_along_dim(order_BS[:, None, :, None].to(x.device), dim=2) for x in (self.keys, self.values)
        )
        self.slots = torch.where(is_kept_BS, self.slots, -1).gather(1, order_BS)
        self.lengths = is_kept_BS.sum(1).tolist()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row `i` what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`."""
        if not self.is_initialized:
            return
        rows = torch.arange(len(self.lengths), device=indices.device)[indices]
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.keys, self.values, self.slots = (
            x.index_select(0, rows.to(x.device)) for x in (self.keys, self.values, self.slots)
        )


class MomaDepthCacheLayer(_RaggedRows, DynamicLayer):
    """Has as many columns as the fullest row has chosen tokens."""

    _layer_type = DEPTH_LAYER_TYPE


class MomaStaticDepthCacheLayer(_RaggedRows, StaticLayer):
    """The same in a static cache: steps choose different numbers of tokens, so the layer cannot be compiled."""

    _layer_type = DEPTH_LAYER_TYPE
    is_compileable = False
    supports_early_init = False


def depth_cache_layer(cache: Cache, layer_idx: int) -> MomaDepthCacheLayer | MomaStaticDepthCacheLayer:
    """Return the part of a cache that serves a depth layer."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    # by its kind, as Transformers makes it of the class of that copy of this module that was imported last
    if getattr(layer, "_layer_type", None) != DEPTH_LAYER_TYPE:
        raise TypeError(
            f"`cache` has a {type(layer).__name__} for layer {layer_idx}, a {DEPTH_LAYER_TYPE!r} layer. Build it "
            "from the model's config: DynamicCache(config=model.config) or StaticCache(model.config, max_cache_len). "
            "PEFT's prefix tuning, which fills a cache of its own, needs a model without depth layers."
        )
    return cast("MomaDepthCacheLayer | MomaStaticDepthCacheLayer", layer)
