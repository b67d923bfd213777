# SPDX-License-Identifier: Apache-2.0
"""The part of a cache that serves a depth layer: every row keeps the keys of its own chosen tokens, and no others.

Shape suffixes:
    B rows, R rows that take part in a step, H key heads, C places of a packed row, P chosen tokens of the step,
    S columns, d head size.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

from .capacity_moma import ceil_share, exact_share
from .configuration_moma import DEPTH_LAYER_TYPE
from .errors_moma import InputError


if TYPE_CHECKING:
    from .depth_packing_moma import DepthPacking


# columns by which a dynamic layer grows at once
_COLUMNS = 8
# by how much a static layer grows, at least, when a row chooses more tokens than fit
_GROWTH = 1.25
# of keys: the `lengths` of the layer that may write behind them
_WRITER = "_moma_writer"


class _RaggedRows:
    """What both layers share: rows of different lengths behind the interface of a cache layer.

    Of the copies of a layer, however they were made, the first to go on writes behind what all of them have stored,
    and each other one takes memory of its own when it goes on.

    Attributes:
        keys, values (`torch.Tensor`): each row's stored tokens at its front, `[B, H, S, d]`. What stands behind them
            means nothing.
        slots (`torch.IntTensor`): the index of each stored token among those that its row has seen, `[B, S]`.
        cumulative_length (`int`): tokens seen, chosen or not.
        lengths (`list[int]`): stored tokens of each row; empty until a first token is stored. Never changed in place:
            it tells the layer that wrote last from its copies.
    """

    cumulative_length: int
    lengths: list[int]
    is_initialized: bool
    # `None` until a first token is stored
    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    # in its own way in each of the layers: columns to begin with, and those that so many tokens need
    _first_columns: Callable[[float], int]
    _more_columns: Callable[[int], int]

    def get_seq_length(self) -> int:
        """Tokens seen, chosen or not: what masks and positions count by."""
        return self.cumulative_length

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args,
        packing: "DepthPacking | None" = None,
        rows: list[int] | None = None,
        num_rows: int = 0,
        num_skipped: int = 0,
        capacity: float = 1.0,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the chosen tokens of one step.

        Args:
            key_states (`torch.Tensor`): keys of the packed rows, holes included, `[R, H, C, d]`.
            value_states (`torch.Tensor`): values, alike.
            packing (`DepthPacking`, *optional*): where they stand.
            rows (`list[int]`, *optional*): in place of `packing`, the rows that take part in a step of one token.
            num_rows (`int`, *optional*): of the batch, with `rows`.
            num_skipped (`int`, *optional*): positions of a step in which no token was chosen, without both.
            capacity (`float`, *optional*): the share of tokens that a static layer makes room for.

        Returns:
            `tuple`: keys and values of the rows that take part, `[R, H, S + C, d]`: with `packing` the stored ones,
            with holes after the last of each row, then the new ones; with `rows` all of a row's one after the other,
            with holes after the last.
        """
        if packing is None and rows is None:
            self.cumulative_length += num_skipped
            return key_states, value_states
        if not self.is_initialized:
            self._allocate(key_states, value_states, packing.num_rows if packing else num_rows, capacity)
        if packing is None:
            return self._append_step(key_states, value_states, rows)  # pyright: ignore[reportArgumentType]
        num_columns = self._num_columns(packing)
        old_keys, old_values = (x[:, :, :num_columns].index_select(0, packing.row_R) for x in (self.keys, self.values))
        self._append(key_states, value_states, packing)
        return torch.cat((old_keys, key_states), dim=2), torch.cat((old_values, value_states), dim=2)

    def stored_slots(self, packing: "DepthPacking") -> torch.Tensor:
        """Slots of the stored tokens of the rows that take part, -1 at holes, `[R, S]`."""
        if not self.is_initialized:
            return packing.row_R.new_empty(len(packing.rows), 0)
        slot_RS = self.slots[:, : self._num_columns(packing)].index_select(0, packing.row_R).long()
        length_R = torch.tensor([self.lengths[row] for row in packing.rows], device=slot_RS.device)
        return torch.where(_is_stored(slot_RS, length_R), slot_RS, -1)

    def step_lengths(self, rows: list[int]) -> list[int]:
        """Stored tokens of rows once each has stored one more."""
        return [self.lengths[row] + 1 for row in rows] if self.is_initialized else [1] * len(rows)

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

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens seen, and those of them that were stored.

        Raises:
            ValueError: the number is positive, or larger than what has been seen.
        """
        if tokens_to_remove > 0:
            raise InputError(
                f"`tokens_to_remove` = {tokens_to_remove}: crop takes minus the number of tokens to remove."
            )
        if -tokens_to_remove > self.cumulative_length:
            raise InputError(
                f"`tokens_to_remove` = {tokens_to_remove}: only {self.cumulative_length} tokens have been seen."
            )
        self.cumulative_length += tokens_to_remove
        if self.is_initialized:
            is_stored_BS = _is_stored(self.slots, torch.tensor(self.lengths, device=self.slots.device))
            self.lengths = (is_stored_BS & (self.slots < self.cumulative_length)).sum(1).tolist()

    def _num_columns(self, packing: "DepthPacking") -> int:
        """Stored tokens of the fullest of the rows that take part."""
        return max(self.lengths[row] for row in packing.rows)

    def _allocate(self, key_states: torch.Tensor, value_states: torch.Tensor, num_rows: int, capacity: float) -> None:
        self.device, self.lengths = key_states.device, [0] * num_rows
        num_columns = self._first_columns(capacity)
        self.keys, self.values = (
            x.new_zeros(num_rows, x.shape[1], num_columns, x.shape[3]) for x in (key_states, value_states)
        )
        self.slots = torch.full((num_rows, num_columns), -1, dtype=torch.int32, device=self.device)
        self.is_initialized = True
        self._note_writer()

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor, packing: "DepthPacking") -> None:
        self._make_room(packing.length, max(self.lengths[row] + n for row, n in zip(packing.rows, packing.counts)))
        row_P = packing.token_P // packing.length
        lengths_B = torch.tensor(self.lengths, device=self.device)
        column_P = lengths_B[row_P] + packing.place_P % packing.index_RC.shape[1]
        self.keys[row_P, :, column_P] = _new_states(key_states, packing)
        self.values[row_P, :, column_P] = _new_states(value_states, packing)
        self.slots[row_P, column_P] = (packing.token_P % packing.length + self.cumulative_length).int()
        self.cumulative_length += packing.length
        more = dict(zip(packing.rows, packing.counts))
        self.lengths = [length + more.get(row, 0) for row, length in enumerate(self.lengths)]
        self._note_writer()

    def _append_step(
        self, key_states: torch.Tensor, value_states: torch.Tensor, rows: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = self.step_lengths(rows)
        self._make_room(1, max(lengths))
        if len(rows) == 1:
            row, column = rows[0], lengths[0] - 1
            self.keys[row, :, column], self.values[row, :, column] = key_states[0, :, 0], value_states[0, :, 0]
            self.slots[row, column] = self.cumulative_length
            kept_keys, kept_values = self.keys[row : row + 1], self.values[row : row + 1]
        else:
            row_R = torch.tensor(rows, device=self.device)
            column_R = torch.tensor(lengths, device=self.device) - 1
            self.keys[row_R, :, column_R], self.values[row_R, :, column_R] = key_states[:, :, 0], value_states[:, :, 0]
            self.slots[row_R, column_R] = self.cumulative_length
            is_all = len(rows) == len(self.lengths)
            kept_keys, kept_values = (
                x if is_all else x[:, :, : max(lengths)].index_select(0, row_R) for x in (self.keys, self.values)
            )
        self.cumulative_length += 1
        now = dict(zip(rows, lengths))
        self.lengths = [now.get(row, length) for row, length in enumerate(self.lengths)]
        self._note_writer()
        return kept_keys[:, :, : max(lengths)], kept_values[:, :, : max(lengths)]

    def _make_room(self, num_positions: int, needed: int) -> None:
        """Columns of its own for rows of at most `needed` stored tokens, as so many positions come."""
        more = self._more_columns(needed) - self.keys.shape[2] if needed > self.keys.shape[2] else 0
        if more > 0:
            self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
            self.slots = torch.nn.functional.pad(self.slots, (0, more), value=-1)
        # a backward may want what earlier steps have read
        elif torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._take_memory():
            self.keys, self.values, self.slots = self.keys.clone(), self.values.clone(), self.slots.clone()

    def _take_memory(self) -> bool:
        """Whether nobody else has written behind what is stored, and may from now on."""
        # tensors of inference mode take no writing outside it
        is_writable = torch.is_inference_mode_enabled() or not self.keys.is_inference()
        # in one go, for copies that go on in threads of their own
        writer = vars(self.keys).pop(_WRITER, None)
        if writer is self.lengths:
            return is_writable
        if writer is not None:
            vars(self.keys).setdefault(_WRITER, writer)
        return False

    def _note_writer(self) -> None:
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            vars(self.keys)[_WRITER] = self.lengths

    def _select_rows(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.device)
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.keys, self.values, self.slots = (
            x.index_select(0, rows.to(x.device)) for x in (self.keys, self.values, self.slots)
        )
        self._note_writer()


def _is_stored(slot_BS: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
    """Which columns hold a row's own tokens, `[B, S]`: behind them a copy may have written."""
    return torch.arange(slot_BS.shape[1], device=slot_BS.device) < length_B.unsqueeze(-1)


def _new_states(states_RHCd: torch.Tensor, packing: "DepthPacking") -> torch.Tensor:
    """The chosen tokens' states without holes, `[P, H, d]`."""
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
        is_own = self.is_initialized and self._take_memory()
        self.cumulative_length, self.lengths = 0, [0] * len(self.lengths)
        if is_own:
            vars(self.keys)[_WRITER] = self.lengths

    def _first_columns(self, capacity: float) -> int:
        return min(self.max_cache_len, ceil_share(exact_share(capacity), self.max_cache_len))

    def _more_columns(self, needed: int) -> int:
        return min(self.max_cache_len, max(needed, math.ceil(_GROWTH * self.keys.shape[2])))

    def _make_room(self, num_positions: int, needed: int) -> None:
        if self.cumulative_length + num_positions > self.max_cache_len:
            raise InputError(
                f"The static cache was made for `max_cache_len` = {self.max_cache_len} tokens, but "
                f"{self.cumulative_length + num_positions} have come."
            )
        super()._make_room(num_positions, needed)


__all__ = ["MomaDepthCacheLayer", "MomaStaticDepthCacheLayer"]
