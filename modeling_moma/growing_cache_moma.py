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


class MomaGrowingCacheLayer(DynamicLayer):
    """A `DynamicLayer` that writes new tokens behind the stored ones, where that one copies all of them each time.

    `keys` and `values` are views of memory with room for more. Whatever sets them anew (`crop`, `reorder_cache`, ...)
    gives the room up: what other tensors still see is never written over. Where gradients are wanted, or a compiler
    looks on, it is a `DynamicLayer`.
    """

    # not in `__dict__`, where the exporters of Transformers take every tensor for a part of the cache
    __slots__ = ("_room",)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # memory behind keys and values, and the views of it that they are
        self._room: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def from_layer(cls, layer: DynamicLayer) -> "MomaGrowingCacheLayer":
        """A layer with the tokens that another one holds."""
        growing = cls()
        vars(growing).update(vars(layer))
        return growing

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
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        num_stored, num_new = keys.shape[2], key_states.shape[2]
        key_room, value_room = self._room_for(num_stored + num_new, keys, values)
        key_room.narrow(2, num_stored, num_new).copy_(key_states)
        value_room.narrow(2, num_stored, num_new).copy_(value_states)
        self.keys = key_room.narrow(2, 0, num_stored + num_new)
        self.values = value_room.narrow(2, 0, num_stored + num_new)
        self._room = key_room, value_room, self.keys, self.values
        return self.keys, self.values

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._room = None

    def _room_for(
        self, num_columns: int, keys_BHSd: torch.Tensor, values_BHSd: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory with the stored tokens at its front, for so many or more."""
        # one that was rebuilt from its tensors has none
        room = getattr(self, "_room", None)
        if room is not None:
            key_room, value_room, key_view, value_view = room
            is_own = key_view is keys_BHSd and value_view is values_BHSd
            # tensors of inference mode take no writing outside it
            is_writable = torch.is_inference_mode_enabled() or not key_room.is_inference()
            if is_own and is_writable and key_room.shape[2] >= num_columns:
                return key_room, value_room
            del key_room, value_room, key_view, value_view
        # let go before there is more
        self._room = room = None
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
    """Put growing layers in place of a dynamic cache's plain ones, with what those hold."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = MomaGrowingCacheLayer
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = MomaGrowingCacheLayer.from_layer(layer)


__all__ = ["MomaGrowingCacheLayer", "let_grow"]
