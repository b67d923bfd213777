# SPDX-License-Identifier: Apache-2.0
"""Mixture of depths: how the chosen tokens are packed for a layer, masked, cached and put back (MoMa section 2.3).

Shape suffixes:
    B rows, T positions, D hidden size, R rows with chosen tokens, C places of a packed row, P chosen tokens, S keys
    that the cache holds, K = S + C keys of an attention call, H heads, E documents of the batch and one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, causal_mask_function
from transformers.masking_utils import packed_sequence_mask_function as same_document

from .cache_moma import MomaDepthCacheLayer, MomaStaticDepthCacheLayer
from .configuration_moma import DEPTH_LAYER_TYPE, MomaConfig
from .modality_split_moma import ModalitySplit
from .routing_context_moma import RoutingContext


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

    def chosen_lengths(self, lengths: dict[str, Any]) -> dict[str, Any]:
        """The lengths of documents without the tokens that were not chosen, see [`packed_lengths`]; some may be 0.

        The longest document stays as long as it was, for the wait that its number would cost.
        """
        # chosen tokens lie in the order of the batch: how many come before a document is where it begins among them
        starts_E = lengths["cu_seq_lens_q"].to(self.token_P.dtype)
        starts_E = torch.searchsorted(self.token_P, starts_E, out_int32=True)
        return {**lengths, "cu_seq_lens_q": starts_E, "cu_seq_lens_k": starts_E}

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
) -> torch.Tensor | BlockMask | None:
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
    num_stored, is_key_RK = 0, None
    # without cached keys every hole comes after its row's tokens, where none of them looks
    if slot_RS is not None and slot_RS.shape[1]:
        num_stored = slot_RS.shape[1]
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


def _pack_custom_mask(
    packing: DepthPacking, mask_BHQS: torch.Tensor, dtype: torch.dtype, slot_RS: torch.Tensor | None, past: int
) -> torch.Tensor:
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


class PackedCache:
    """A view of the model's cache that tells a depth layer's part of it where the packed tokens stand."""

    def __init__(self, cache: Cache, packing: DepthPacking, capacity: float):
        self.cache, self.packing, self.capacity = cache, packing, capacity

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`MomaDepthCacheLayer.update`]."""
        return self.cache.update(keys, values, layer_idx, packing=self.packing, capacity=self.capacity)


class StepCache:
    """A view of the model's cache for a step of one token, in which some rows take part."""

    def __init__(self, cache: Cache, rows: list[int], num_rows: int, capacity: float):
        self.cache, self.rows, self.num_rows, self.capacity = cache, rows, num_rows, capacity

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`MomaDepthCacheLayer.update`]."""
        return self.cache.update(
            keys, values, layer_idx, rows=self.rows, num_rows=self.num_rows, capacity=self.capacity
        )


def step_mask(
    config: MomaConfig, lengths: list[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor | BlockMask | None:
    """The attention mask of one token in each of several rows over the row's keys, itself the last of them.

    Args:
        config (`MomaConfig`): gives the attention implementation.
        lengths (`list[int]`): keys of each row; those of the fullest are the columns.
        dtype (`torch.dtype`): of additive masks.
        device (`torch.device`): of the mask.
    """
    num_keys = max(lengths)
    if min(lengths) == num_keys or config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    length_R1 = torch.tensor(lengths, device=device).unsqueeze(-1)
    is_key_RS = torch.arange(num_keys, device=device) < length_R1
    if config._attn_implementation == "sdpa":
        return is_key_RS[:, None, None]
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=len(lengths),
        q_length=1,
        kv_length=num_keys,
        q_offset=num_keys - 1,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=is_key_RS,
        allow_is_causal_skip=False,
        dtype=dtype,
        config=config,
        device=device,
    )


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


__all__ = [
    "DepthPacking",
    "PackedCache",
    "StepCache",
    "depth_cache_layer",
    "pack_chosen",
    "packed_causal_mask",
    "step_mask",
]
