# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention among the tokens of all modalities, and its form inside a depth layer.

Shape suffixes:
    P chosen tokens of a depth layer, D hidden size, R packed rows, H heads, C places of a packed row,
    S keys that the cache holds, d head size.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.integrations import use_kernelized_func
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_moma import MomaConfig
from .depth_packing_moma import DepthPacking, PackedCache, StepCache
from .norms_moma import query_key_norm
from .step_attention_moma import wants_wide_step, wide_step
from .step_products_moma import project


@use_kernelized_func(apply_rotary_pos_emb)
class MomaAttention(nn.Module):
    """Causal self-attention over the tokens of all modalities, optionally with normed queries and keys."""

    def __init__(self, config: MomaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)
        self.has_norm = config.qk_norm != "none"
        self.q_norm = query_key_norm(config, config.num_attention_heads)
        self.k_norm = query_key_norm(config, config.num_key_value_heads)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | PackedCache | StepCache | None = None,
        packing: DepthPacking | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self._project(hidden_states, position_embeddings)
        if packing is not None:
            query, key, value = packing.lay_out(query), packing.lay_out(key), packing.lay_out(value)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        implementation: str = self.config._attn_implementation  # pyright: ignore[reportAssignmentType]
        # vLLM reads the source of this method for the one call of the interface and for its scale
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if wants_wide_step(implementation, query):
            attention_interface = partial(wide_step, attention_interface)
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        # some backends answer with tokens and width alone
        attn_output = attn_output.reshape(query.shape[0], query.shape[2], -1)
        if packing is not None:
            attn_output = packing.take_out(attn_output)
        return project(self.o_proj, attn_output), attn_weights

    def _project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = (
            self._heads(project(layer, hidden_states)) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.has_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        return query, key, value

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        # a view cannot infer the heads of rows without tokens, which depth layers have
        return states.contiguous().view(*states.shape[:-1], states.shape[-1] // self.head_dim, self.head_dim)


class MomaDepthAttention(MomaAttention):
    """Attention among the chosen tokens of a depth layer. Only the attention itself sees rows, and their holes."""

    def forward(
        self,
        x_1PD: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: PackedCache | StepCache | None = None,
        *,
        packing: DepthPacking | None = None,
        slot_RS: torch.Tensor | None = None,
        past: int = 0,
        is_recorded: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs of the chosen tokens `[1, P, D]`; weights, if recorded, are laid out over all positions.

        Without a packing the chosen tokens are one in each row, `[R, 1, D]`, or their documents' lengths are given.
        """
        attn_output, weights_RHCS = super().forward(
            x_1PD, position_embeddings, attention_mask, cache, packing, **kwargs
        )
        if packing is None or weights_RHCS is None:
            return attn_output, weights_RHCS
        return attn_output, packing.unpack_attention(weights_RHCS, slot_RS, past) if is_recorded else None
