# SPDX-License-Identifier: Apache-2.0
"""Mixture of depths: how the chosen tokens are packed for a layer, masked, cached and put back (MoMa section 2.3).

A cache keeps for each row of a depth layer the keys of its own chosen tokens, and no others.

Shape suffixes:
    B rows, T positions, D hidden size, R rows with chosen tokens, C slots of a packed row, P chosen tokens, S columns
    that the cache holds, K = S + C keys of an attention call, H heads, d head size, E documents of the batch and one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, causal_mask_function
from transformers.masking_utils import packed_sequence_mask_function as same_document
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from .configuration_moma import DEPTH_LAYER_TYPE, MomaConfig
from .errors_moma import InputError
from .routing_moma import ceil_share, exact_share
from .token_groups_moma import ModalitySplit, RoutingContext


# columns by which a dynamic layer grows at once
_COLUMNS = 8
# least growth factor of a static layer when a row chooses more tokens than fit
_GROWTH = 1.25
# attribute of keys: the `lengths` of the layer that may write behind them
_WRITER = "_moma_writer"


class _RaggedRows:
    """What both layers share: rows of different lengths behind the interface of a cache layer.

    Of the copies of a layer, however they were made, the first to go on writes behind what all of them have stored,
    and each other one takes memory of its own when it goes on.
    """

    cumulative_length: int
    lengths: list[int]
    length_B: torch.Tensor
    is_initialized: bool
    num_hidden = 0
    # whether `lengths` are those of `length_B`
    is_counted = True
    # `None` until a first token is stored
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    # subclasses define these: columns to begin with, and columns needed for so many tokens
    _first_columns: Callable[[float], int]
    _more_columns: Callable[[int], int]

    def get_seq_length(self) -> int:
        """Return the tokens seen, chosen or not: what masks and positions count by."""
        return self.cumulative_length

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args,
        packing: "DepthPacking | None" = None,
        rows: list[int] | None = None,
        row_R: torch.Tensor | None = None,
        num_rows: int = 0,
        chosen_B: torch.Tensor | None = None,
        num_skipped: int = 0,
        capacity: float = 1.0,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the chosen tokens of one step."""
        if chosen_B is not None:
            return self._append_masked(key_states, value_states, chosen_B, capacity)
        if packing is None and rows is None:
            self.cumulative_length += num_skipped
            return key_states, value_states
        if not self.is_initialized:
            self._allocate(key_states, value_states, packing.num_rows if packing else num_rows, capacity)
        if packing is None:
            return self._append_step(key_states, value_states, rows, row_R)  # pyright: ignore[reportArgumentType]
        num_columns = self._num_columns(packing)
        old_keys, old_values = (x[:, :, :num_columns].index_select(0, packing.row_R) for x in (self.keys, self.values))
        self._append(key_states, value_states, packing)
        return torch.cat((old_keys, key_states), dim=2), torch.cat((old_values, value_states), dim=2)

    def stored_slots(self, packing: "DepthPacking") -> torch.Tensor:
        """Return the slots of the stored tokens of the rows that take part, -1 at padding slots, `[R, S]`."""
        if not self.is_initialized:
            return packing.row_R.new_empty(len(packing.rows), 0)
        slot_RS = self.slots[:, : self._num_columns(packing)].index_select(0, packing.row_R).long()
        length_R = self.length_B.index_select(0, packing.row_R)
        return torch.where(_is_stored(slot_RS, length_R), slot_RS, -1)

    def prepare_masked_step(self) -> torch.Tensor | None:
        """Make room for a step of one token in which any row may store it, and tell where its keys will be.

        Columns are added for rows that are full, and with a device sync it is found out which are.
        """
        if not self.is_initialized:
            return None
        needed = max(self.lengths) + 1
        if needed > self.keys.shape[2]:
            self._sync_lengths()
            needed = max(self.lengths) + 1
            # not a question in every step where few columns are left
            self._make_columns(1, needed + _COLUMNS)
        else:
            self._make_columns(1, needed)
        return torch.arange(needed, device=self.device) <= self.length_B.unsqueeze(-1)

    def _sync_lengths(self) -> None:
        """Find out the stored tokens of each row, with a device sync."""
        if not self.is_counted:
            is_writer = vars(self.keys).get(_WRITER) is self.lengths
            self.lengths, self.is_counted = self.length_B.tolist(), True
            if is_writer:
                vars(self.keys)[_WRITER] = self.lengths

    def step_lengths(self, rows: list[int]) -> list[int]:
        """Return stored tokens of rows once each has stored one more."""
        self._sync_lengths()
        return [self.lengths[row] + 1 for row in rows] if self.is_initialized else [1] * len(rows)

    def step_keys(self, rows: list[int], row_R: torch.Tensor | None) -> torch.Tensor | None:
        """Return which columns hold keys of rows once each has stored one more, `[R, S]`; `None` where all do."""
        lengths = self.step_lengths(rows)
        if min(lengths) == max(lengths):
            return None
        length_R = self.length_B if row_R is None else self.length_B.index_select(0, row_R)
        return torch.arange(max(lengths), device=length_R.device) <= length_R.unsqueeze(-1)

    def hide(self, mask_BS: torch.Tensor, num_before: int, num_after: int) -> None:
        """Forget, for good, tokens that a mask hides and that none hid when they were stored."""
        if self.is_initialized and self.cumulative_length and num_before != self.num_hidden:
            is_seen_BS = mask_BS.to(self.device) != 0
            # what stands behind a row's tokens may be a slot of later ones
            slot_BS = self.slots.long().clamp(max=self.cumulative_length - 1)
            is_kept_BS = _is_stored(self.slots, self.length_B) & is_seen_BS.gather(1, slot_BS)
            order_BS = is_kept_BS.byte().argsort(dim=1, descending=True, stable=True)
            self.keys, self.values = (
                x.take_along_dim(order_BS[:, None, :, None], dim=2) for x in (self.keys, self.values)
            )
            self.slots, self.length_B = self.slots.gather(1, order_BS), is_kept_BS.sum(1)
            self.lengths, self.is_counted = self.length_B.tolist(), True
            self._mark_owner()
        self.num_hidden = num_after

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row `i` what row `beam_idx[i]` was."""
        if self.is_initialized:
            self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            self._select_rows(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows at `indices`."""
        if self.is_initialized:
            self._select_rows(torch.arange(len(self.lengths), device=indices.device)[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens seen, and those of them that were stored."""
        if tokens_to_remove > 0:
            raise InputError(
                f"`tokens_to_remove` = {tokens_to_remove}: crop takes minus the number of tokens to remove."
            )
        if -tokens_to_remove > self.cumulative_length:
            raise InputError(
                f"`tokens_to_remove` = {tokens_to_remove}: only {self.cumulative_length} tokens have been seen."
            )
        self.cumulative_length += tokens_to_remove
        # how many of them are among those that are left is not known
        self.num_hidden = -1 if self.num_hidden else 0
        if self.is_initialized:
            is_kept_BS = _is_stored(self.slots, self.length_B) & (self.slots < self.cumulative_length)
            self.length_B = is_kept_BS.sum(1)
            self.lengths, self.is_counted = self.length_B.tolist(), True

    def _num_columns(self, packing: "DepthPacking") -> int:
        """Return stored tokens of the fullest of the rows that take part."""
        self._sync_lengths()
        return max(self.lengths[row] for row in packing.rows)

    def _allocate(self, key_states: torch.Tensor, value_states: torch.Tensor, num_rows: int, capacity: float) -> None:
        self.device, self.lengths = key_states.device, [0] * num_rows
        num_columns = self._first_columns(capacity)
        self.keys, self.values = (
            x.new_zeros(num_rows, x.shape[1], num_columns, x.shape[3]) for x in (key_states, value_states)
        )
        self.slots = torch.zeros(num_rows, num_columns, dtype=torch.int32, device=self.device)
        self.length_B = torch.zeros(num_rows, dtype=torch.long, device=self.device)
        self.is_initialized = True
        self._mark_owner()

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor, packing: "DepthPacking") -> None:
        new_lengths = {row: self.lengths[row] + count for row, count in zip(packing.rows, packing.counts)}
        self._make_columns(packing.length, max(new_lengths.values()))
        row_P = packing.token_P // packing.length
        column_P = self.length_B[row_P] + packing.place_P % packing.num_places
        self.keys[row_P, :, column_P] = _new_states(key_states, packing)
        self.values[row_P, :, column_P] = _new_states(value_states, packing)
        self.slots[row_P, column_P] = (packing.token_P % packing.length + self.cumulative_length).int()
        self.cumulative_length += packing.length
        self._set_lengths(new_lengths, self.length_B + packing.count_B)

    def _append_step(
        self, key_states: torch.Tensor, value_states: torch.Tensor, rows: list[int], row_R: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = self.step_lengths(rows)
        self._make_columns(1, max(lengths))
        if len(rows) == 1:
            row, column = rows[0], lengths[0] - 1
            self.keys[row, :, column], self.values[row, :, column] = key_states[0, :, 0], value_states[0, :, 0]
            self.slots[row, column] = self.cumulative_length
            kept_keys, kept_values = self.keys[row : row + 1], self.values[row : row + 1]
        else:
            place_R = torch.arange(len(rows), device=self.device) if row_R is None else row_R
            column_R = self.length_B if row_R is None else self.length_B.index_select(0, row_R)
            self.keys[place_R, :, column_R], self.values[place_R, :, column_R] = (
                x[:, :, 0] for x in (key_states, value_states)
            )
            self.slots[place_R, column_R] = torch.full_like(self.slots[:1, 0], self.cumulative_length)
            kept_keys, kept_values = (
                x if row_R is None else x[:, :, : max(lengths)].index_select(0, row_R)
                for x in (self.keys, self.values)
            )
        self.cumulative_length += 1
        one_R = torch.ones_like(self.length_B[: len(rows)])
        length_B = self.length_B + 1 if row_R is None else self.length_B.index_add(0, row_R, one_R)
        self._set_lengths(dict(zip(rows, lengths)), length_B)
        return kept_keys[:, :, : max(lengths)], kept_values[:, :, : max(lengths)]

    def _append_masked(
        self, key_states: torch.Tensor, value_states: torch.Tensor, chosen_B: torch.Tensor, capacity: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows = key_states.shape[0]
        if not self.is_initialized:
            self._allocate(key_states, value_states, num_rows, capacity)
            self._make_columns(1, 1)
        row_B, needed = torch.arange(num_rows, device=self.device), max(self.lengths) + 1
        # what a row has not chosen stands behind its keys, where its next one will stand
        self.keys[row_B, :, self.length_B] = key_states[:, :, 0]
        self.values[row_B, :, self.length_B] = value_states[:, :, 0]
        self.slots[row_B, self.length_B] = torch.full_like(self.slots[:1, 0], self.cumulative_length)
        self.cumulative_length += 1
        self.length_B = self.length_B + chosen_B
        self.lengths, self.is_counted = [length + 1 for length in self.lengths], False
        self._mark_owner()
        return self.keys[:, :, :needed], self.values[:, :, :needed]

    def _set_lengths(self, new_lengths: dict[int, int], length_B: torch.Tensor) -> None:
        """Set the stored tokens of the rows that have more now, in a list that no copy has."""
        self.lengths = [new_lengths.get(row, length) for row, length in enumerate(self.lengths)]
        self.length_B = length_B
        self._mark_owner()

    def _make_columns(self, num_positions: int, needed: int) -> None:
        """Make columns of its own for rows of at most `needed` stored tokens, as so many positions come."""
        more = self._more_columns(needed) - self.keys.shape[2] if needed > self.keys.shape[2] else 0
        if more > 0:
            self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
            self.slots = torch.nn.functional.pad(self.slots, (0, more))
        # a backward may want what earlier steps have read
        elif torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._acquire_memory():
            self.keys, self.values, self.slots = self.keys.clone(), self.values.clone(), self.slots.clone()

    def _acquire_memory(self) -> bool:
        """Return whether no other copy has written behind what is stored, and reserve the right to."""
        # tensors of inference mode take no writing outside it
        is_writable = torch.is_inference_mode_enabled() or not self.keys.is_inference()
        # popped in one atomic call: copies may run in other threads
        writer = vars(self.keys).pop(_WRITER, None)
        if writer is self.lengths:
            return is_writable
        if writer is not None:
            vars(self.keys).setdefault(_WRITER, writer)
        return False

    def _mark_owner(self) -> None:
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            vars(self.keys)[_WRITER] = self.lengths

    def _select_rows(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.device)
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.keys, self.values, self.slots, self.length_B = (
            x.index_select(0, rows.to(x.device)) for x in (self.keys, self.values, self.slots, self.length_B)
        )
        self._mark_owner()


def _is_stored(slot_BS: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
    """Return which columns hold a row's own tokens, `[B, S]`: behind them a copy may have written."""
    return torch.arange(slot_BS.shape[1], device=slot_BS.device) < length_B.unsqueeze(-1)


def _new_states(states_RHCd: torch.Tensor, packing: "DepthPacking") -> torch.Tensor:
    """Return the chosen tokens' states without padding slots, `[P, H, d]`."""
    return states_RHCd.transpose(1, 2).flatten(0, 1).index_select(0, packing.place_P)


class MomaDepthCacheLayer(_RaggedRows, DynamicLayer):
    """Grows with the fullest row's chosen tokens, a few columns at a time."""

    _layer_type = DEPTH_LAYER_TYPE

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.cumulative_length = 0
        self.lengths = []
        self.slots = None  # pyright: ignore[reportAttributeAccessIssue]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.lengths, self.slots = [], None  # pyright: ignore[reportAttributeAccessIssue]
        self.is_counted, self.num_hidden = True, 0

    def _first_columns(self, capacity: float) -> int:
        return 0

    def _more_columns(self, needed: int) -> int:
        # a prompt is stored as it is, steps come one by one
        return needed if self.keys.shape[2] == 0 else needed + _COLUMNS - 1


class MomaStaticDepthCacheLayer(_RaggedRows, StaticLayer):
    """Allocated once, for the share of `max_cache_len` tokens that the layer's capacity lets through.

    The capacity holds in the mean, not for every row: a row that chooses more makes the layer grow, by a quarter at
    least and up to `max_cache_len`. Nothing is ever dropped. Steps choose different numbers of tokens, so the layer
    cannot be compiled.
    """

    _layer_type = DEPTH_LAYER_TYPE
    is_compileable = False
    supports_early_init = False

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(max_cache_len, **kwargs)
        self.cumulative_length = 0
        self.lengths = []
        self.slots = None  # pyright: ignore[reportAttributeAccessIssue]

    def reset(self) -> None:
        """Forget everything, but keep the memory."""
        is_own = self.is_initialized and self._acquire_memory()
        self.cumulative_length, self.lengths, self.is_counted = 0, [0] * len(self.lengths), True
        self.num_hidden = 0
        if self.is_initialized:
            self.length_B = torch.zeros_like(self.length_B)
        if is_own:
            vars(self.keys)[_WRITER] = self.lengths

    def _first_columns(self, capacity: float) -> int:
        return min(self.max_cache_len, ceil_share(exact_share(capacity), self.max_cache_len))

    def _more_columns(self, needed: int) -> int:
        return min(self.max_cache_len, max(needed, math.ceil(_GROWTH * self.keys.shape[2])))

    def _make_columns(self, num_positions: int, needed: int) -> None:
        if self.cumulative_length + num_positions > self.max_cache_len:
            raise InputError(
                f"The static cache was made for `max_cache_len` = {self.max_cache_len} tokens, but "
                f"{self.cumulative_length + num_positions} have come."
            )
        super()._make_columns(num_positions, needed)


@dataclass
class DepthPacking:
    """The chosen tokens of a depth layer at the front of the rows that have any, in order.

    Attributes:
        num_rows (`int`):
            rows `B` of the batch.
        length (`int`):
            positions `T` of the batch.
        rows (`list[int]`):
            the `R` rows that take part.
        counts (`list[int]`):
            chosen tokens of each of those rows.
        count_B (`torch.LongTensor`):
            chosen tokens of each row of the batch, `[B]`.
        token_P (`torch.LongTensor`):
            chosen positions in the flat batch, `[P]`.
        place_P (`torch.LongTensor`):
            their slots in the flat packed rows, `[P]`.
        split (`ModalitySplit`):
            expert groups of the chosen tokens, as one row `[1, P]`.
        slot_RS (`torch.LongTensor`, *optional*):
            where the cached keys stood, -1 at padding, `[R, S]`.
        past (`int`, *optional*, defaults to 0):
            positions seen before this forward.
        is_recorded (`bool`, *optional*, defaults to `False`):
            whether attention weights are asked for.
    """

    num_rows: int
    length: int
    rows: list[int]
    counts: list[int]
    count_B: torch.Tensor
    token_P: torch.Tensor
    place_P: torch.Tensor
    split: ModalitySplit
    slot_RS: torch.Tensor | None = None
    past: int = 0
    is_recorded: bool = False
    # made where they are asked for; functools.cached_property takes a lock, which breaks the graph of a compiler
    _row_R: torch.Tensor | None = None
    _position_P: torch.Tensor | None = None

    @property
    def num_places(self) -> int:
        """Slots `C` of a packed row."""
        return max(1, *self.counts)

    @property
    def is_whole(self) -> bool:
        """Whether all rows take part."""
        return len(self.rows) == self.num_rows

    @property
    def row_R(self) -> torch.Tensor:
        """The same as `rows`, on the device, `[R]`."""
        if self._row_R is None:
            rows_B = torch.arange(self.num_rows, device=self.token_P.device)
            self._row_R = rows_B if self.is_whole else places_of(self.count_B > 0, len(self.rows))
        return self._row_R

    @property
    def index_RC(self) -> torch.Tensor:
        """The position of each slot's token in its row, `[R, C]`; padding slots have the last one."""
        num_rows, num_places = len(self.rows), self.num_places
        last_RC = self.token_P.new_full((num_rows * num_places,), self.length - 1)
        return last_RC.index_copy(0, self.place_P, self.token_P % self.length).view(num_rows, num_places)

    @property
    def valid_RC(self) -> torch.Tensor:
        """False at the padding slots after a row's last token, `[R, C]`."""
        count_R = self.count_B if self.is_whole else self.count_B.index_select(0, self.row_R)
        return torch.arange(self.num_places, device=count_R.device) < count_R.unsqueeze(-1)

    @property
    def position_P(self) -> torch.Tensor:
        """The position of each chosen token in its row, `[P]`."""
        if self._position_P is None:
            self._position_P = self.token_P % self.length if self.num_rows > 1 else self.token_P
        return self._position_P

    def pack(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Map `[B, T, ...]` to `[R, C, ...]`; one row is taken to stand for all.

        Padding slots hold some token of their row.
        """
        return x_BT.expand(self.num_rows, *x_BT.shape[1:])[self.row_R.unsqueeze(-1), self.index_RC]

    def choose(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return the chosen tokens of all rows in one, `[B, T, D]` to `[1, P, D]`; one row stands for all."""
        token_P = self.token_P if x_BTD.shape[0] > 1 else self.position_P
        # index_select, whose backward is much cheaper than that of indexing on CPU
        return x_BTD.flatten(0, 1).index_select(0, token_P).unsqueeze(0)

    def lay_out(self, states_1HPd: torch.Tensor) -> torch.Tensor:
        """Lay out heads of chosen tokens in rows, `[1, H, P, d]` to `[R, H, C, d]`, with zeros at padding slots."""
        states_PHd = states_1HPd.squeeze(0).transpose(0, 1)
        shape_RC = len(self.rows), self.num_places
        rows = states_PHd.new_zeros(math.prod(shape_RC), *states_PHd.shape[1:])
        rows = rows.index_copy(0, self.place_P, states_PHd)
        return rows.unflatten(0, shape_RC).transpose(1, 2)

    def take_out(self, x_RCD: torch.Tensor) -> torch.Tensor:
        """Return the chosen tokens without the padding slots, `[R, C, D]` to `[1, P, D]`."""
        return x_RCD.flatten(0, 1).index_select(0, self.place_P).unsqueeze(0)

    def add_back(self, hidden_BTD: torch.Tensor, update_1PD: torch.Tensor, weight_BT: torch.Tensor) -> torch.Tensor:
        """Add the weighted updates of the chosen tokens; the others leave bit for bit as they came."""
        weight_P = weight_BT.flatten().index_select(0, self.token_P)
        update_PD = (update_1PD[0] * weight_P.unsqueeze(-1).to(update_1PD.dtype)).to(hidden_BTD.dtype)
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
        """Return where the keys of an attention call stand among the positions seen, -1 at padding, `[R, S + C]`."""
        slot_RC = torch.where(self.valid_RC, self.index_RC + self.past, -1)
        return slot_RC if self.slot_RS is None else torch.cat([self.slot_RS, slot_RC], dim=1)

    def unpack_attention(self, weights_RHCS: torch.Tensor | None) -> torch.Tensor | None:
        """Lay attention weights out over all positions seen, with zeros for the tokens that passed by."""
        if weights_RHCS is None or not self.is_recorded:
            return None
        slot_RK = self.key_slots()
        num_heads, num_places = weights_RHCS.shape[1:3]
        is_key_RK = slot_RK >= 0
        target_RHCK = slot_RK.clamp(min=0)[:, None, None].expand(-1, num_heads, num_places, -1)
        wide = weights_RHCS.new_zeros(*weights_RHCS.shape[:3], self.past + self.length)
        wide = wide.scatter_add(-1, target_RHCK, weights_RHCS * is_key_RK[:, None, None])
        wide_PH = wide.transpose(1, 2).flatten(0, 1).index_select(0, self.place_P)
        full = wide_PH.new_zeros(self.num_rows * self.length, *wide_PH.shape[1:]).index_copy(0, self.token_P, wide_PH)
        return full.unflatten(0, (self.num_rows, self.length)).transpose(1, 2)


# the device sync for numbers of tokens would break the graph here and in every caller
@torch.compiler.disable
def pack_chosen(chosen_BT: torch.Tensor, split: ModalitySplit, keep_empty_rows: bool) -> DepthPacking | None:
    """Pack the chosen tokens of each row to its front, with one device sync."""
    num_rows, length = chosen_BT.shape
    groups = list(split.counts)
    count_B = chosen_BT.sum(1)
    group_BT = torch.where(chosen_BT, split.group_BT, len(groups))
    index_G11 = torch.arange(len(groups), device=chosen_BT.device).view(-1, 1, 1)
    numbers = torch.cat([count_B, (group_BT == index_G11).sum((1, 2))]).tolist()
    row_counts, group_counts = numbers[:num_rows], numbers[num_rows:]
    rows = [row for row, count in enumerate(row_counts) if count or keep_empty_rows]
    if not rows:
        return None
    counts = [row_counts[row] for row in rows]
    num_places = max(1, *counts)
    token_P = places_of(chosen_BT.flatten(), sum(counts))
    # one before each row's first slot, where the row takes part
    if len(rows) == num_rows:
        before_B = torch.arange(-1, num_rows * num_places - 1, num_places, device=chosen_BT.device)
    else:
        before_B = (count_B > 0).cumsum(0) * num_places - (num_places + 1)
    place_P = (chosen_BT.cumsum(1) + before_B.unsqueeze(-1)).flatten().index_select(0, token_P)
    group_1P = split.group_BT.flatten().index_select(0, token_P).unsqueeze(0)
    packed_split = ModalitySplit.from_groups(group_1P, dict(zip(groups, group_counts)))
    return DepthPacking(num_rows, length, rows, counts, count_B, token_P, place_P, packed_split)


def places_of(is_wanted_N: torch.Tensor, number: int) -> torch.Tensor:
    """Return the places of what is True, in order, where their number is known: so no device sync is needed."""
    return is_wanted_N.byte().argsort(descending=True, stable=True)[:number]


def packed_causal_mask(
    config: MomaConfig,
    packing: DepthPacking,
    context: RoutingContext,
    dtype: torch.dtype,
) -> torch.Tensor | BlockMask | None:
    """Return the attention mask of packed tokens over cached keys and themselves, in the form that the backend wants.

    The keys are the `S` columns of the cache, then the `C` packed tokens. Packing keeps the order of a row, so the
    order of the columns is the causal one.
    """
    if context.custom_mask_BHQS is not None:
        return _pack_custom_mask(packing, context.custom_mask_BHQS, dtype)
    if config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    num_rows, num_places = len(packing.rows), packing.num_places
    num_stored, is_key_RK = 0, None
    # no mask for padding slots: without cached keys they come after their row's tokens
    if packing.slot_RS is not None and packing.slot_RS.shape[1]:
        num_stored = packing.slot_RS.shape[1]
        is_key_RK = torch.cat([packing.slot_RS >= 0, packing.valid_RC], dim=1)
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
        device=packing.token_P.device,
    )


def _pack_custom_mask(packing: DepthPacking, mask_BHQS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask_BHQS.is_floating_point():
        # FSDP casts a layer's arguments, which the context is not
        mask_BHQS = mask_BHQS.to(dtype)
    slot_RK = packing.key_slots()
    mask_RHQS = mask_BHQS.expand(packing.num_rows, -1, -1, -1).index_select(0, packing.row_R)
    query_RHCS = packing.index_RC[:, None, :, None].expand(-1, mask_RHQS.shape[1], -1, mask_RHQS.shape[3])
    mask_RHCS = mask_RHQS.gather(2, query_RHCS)
    key_RHCK = slot_RK.clamp(min=0)[:, None, None].expand(*mask_RHCS.shape[:3], -1)
    mask_RHCK = mask_RHCS.gather(3, key_RHCK)
    hidden = False if mask_RHCK.dtype == torch.bool else torch.finfo(mask_RHCK.dtype).min
    return torch.where((slot_RK >= 0)[:, None, None], mask_RHCK, hidden)


class DepthCacheView:
    """A depth layer's part of the model's cache in one forward: its attention knows of keys and values alone."""

    def __init__(self, cache: Cache, capacity: float, **step: Any):
        self.cache, self.step = cache, {"capacity": capacity, **step}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`MomaDepthCacheLayer.update`]."""
        return self.cache.update(keys, values, layer_idx, **self.step)


def chosen_mask(chosen_BT: torch.Tensor, document_BT: torch.Tensor | None) -> torch.Tensor:
    """Return the attention mask of all tokens over those that are chosen, each before itself in its document.

    Every token sees itself, too: one that is not chosen may have no other to see.
    """
    place_T = torch.arange(chosen_BT.shape[1], device=chosen_BT.device)
    is_seen_BTT = chosen_BT.unsqueeze(1) & (place_T <= place_T.unsqueeze(-1))
    if document_BT is not None:
        is_seen_BTT = is_seen_BTT & (document_BT.unsqueeze(1) == document_BT.unsqueeze(-1))
    return (is_seen_BTT | (place_T == place_T.unsqueeze(-1))).unsqueeze(1)


def step_mask(
    config: MomaConfig, is_key_RS: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | BlockMask | None:
    """Return the attention mask of one token in each of several rows over the row's keys, itself the last of them."""
    if is_key_RS is None or config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    num_rows, num_keys = is_key_RS.shape
    if config._attn_implementation == "sdpa":
        return is_key_RS[:, None, None]
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=num_rows,
        q_length=1,
        kv_length=num_keys,
        q_offset=num_keys - 1,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=is_key_RS,
        allow_is_causal_skip=False,
        dtype=dtype,
        config=config,
        device=is_key_RS.device,
    )


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
