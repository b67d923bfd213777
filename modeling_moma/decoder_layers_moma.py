# SPDX-License-Identifier: Apache-2.0
"""The decoder layers: attention and experts on all tokens, or on those that a depth router chooses.

Shape suffixes:
    B rows, T positions, D hidden size, P chosen tokens, R rows with chosen tokens, S keys that the cache holds.
"""

import torch
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.deprecation import deprecate_kwarg

from .attention_moma import MomaAttention, MomaDepthAttention
from .configuration_moma import MomaConfig
from .depth_moma import DepthSelection, MomaDepthRouter
from .depth_packing_moma import (
    PackedCache,
    StepCache,
    depth_cache_layer,
    pack_chosen,
    packed_causal_mask,
    step_mask,
)
from .document_lengths_moma import LENGTHS, goes_by_lengths
from .experts_moma import MomaFeedForward
from .norms_moma import MomaRMSNorm
from .routing_context_moma import RoutingContext, is_distributed


class MomaDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, with the norm after (`h + norm(f(h))`, MoMa section 2.2) or before each."""

    def __init__(self, config: MomaConfig, layer_idx: int):
        super().__init__()
        self.norm_placement = config.norm_placement
        self.self_attn = MomaAttention(config, layer_idx)
        self.mlp = MomaFeedForward(config)
        self.attention_norm = MomaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = MomaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: torch.Tensor,
        routing_context: RoutingContext,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attention_change = self._attention_change(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        hidden_states = hidden_states + attention_change
        return hidden_states + self._ffn_change(hidden_states, routing_context)

    def _attention_change(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        if self.norm_placement == "pre":
            return self.self_attn(self.attention_norm(hidden_states), **kwargs)[0]
        return self.attention_norm(self.self_attn(hidden_states, **kwargs)[0])

    def _ffn_change(self, hidden_states: torch.Tensor, routing_context: RoutingContext) -> torch.Tensor:
        if self.norm_placement == "pre":
            return self.mlp(self.ffn_norm(hidden_states), routing_context)[0]
        change, gate = self.mlp(hidden_states, routing_context)
        change = self.ffn_norm(change)
        # RMSNorm has cancelled the gate of tokens that one expert took
        return change * gate if gate is not None else change


class MomaDepthDecoderLayer(MomaDecoderLayer):
    """A decoder layer for the tokens that its depth router chooses (MoMa section 2.3).

    Attention and experts see the chosen tokens alone: attention packed to the front of their rows, all else as one row
    without holes. The whole change that the layer makes to a token is scaled by the token's score. All other tokens
    leave as they came.
    """

    def __init__(self, config: MomaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config = config
        self.layer_idx = layer_idx
        self.self_attn = MomaDepthAttention(config, layer_idx)
        self.depth_router = MomaDepthRouter(config)
        self.capacity = max(config.pool_depth_capacity(pool) for pool in config.depth_pools)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: torch.Tensor,
        routing_context: RoutingContext,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]
    ) -> torch.Tensor:
        is_recorded = bool(kwargs.get("output_attentions", self.config.output_attentions))
        _, selection = self.depth_router(hidden_states, routing_context)
        # weights take part in every training step and wherever processes wait for one another; a recorded layer has
        # attentions in every step
        keep_empty_rows = self.training or is_distributed() or is_recorded
        # they count all tokens
        lengths = {name: kwargs.pop(name, None) for name in LENGTHS}
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
        packed_cache, slot_RS, past = None, None, 0
        if cache is not None:
            cache_layer = depth_cache_layer(cache, self.layer_idx)
            slot_RS, past = cache_layer.stored_slots(packing), cache_layer.get_seq_length()
            packed_cache = PackedCache(cache, packing, self.capacity)
        x_1PD = packing.choose(hidden_states)
        if lengths["cu_seq_lens_q"] is not None and goes_by_lengths(self.config) and any(packing.counts):
            # nothing but lengths tells rows apart, either
            layout = packing.chosen_lengths(lengths)
        else:
            mask = packed_causal_mask(self.config, packing, routing_context, x_1PD.dtype, slot_RS, past)
            layout = {"attention_mask": mask, "packing": packing, "slot_RS": slot_RS, "past": past}
        attention_change_1PD = self._attention_change(
            x_1PD,
            position_embeddings=tuple(
                packing.choose(part)
                for part in position_embeddings  # pyright: ignore[reportOptionalIterable]
            ),
            cache=packed_cache,
            is_recorded=is_recorded,
            **layout,
            **kwargs,  # pyright: ignore[reportCallIssue]
        )
        packed_context = routing_context.with_split(packing.split)
        change_1PD = attention_change_1PD + self._ffn_change(x_1PD + attention_change_1PD, packed_context)
        return packing.add_back(hidden_states, change_1PD, selection.weight_BT)

    def _step(
        self,
        hidden_B1D: torch.Tensor,
        selection: DepthSelection,
        routing_context: RoutingContext,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        cache: Cache,
        **kwargs,
    ) -> torch.Tensor:
        """One token in each row: those rows take part that chose it, with nothing to pack."""
        num_rows = hidden_B1D.shape[0]
        # the one wait on the device
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
                routing_context.split.of_rows(row_R)  # pyright: ignore[reportAttributeAccessIssue]
            )
        attention_change_R1D = self._attention_change(
            x_R1D,
            position_embeddings=position_embeddings,
            attention_mask=step_mask(self.config, lengths, x_R1D.dtype, x_R1D.device),
            cache=StepCache(cache, rows, num_rows, self.capacity),
            **kwargs,
        )
        change_R1D = attention_change_R1D + self._ffn_change(x_R1D + attention_change_R1D, context)
        change_R1D = (change_R1D * weight_R1.unsqueeze(-1).to(change_R1D.dtype)).to(hidden_B1D.dtype)
        return hidden_B1D + change_R1D if row_R is None else hidden_B1D.index_add(0, row_R, change_R1D)

    def _skip(self, hidden_states: torch.Tensor, cache: Cache | None) -> None:
        if cache is None:
            return
        depth_cache_layer(cache, self.layer_idx)
        nothing = hidden_states.new_empty(hidden_states.shape[0], 1, 0, 1)
        cache.update(nothing, nothing, self.layer_idx, num_skipped=hidden_states.shape[1])


__all__ = ["MomaDecoderLayer", "MomaDepthDecoderLayer"]
