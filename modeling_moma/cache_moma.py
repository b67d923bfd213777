# SPDX-License-Identifier: Apache-2.0
"""The part of a cache that serves a depth layer: every row keeps the keys of its own chosen tokens, and no others.

Shape suffixes:
    B rows, R rows that take part in a step, H key heads, C places of a packed row, P chosen tokens of the step,
    N stored tokens of all rows, S columns, d head size.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

from .capacity_moma import ceil_share, exact_share
from .configuration_moma import DEPTH_LAYER_TYPE


if TYPE_CHECKING:
    from .depth_packing_moma import DepthPacking


# by how much a static layer grows, at least, when a row chooses more tokens than fit
_GROWTH = 1.25


class _RaggedRows:
    """What both layers share: rows of different lengths behind the interface of a cache layer.

    Attributes:
        cumulative_length (`int`): tokens seen, chosen or not.
        lengths (`list[int]`): stored tokens of each row; empty until a first token is stored.
    """

    cumulative_length: int
    lengths: list[int]
    is_initialized: bool
    # `None` until a first token is stored
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    # in its own way in each of the layers
    _allocate: Callable[..., None]
    _stored: Callable[["DepthPacking"], tuple[torch.Tensor, torch.Tensor]]
    _append: Callable[[torch.Tensor, torch.Tensor, "DepthPacking"], None]
    _select_rows: Callable[[torch.Tensor], None]

    def get_seq_length(self) -> int:
        """Tokens seen, chosen or not: what masks and positions count by."""
        return self.cumulative_length

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args,
        packing: "DepthPacking | None" = None,
        num_skipped: int = 0,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the chosen tokens of one step.

        Args:
            key_states (`torch.Tensor`): keys of the packed rows, holes included, `[R, H, C, d]`.
            value_states (`torch.Tensor`): values, alike.
            packing (`DepthPacking`): where they stand; `None` for a step in which no token was chosen.
            num_skipped (`int`, *optional*): positions of a step without `packing`.
            kwargs: `capacity`, the share of tokens that a static layer makes room for.

        Returns:
            `tuple`: keys and values of the rows that take part, `[R, H, S + C, d]`: the stored ones, with holes after
            the last of each row, then the new ones.
        """
        if packing is None:
            self.cumulative_length += num_skipped
            return key_states, value_states
        if not self.is_initialized:
            self.lengths = [0] * packing.num_rows
            self._allocate(key_states, value_states, packing.num_rows, **kwargs)
            self.is_initialized = True
        old_keys, old_values = self._stored(packing)
        self._append(key_states, value_states, packing)
        self.cumulative_length += packing.length
        for row, count in zip(packing.rows, packing.counts):
            self.lengths[row] += count
        return torch.cat((old_keys, key_states), dim=2), torch.cat((old_values, value_states), dim=2)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row `i` becomes what row `beam_idx[i]` was."""
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

    def _columns(self, packing: "DepthPacking") -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the stored tokens of the rows that take part, and which of them are not holes, `[R, S]`."""
        lengths = [self.lengths[row] for row in packing.rows] if self.is_initialized else [0] * len(packing.rows)
        column_1S = torch.arange(max(lengths), device=packing.row_R.device).unsqueeze(0)
        length_R1 = torch.tensor(lengths, device=packing.row_R.device).unsqueeze(-1)
        return column_1S.expand(len(lengths), -1), column_1S < length_R1

    def _check_crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"`tokens_to_remove` = {tokens_to_remove}: crop takes minus the number of tokens to remove."
            )
        if -tokens_to_remove > self.cumulative_length:
            raise ValueError(
                f"`tokens_to_remove` = {tokens_to_remove}: only {self.cumulative_length} tokens have been seen."
            )


def _new_states(states_RHCd: torch.Tensor, packing: "DepthPacking") -> torch.Tensor:
    """The chosen tokens' states without holes, `[P, H, d]`."""
    return states_RHCd.transpose(1, 2).flatten(0, 1).index_select(0, packing.place_P)


class MomaDepthCacheLayer(_RaggedRows, DynamicLayer):
    """Grows by exactly the chosen tokens.

    Attributes:
        keys, values (`torch.Tensor`): `[N, H, d]`, row after row.
        slots (`torch.IntTensor`): the index of each stored token among those that its row has seen, `[N]`.
    """

    _layer_type = DEPTH_LAYER_TYPE

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.cumulative_length = 0
        self.lengths = []
        self.slots = None  # pyright: ignore[reportAttributeAccessIssue]

    def stored_slots(self, packing: "DepthPacking") -> torch.Tensor:
        """Slots of the stored tokens of the rows that take part, -1 at holes, `[R, S]`."""
        column_RS, is_stored_RS = self._columns(packing)
        if column_RS.shape[1] == 0:
            return torch.full_like(column_RS, -1)
        slot_RS = self.slots[self._flat(column_RS, packing)].long()
        return torch.where(is_stored_RS, slot_RS, -1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens seen, and those of them that were stored."""
        self._check_crop(tokens_to_remove)
        self.cumulative_length += tokens_to_remove
        if not self.is_initialized or tokens_to_remove == 0:
            return
        is_kept_N = self.slots < self.cumulative_length
        kept_rows = self._row_of_token()[is_kept_N]
        self.lengths = torch.bincount(kept_rows, minlength=len(self.lengths)).tolist()
        self.keys, self.values, self.slots = (x[is_kept_N.to(x.device)] for x in (self.keys, self.values, self.slots))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.lengths, self.slots = [], None  # pyright: ignore[reportAttributeAccessIssue]

    def _allocate(self, key_states: torch.Tensor, value_states: torch.Tensor, num_rows: int, **kwargs) -> None:
        self.device = key_states.device
        self.keys, self.values = (x.new_empty(0, x.shape[1], x.shape[3]) for x in (key_states, value_states))
        self.slots = torch.empty(0, dtype=torch.int32, device=self.device)

    def _row_of_token(self) -> torch.Tensor:
        lengths_B = torch.tensor(self.lengths, device=self.slots.device)
        rows_B = torch.arange(len(self.lengths), device=self.slots.device)
        return torch.repeat_interleave(rows_B, lengths_B, output_size=self.slots.shape[0])

    def _flat(self, column_RS: torch.Tensor, packing: "DepthPacking") -> torch.Tensor:
        lengths_B = torch.tensor(self.lengths, device=column_RS.device)
        start_B = lengths_B.cumsum(0) - lengths_B
        # holes of the last row would point behind the end
        return (start_B[packing.row_R].unsqueeze(-1) + column_RS).clamp(max=self.slots.shape[0] - 1)

    def _stored(self, packing: "DepthPacking") -> tuple[torch.Tensor, torch.Tensor]:
        column_RS, _ = self._columns(packing)
        if column_RS.shape[1] == 0:
            keys, values = (
                x.new_empty(len(packing.rows), x.shape[1], 0, x.shape[2]) for x in (self.keys, self.values)
            )
            return keys, values
        flat_RS = self._flat(column_RS, packing)
        keys, values = (
            x.index_select(0, flat_RS.flatten()).unflatten(0, flat_RS.shape).transpose(1, 2)
            for x in (self.keys, self.values)
        )
        return keys, values

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor, packing: "DepthPacking") -> None:
        row_P = packing.token_P // packing.length
        slot_P = (packing.token_P % packing.length + self.cumulative_length).int()
        # row after row: a stable sort puts a row's new tokens behind its old ones
        order_N = torch.cat([self._row_of_token(), row_P]).argsort(stable=True)
        self.keys = torch.cat([self.keys, _new_states(key_states, packing)]).index_select(0, order_N)
        self.values = torch.cat([self.values, _new_states(value_states, packing)]).index_select(0, order_N)
        self.slots = torch.cat([self.slots, slot_P]).index_select(0, order_N)

    def _select_rows(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.slots.device)
        lengths_B = torch.tensor(self.lengths, device=rows.device)
        start_B = lengths_B.cumsum(0) - lengths_B
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        new_lengths_B = lengths_B[rows]
        shift_B = start_B[rows] - (new_lengths_B.cumsum(0) - new_lengths_B)
        num_tokens = sum(self.lengths)
        shift_N = torch.repeat_interleave(shift_B, new_lengths_B, output_size=num_tokens)
        source_N = torch.arange(num_tokens, device=rows.device) + shift_N
        self.keys, self.values, self.slots = (
            x.index_select(0, source_N.to(x.device)) for x in (self.keys, self.values, self.slots)
        )


class MomaStaticDepthCacheLayer(_RaggedRows, StaticLayer):
    """Allocated once, for the share of `max_cache_len` tokens that the layer's capacity lets through.

    The capacity holds in the mean, not for every row: a row that chooses more makes the layer grow, by a quarter at
    least and up to `max_cache_len`. Nothing is ever dropped. Steps choose different numbers of tokens, so the layer
    cannot be compiled.

    Attributes:
        keys, values (`torch.Tensor`): `[B, H, S, d]`.
        slots (`torch.LongTensor`): the index of each stored token among those that its row has seen, -1 where there
            is none, `[B, S]`.
    """

    _layer_type = DEPTH_LAYER_TYPE
    is_compileable = False
    supports_early_init = False

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(max_cache_len, **kwargs)
        self.cumulative_length = 0
        self.lengths = []
        self.slots = None  # pyright: ignore[reportAttributeAccessIssue]

    def stored_slots(self, packing: "DepthPacking") -> torch.Tensor:
        """Slots of the stored tokens of the rows that take part, -1 at holes, `[R, S]`."""
        column_RS, _ = self._columns(packing)
        if column_RS.shape[1] == 0:
            return torch.full_like(column_RS, -1)
        return self.slots.index_select(0, packing.row_R)[:, : column_RS.shape[1]]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens seen, and those of them that were stored."""
        self._check_crop(tokens_to_remove)
        self.cumulative_length += tokens_to_remove
        if self.is_initialized:
            self.slots[self.slots >= self.cumulative_length] = -1
            self.lengths = (self.slots >= 0).sum(1).tolist()

    def reset(self) -> None:
        """Forget everything, but keep the memory."""
        super().reset()
        self.lengths = [0] * len(self.lengths)
        if self.is_initialized:
            self.slots.fill_(-1)

    def _allocate(
        self, key_states: torch.Tensor, value_states: torch.Tensor, num_rows: int, capacity: float = 1.0, **kwargs
    ) -> None:
        self.device = key_states.device
        num_columns = min(self.max_cache_len, ceil_share(exact_share(capacity), self.max_cache_len))
        self.keys, self.values = (
            x.new_zeros(num_rows, x.shape[1], num_columns, x.shape[3]) for x in (key_states, value_states)
        )
        self.slots = torch.full((num_rows, num_columns), -1, device=self.device)

    def _stored(self, packing: "DepthPacking") -> tuple[torch.Tensor, torch.Tensor]:
        num_columns = self._columns(packing)[0].shape[1]
        keys, values = (x.index_select(0, packing.row_R)[:, :, :num_columns] for x in (self.keys, self.values))
        return keys, values

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor, packing: "DepthPacking") -> None:
        if self.cumulative_length + packing.length > self.max_cache_len:
            raise ValueError(
                f"The static cache was made for `max_cache_len` = {self.max_cache_len} tokens, but "
                f"{self.cumulative_length + packing.length} have come."
            )
        self._grow(max(self.lengths[row] + count for row, count in zip(packing.rows, packing.counts)))
        row_P = packing.token_P // packing.length
        lengths_B = torch.tensor(self.lengths, device=self.device)
        column_P = lengths_B[row_P] + packing.place_P % packing.index_RC.shape[1]
        self.keys[row_P, :, column_P] = _new_states(key_states, packing)
        self.values[row_P, :, column_P] = _new_states(value_states, packing)
        self.slots[row_P, column_P] = packing.token_P % packing.length + self.cumulative_length

    def _grow(self, needed: int) -> None:
        num_columns = self.keys.shape[2]
        if needed <= num_columns:
            return
        more = min(self.max_cache_len, max(needed, math.ceil(_GROWTH * num_columns))) - num_columns
        self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
        self.slots = torch.nn.functional.pad(self.slots, (0, more), value=-1)

    def _select_rows(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.device)
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.keys, self.values, self.slots = (
            x.index_select(0, rows.to(x.device)) for x in (self.keys, self.values, self.slots)
        )


__all__ = ["MomaDepthCacheLayer", "MomaStaticDepthCacheLayer"]
