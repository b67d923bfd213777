# SPDX-License-Identifier: Apache-2.0
"""The part of a dynamic cache that serves a layer which keeps every token: it grows by many columns at once.

Shape suffixes:
    B rows, H key heads, S stored tokens, T new tokens, d head size.
"""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


# columns to spare, and the share of the stored tokens that there are at least
_FEWEST_SPARE = 32
_SPARE_SHARE = 0.25
# of keys: memory behind them and behind values, and those values
_ROOM = "_moma_room"


class MomaGrowingCacheLayer(DynamicLayer):
    """A `DynamicLayer` that writes new tokens behind the stored ones, where that one copies all of them each time.

    `keys` and `values` are views of memory with room for more, which belongs to the last views alone. Of the copies of
    a layer, however they were made, the first to go on writes there, and each other one takes room of its own when it
    goes on. Whatever sets keys or values anew (`crop`, `reorder_cache`, ...) gives the room up: what other tensors
    still see is never written over. Who changes `keys` in place changes them for all views and copies that have them.
    Where gradients are wanted, or a compiler looks on, it is a `DynamicLayer`.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens.

        Args:
            key_states (`torch.Tensor`): `[B, H, T, d]`.
            value_states (`torch.Tensor`): `[B, H, T, d]`.

        Returns:
            `tuple`: all keys and values, `[B, H, S + T, d]`.
        """
        keys, values = self.keys, self.values
        is_plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.is_initialized
        # what does not fit is refused by the plain layer
        if (
            is_plain
            or keys is None
            or values is None
            or not (_fits_behind(key_states, keys) and _fits_behind(value_states, values))
        ):
            return super().update(key_states, value_states, *args, **kwargs)
        num_stored, num_new = keys.shape[2], key_states.shape[2]
        key_room, value_room = _room_for(num_stored + num_new, keys, values)
        key_room.narrow(2, num_stored, num_new).copy_(key_states)
        value_room.narrow(2, num_stored, num_new).copy_(value_states)
        self.keys = key_room.narrow(2, 0, num_stored + num_new)
        self.values = value_room.narrow(2, 0, num_stored + num_new)
        # not in the layer's `__dict__`, where the exporters of Transformers take every tensor for a part of the cache
        vars(self.keys)[_ROOM] = key_room, value_room, self.values
        return self.keys, self.values


def _room_for(
    num_columns: int, keys_BHSd: torch.Tensor, values_BHSd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory with the stored tokens at its front, for so many or more, in which nobody else will write."""
    # taken away in one go, for copies that go on in threads of their own
    room = vars(keys_BHSd).pop(_ROOM, None)
    if room is not None:
        key_room, value_room, value_view = room
        # tensors of inference mode take no writing outside it
        is_writable = torch.is_inference_mode_enabled() or not key_room.is_inference()
        if value_view is values_BHSd and is_writable and key_room.shape[2] >= num_columns:
            return key_room, value_room
    num_columns += max(_FEWEST_SPARE, int(_SPARE_SHARE * num_columns))
    return _with_room(keys_BHSd, num_columns), _with_room(values_BHSd, num_columns)


def _fits_behind(new_BHTd: torch.Tensor, kept_BHSd: torch.Tensor) -> bool:
    # nothing was stored yet
    if kept_BHSd.ndim != 4:
        return False
    (num_rows, num_heads, _, size), (kept_rows, kept_heads, _, kept_size) = new_BHTd.shape, kept_BHSd.shape
    is_alike = num_rows == kept_rows and num_heads == kept_heads and size == kept_size
    return is_alike and new_BHTd.dtype == kept_BHSd.dtype and new_BHTd.device == kept_BHSd.device


def _with_room(kept_BHSd: torch.Tensor, num_columns: int) -> torch.Tensor:
    room = kept_BHSd.new_empty(*kept_BHSd.shape[:2], num_columns, kept_BHSd.shape[3])
    room.narrow(2, 0, kept_BHSd.shape[2]).copy_(kept_BHSd)
    return room


def let_grow(cache: Cache | None) -> None:
    """Make growing layers of a dynamic cache's plain ones, with what they hold."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = MomaGrowingCacheLayer
    for layer in cache.layers:
        # the same object, which other caches may hold too
        if type(layer) is DynamicLayer:
            layer.__class__ = MomaGrowingCacheLayer


__all__ = ["MomaGrowingCacheLayer", "let_grow"]
