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
"""The MoMa decoder: attention that all modalities share, feed-forward layers split into groups of experts.

`token_groups_moma.py` finds each modality's tokens, `routing_moma.py` has the routers, and
`experts_implementations_moma.py` how packed experts multiply; mixture of depths stands in `depth_moma.py`.

Shape suffixes:
    B rows, T positions, N tokens of one group in the batch, D hidden size, E experts of the group, K tokens that one
    expert takes, F inner width of one expert, P (token, expert) pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from huggingface_hub import CommitInfo
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.distributed import DistributedConfig
from transformers.integrations import use_kernel_forward_from_hub, use_kernelized_func
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .compat_moma import complete_model_card, finish_saving, prepare_saving
from .configuration_moma import MomaConfig, check_rules
from .depth_moma import DepthLayer, DepthSelection, MomaDepthRouter
from .documents_moma import Batch, attention_inputs, check_replica
from .errors_moma import InputError
from .experts_implementations_moma import DEFAULT_IMPLEMENTATION, choose_dispatch_layout, takes_any_width, takes_hints
from .frames_moma import TEXT
from .generation_moma import MomaGenerationMixin
from .loss_moma import causal_lm_loss
from .quantized_layers_moma import use_quantized_layers
from .routing_moma import Fp32Buffers, MomaAuxiliaryRouter, MomaRouter, MomaRouterBase, update_routers
from .token_groups_moma import RoutingContext, check_inputs, columns_of_batch, routing_of_batch, seen_positions


if TYPE_CHECKING:
    Class = TypeVar("Class")

    # the library's own says that it gives some module
    def use_experts_implementation(experts_class: Class) -> Class: ...  # pyright: ignore[reportRedeclaration]
else:
    from transformers.integrations import use_experts_implementation

logger = logging.get_logger(__name__)


@use_kernel_forward_from_hub("RMSNorm")
class MomaRMSNorm(nn.Module):
    """RMSNorm over the hidden size, computed in fp32."""

    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # rms_norm computes half precision in fp32, and under autocast returns fp32
        normed = nn.functional.rms_norm(hidden_states, self.weight.shape, eps=self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


class MomaHeadLayerNorm(nn.Module):
    """LayerNorm over `head_dim`, with one affine for all heads or one for each (Chameleon's query-key norm)."""

    def __init__(self, shape: tuple[int, ...], eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.layer_norm(hidden_states, self.weight.shape[-1:], eps=self.eps)
        return (normed * self.weight + self.bias).to(hidden_states.dtype)


def query_key_norm(config: MomaConfig, num_heads: int) -> nn.Module:
    """Return the norm of queries or keys that `config.qk_norm` names."""
    # CODEPATH: RMSNorm for models trained here, as moma-emoji
    if config.qk_norm == "rmsnorm":
        return MomaRMSNorm(config.head_dim, eps=config.rms_norm_eps)
    # CODEPATH: the presets, as in Chameleon's own code
    if config.qk_norm == "layernorm":
        return MomaHeadLayerNorm((config.head_dim,))
    # CODEPATH: Chameleon checkpoints that were converted to Transformers
    if config.qk_norm == "layernorm_per_head":
        return MomaHeadLayerNorm((num_heads, config.head_dim))
    return nn.Identity()


class MomaRotaryEmbedding(Fp32Buffers):
    """Cosines and sines `[B, T, head_dim]` of positions; scaled types come from `config.rope_parameters`."""

    def __init__(self, config: MomaConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        frequencies_of = {"default": self.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}[self.rope_type]
        inv_freq, self.attention_scaling = frequencies_of(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MomaConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """Return frequencies of pairs of elements, `[head_dim / 2]`, and the scale of cosines and sines."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids.unsqueeze(-1).float() * self.inv_freq.float().to(x.device)
        angles = torch.cat((angles, angles), dim=-1)
        return tuple((wave * self.attention_scaling).to(x.dtype) for wave in (angles.cos(), angles.sin()))


@use_kernel_forward_from_hub("rotary_pos_emb")
def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys `[B, H, T, head_dim]` by the angles of their positions, `[B, T, head_dim]` (RoFormer)."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, dim=-1)
        return states * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(query), turned(key)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by queries `[B, H, T, d]` to `[B, G, S, d]`: return `[B, T, H, d]`, and weights `[B, H, T, S]`."""
    groups: Any = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MomaProjections(nn.Module):
    """What attention does to each token by itself: query, key and value, optionally normed, and the way back."""

    def __init__(self, config: MomaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.add_projections(config)

    def add_projections(self, config: MomaConfig):
        """Add the layers."""
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)
        self.has_norm = config.qk_norm != "none"
        self.q_norm = query_key_norm(config, config.num_attention_heads)
        self.k_norm = query_key_norm(config, config.num_key_value_heads)

    def to_heads(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map `[..., D]` to queries, keys and values, `[..., heads, head_dim]`."""
        query, key, value = (self._heads(layer(hidden_states)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.has_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        # a view cannot infer the heads of rows without tokens, which depth layers have
        return states.contiguous().view(*states.shape[:-1], states.shape[-1] // self.head_dim, self.head_dim)


@use_kernelized_func(apply_rotary_pos_emb)
class MomaAttention(MomaProjections):
    """Causal self-attention over the tokens of all modalities, optionally with normed queries and keys.

    A depth layer gives it the chosen tokens of all rows in one, and their packing: the attention itself sees rows.
    """

    def __init__(self, config: MomaConfig, layer_idx: int):
        super().__init__(config)
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | DepthSelection | None = None,
        packing: DepthSelection | None = None,
        routing_context: Any = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map `[B, T, D]` to `[B, T, D]`, and return weights `[B, H, T, S]` where the implementation makes them."""
        query, key, value = self.project(hidden_states, routing_context)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if packing is not None:
            query, key, value = packing.lay_out(query), packing.lay_out(key), packing.lay_out(value)
        if cache is not None:
            # a paged cache changes the arguments of attention in place
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        # vLLM reads the source of this method for the one call of the interface and for its scale
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.attention_implementation(), eager_attention_forward
        )
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
            attn_output, attn_weights = packing.take_out(attn_output), packing.unpack_attention(attn_weights)
        return self.project_back(attn_output, routing_context), attn_weights

    def attention_implementation(self) -> Any:
        """Return the name of the attention that the model is set to."""
        return self.config._attn_implementation

    def project(
        self, hidden_states: torch.Tensor, context: RoutingContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map `[B, T, D]` to queries, keys and values, `[B, T, heads, head_dim]`."""
        return self.to_heads(hidden_states)

    def project_back(self, attn_output: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Map what attention makes, `[B, T, heads * head_dim]`, to `[B, T, D]`."""
        return self.o_proj(attn_output)


class MomaUntiedAttention(MomaAttention):
    """[`MomaAttention`] with projections for each modality (Mixture-of-Transformers, arXiv 2411.04996, section 2.2).

    State dict:
        modalities.{text,image,...}.   see [`MomaProjections`]
    """

    pad_empty_input = False

    def add_projections(self, config: MomaConfig):
        """Add the layers of each modality."""
        self.modalities = nn.ModuleDict({modality: MomaProjections(config) for modality in config.modalities})

    def project(
        self, hidden_states: torch.Tensor, context: RoutingContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See [`MomaAttention.project`]."""

        def to_heads(modality: str, x_ND: torch.Tensor) -> torch.Tensor:
            # brought back in place together
            return torch.cat(self._of(modality).to_heads(x_ND), dim=1)

        states = context.run_by_group(hidden_states, to_heads, self.pad_empty_input)
        # of the heads that are here, which tensor parallelism splits
        num_keys = states.shape[2] // (self.num_key_value_groups + 2)
        query, key, value = states.split((num_keys * self.num_key_value_groups, num_keys, num_keys), dim=2)
        return query, key, value

    def project_back(self, attn_output: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """See [`MomaAttention.project_back`]."""
        return context.run_by_group(attn_output, lambda name, x: self._of(name).o_proj(x), self.pad_empty_input)

    def _of(self, modality: str) -> Any:
        return self.modalities[modality]


class ByModality(nn.ModuleDict):
    """A layer for each modality."""

    def forward(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Map each token of `[B, T, D]` by the layer of its modality."""
        return context.run_by_group(hidden_states, lambda modality, x_ND: self[modality](x_ND))


@takes_any_width
@use_experts_implementation
class MomaExperts(nn.Module):
    """SwiGLU experts stored as 3D tensors, called through the experts interface of Transformers.

    State dict:
        gate_up_proj  [E, 2 * F, D]
        down_proj     [E, D, F]
    """

    # quantised matmuls fail on inputs without rows: `use_quantized_layers` sets it
    pad_empty_input = False
    # set by the decorator of the class
    config: MomaConfig
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, config: MomaConfig, group: str):
        super().__init__()
        self.num_experts = config.group_num_experts(group)
        width = config.group_intermediate_size(group)
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run each token through its experts, one expert after the other (the "eager" implementation)."""
        output = torch.zeros_like(hidden_states)
        # every expert runs, with zero rows if need be, so that every rank touches every weight
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            expert_output = self.run_expert(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, expert_output.to(output.dtype))
        return output

    def run_expert(self, expert: int, x_KD: torch.Tensor) -> torch.Tensor:
        """Return one expert on its rows, `[K, D]` to `[K, D]`."""
        if self.pad_empty_input and x_KD.shape[0] == 0:
            return self.run_expert(expert, x_KD.new_zeros(1, x_KD.shape[1]))[:0]
        gate_up = nn.functional.linear(x_KD, self.gate_up_proj[expert])
        return nn.functional.linear(self._apply_gate(gate_up), self.down_proj[expert])


class MomaMLP(nn.Module):
    """A SwiGLU feed-forward network: the expert of a one-expert group, or a shared expert."""

    pad_empty_input = False

    def __init__(self, config: MomaConfig, intermediate_size: int | None = None):
        super().__init__()
        intermediate_size = config.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Map `[..., D]` to `[..., D]`."""
        if self.pad_empty_input and x_ND.shape[0] == 0:
            return self(x_ND.new_zeros(1, *x_ND.shape[1:]))[:0]
        inner_NF = self.act_fn(self.gate_proj(x_ND)) * self.up_proj(x_ND)
        return self.down_proj(inner_NF)


class MomaExpertGroup(nn.Module):
    """The experts of one modality, or of all (MoMa section 2.2, equation 1).

    Tokens may be taken by several experts or by none; those that none took get zeros, and the residual stream
    carries them.

    State dict:
        router.weight, .threshold, ...   see [`MomaRouter`]; absent with one expert
        experts.gate_up_proj, .down_proj see [`MomaExperts`]; with one expert `mlp.{gate,up,down}_proj.weight`
        shared_expert.{gate,up,down}_proj.weight, when configured
    """

    def __init__(self, config: MomaConfig, group: str):
        super().__init__()
        self.num_experts = config.group_num_experts(group)
        self.needs_gate = config.gate_after_norm
        if self.num_experts == 1:
            self.mlp = MomaMLP(config, config.group_intermediate_size(group))
        else:
            self.router = MomaRouter(config, group)
            self.experts = MomaExperts(config, group)
        shared_size = config.group_shared_intermediate_size(group)
        self.shared_expert = MomaMLP(config, shared_size) if shared_size else None

    def forward(self, x_ND: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the group, also on zero tokens: its weights take part in every step on every rank."""
        num_tokens, selection = x_ND.shape[0], None
        if self.num_experts == 1:
            y_ND = self.mlp(x_ND)
        else:
            # experts that a server has put in their place know of no pairs without a token
            is_ours = isinstance(self.experts, MomaExperts)
            _, selection = self.router(x_ND, context if is_ours else context.allowing_host_sync())
            if self.router.normalizes_gates:
                selection = selection.normalized(num_tokens)
            # expert parallelism brings experts other rows than these, in unknown shares
            is_parallel = getattr(self.experts, "_is_expert_parallel", False)
            may_hint = takes_hints(self.router.config) and not is_parallel
            may_hint = may_hint and (is_ours or selection.shape_EK is not None)
            y_PD = self.experts(
                selection.dispatch(x_ND),
                # equal shares come expert by expert, as hints say, so that `[E, K]` needs no copy
                (selection.expert if may_hint else selection.expert_P).unsqueeze(-1),
                selection.weight_P.unsqueeze(-1),
                **(selection.hints() if may_hint else {}),
            )
            y_ND = selection.combine(y_PD, num_tokens)
        if self.shared_expert is not None:
            y_ND = y_ND + self.shared_expert(x_ND)
        if not self.needs_gate:
            return y_ND, None
        gate_N = x_ND.new_ones(num_tokens, dtype=torch.float32) if selection is None else selection.gates(num_tokens)
        return y_ND, gate_N if self.shared_expert is None else gate_N + 1


class MomaFeedForward(nn.Module):
    """Feed-forward layer with one expert group per modality, and optionally an expert that all tokens share.

    State dict:
        groups.{text,image,...}.   see [`MomaExpertGroup`]; one group named "all" when modalities share it
        shared_expert.             see [`MomaMLP`]; when configured
    """

    # run groups without a token, too: set while routers are observed
    keep_empty_groups = False

    def __init__(self, config: MomaConfig):
        super().__init__()
        self.groups = nn.ModuleDict({group: MomaExpertGroup(config, group) for group in config.expert_groups})
        shared_size = config.common_shared_intermediate_size
        self.shared_expert = MomaMLP(config, shared_size) if shared_size else None
        self.needs_gate = config.gate_after_norm

    def forward(
        self, hidden_states: torch.Tensor, context: RoutingContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Send each token through its modality's group."""
        runs_all = context.keep_empty_groups or self.keep_empty_groups
        names = list(self.groups) if runs_all else context.split.used_groups
        if len(names) == 1 and context.split.is_whole:
            y_ND, gate_N = self.groups[names[0]](hidden_states.flatten(0, 1), context)
            merged = y_ND.view(hidden_states.shape)
            gate = None if gate_N is None else gate_N.view(*hidden_states.shape[:2], 1).to(merged.dtype)
            return self._with_shared(hidden_states, merged, gate)
        tokens = context.split.split(hidden_states)
        # a chunk of padding alone has no tokens in any group
        names = names or list(self.groups)
        outputs = {name: self.groups[name](tokens[name], context) for name in names}
        merged = context.split.merge({name: output[0] for name, output in outputs.items()}, hidden_states)
        gate = None
        if self.needs_gate:
            gates = {name: gate_N for name, (_, gate_N) in outputs.items() if gate_N is not None}
            gate = context.split.merge(gates, hidden_states).unsqueeze(-1).to(merged.dtype)
        return self._with_shared(hidden_states, merged, gate)

    def _with_shared(
        self, hidden_BTD: torch.Tensor, merged_BTD: torch.Tensor, gate_BT1: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.shared_expert is None:
            return merged_BTD, gate_BT1
        return merged_BTD + self.shared_expert(hidden_BTD), None if gate_BT1 is None else gate_BT1 + 1


def residual_norm(config: MomaConfig) -> nn.Module:
    """Return a norm of the residual stream, or with `config.untied_attention` one for each modality."""
    norms = {name: MomaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) for name in config.modalities}
    # CODEPATH: all models but those that were trained here with attention by modality
    return ByModality(norms) if config.untied_attention else norms[TEXT]


def _norm(norm: nn.Module, hidden_BTD: torch.Tensor, context: RoutingContext) -> torch.Tensor:
    return norm(hidden_BTD, context) if isinstance(norm, ByModality) else norm(hidden_BTD)


class MomaDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, with the norm after (`h + norm(f(h))`, MoMa section 2.2) or before each."""

    def __init__(self, config: MomaConfig, layer_idx: int):
        super().__init__()
        self.norm_placement = config.norm_placement
        # CODEPATH: all models but those that were trained here with attention by modality
        self.self_attn = (MomaUntiedAttention if config.untied_attention else MomaAttention)(config, layer_idx)
        self.mlp = MomaFeedForward(config)
        self.attention_norm = residual_norm(config)
        self.ffn_norm = residual_norm(config)

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
        """Map hidden states `[B, T, D]` to those after the layer."""
        hidden_states = hidden_states + self.attention_update(
            hidden_states,
            routing_context,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        return hidden_states + self.ffn_update(hidden_states, routing_context)

    def attention_update(self, hidden_states: torch.Tensor, routing_context: RoutingContext, **kwargs) -> torch.Tensor:
        """Return what attention adds to the residual stream."""
        kwargs["routing_context"] = routing_context
        if self.norm_placement == "pre":
            return self.self_attn(_norm(self.attention_norm, hidden_states, routing_context), **kwargs)[0]
        return _norm(self.attention_norm, self.self_attn(hidden_states, **kwargs)[0], routing_context)

    def ffn_update(self, hidden_states: torch.Tensor, routing_context: RoutingContext) -> torch.Tensor:
        """Return what the feed-forward layer adds to the residual stream."""
        if self.norm_placement == "pre":
            return self.mlp(_norm(self.ffn_norm, hidden_states, routing_context), routing_context)[0]
        update, gate = self.mlp(hidden_states, routing_context)
        update = _norm(self.ffn_norm, update, routing_context)
        # RMSNorm has cancelled the gate of tokens that one expert took
        return update * gate if gate is not None else update


class MomaDepthDecoderLayer(DepthLayer, MomaDecoderLayer):
    """A decoder layer for the tokens that its depth router chooses, see [`DepthLayer`]."""

    def __init__(self, config: MomaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config = config
        self.layer_idx = layer_idx
        self.depth_router = MomaDepthRouter(config)


@auto_docstring(
    custom_intro="""
    Output of [`MomaForCausalLM`].
    """
)
@dataclass
class MomaCausalLMOutput(ModelOutput):
    r"""
    loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is provided):
        In training with modality weights and z-loss; the plain mean cross-entropy in eval mode.
    logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, config.vocab_size)`):
        Prediction scores before the softmax.
    cache (`Cache`, *optional*, returned when `use_cache=True`):
        Keys and values of the attention layers. A training step makes one only where the call itself asks for it.
    router_logits (`tuple(torch.FloatTensor)`, *optional*, returned when `output_router_logits=True`):
        One tensor of shape `(tokens of the group, experts of the group)` for every layer and group with a router,
        layer by layer, in the order of `config.expert_groups`; in depth layers, whose own routers' logits are not
        among them, of the chosen tokens alone. In steps of one token with a static cache every group has a row for
        every position.
    modality_losses (`dict[str, torch.Tensor]`, *optional*, returned when `labels` is provided):
        Mean cross-entropy, in nats, of the target tokens of each modality, detached and unweighted.
    modality_tokens (`dict[str, torch.Tensor]`, *optional*, returned when `labels` is provided):
        Number of target tokens of each modality.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    modality_losses: dict[str, torch.Tensor] | None = None
    modality_tokens: dict[str, torch.Tensor] | None = None


@auto_docstring
class MomaPreTrainedModel(PreTrainedModel):
    config: MomaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType]
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MomaDecoderLayer", "MomaDepthDecoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # torchao, bitsandbytes and most other quantizers leave these out, and match whole names, as regular expressions
    _keep_in_fp32_modules = [".*router"]
    _keep_in_fp32_modules_strict = ["router", "depth_router"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(MomaRouter, index=0),
        "hidden_states": MomaDecoderLayer,
        "attentions": MomaAttention,
    }

    if TYPE_CHECKING:
        # the library's wrapper says nothing of what it gives
        def to(self, *args, **kwargs) -> Self:
            """Move the model, as `torch.nn.Module.to` does."""
            ...

    def post_init(self):
        """See `PreTrainedModel.post_init`; layers get their forms for CPUs, which are the plain ones elsewhere."""
        from .cpu_moma import use_cpu_layers

        # a configuration that was loaded before the model's code did not know of any rule
        check_rules(self.config)
        self.output_modalities = tuple(sorted({"text", *self.config.frames}))
        super().post_init()
        # quantizers look for plain linear layers by their class
        if getattr(self.config, "quantization_config", None) is None:
            use_cpu_layers(self)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> Self:
        """See `PreTrainedModel.from_pretrained`; auxiliary routers are frozen, as in a new model."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, MomaAuxiliaryRouter):
                module.requires_grad_(False)
        if getattr(model, "is_quantized", False):
            from .cpu_moma import use_cpu_layers

            use_quantized_layers(model)
            use_cpu_layers(model)
        return loaded

    @classmethod
    def prepare_distribute_model(cls, distributed_config: DistributedConfig | dict | None, device_map: Any = None):
        """See `PreTrainedModel.prepare_distribute_model`; later stages of a pipeline would take images for text."""
        is_dict = isinstance(distributed_config, dict)
        stages = distributed_config.get("pp_size") if is_dict else getattr(distributed_config, "pp_size", None)
        if stages is not None and stages > 1:
            raise InputError(
                f"`pp_size` is {stages}, but a MoMa needs 1: later stages of a pipeline get no token ids, "
                "which tell the experts of text from those of images. `fsdp_size`, `tp_size` and `ep_size` divide it."
            )
        return super().prepare_distribute_model(distributed_config, device_map)

    def save_pretrained(self, *args, **kwargs):
        """See `PreTrainedModel.save_pretrained`; the code that goes along is the model's, also of a sharded one."""
        prepare_saving(self)
        super().save_pretrained(*args, **kwargs)
        if kwargs.get("is_main_process", args[1] if len(args) > 1 else True):
            finish_saving(args[0] if args else kwargs["save_directory"])

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """See `PreTrainedModel.get_correct_experts_implementation`; `"moma"` where none is asked for."""
        if requested_experts is None:
            return DEFAULT_IMPLEMENTATION
        return super().get_correct_experts_implementation(requested_experts)

    def _upload_modified_files(self, working_dir: str | Path, *args, **kwargs) -> CommitInfo:
        # the last step of `push_to_hub`, which has written the card before it
        complete_model_card(Path(working_dir) / "README.md")
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MomaExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MomaRouterBase):
            init.normal_(module.weight, mean=0.0, std=std)
            init.constant_(module.threshold, 0.5)
            init.zeros_(module.balance_bias)
            init.zeros_(module.num_updates)
        elif isinstance(module, MomaAuxiliaryRouter):
            init.constant_(module.threshold, 0.5)


@auto_docstring
class MomaModel(MomaPreTrainedModel):
    def __init__(self, config: MomaConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        depth_layers = set(config.depth_layers or ())
        # data-dependent shapes of depth layers: no full graph
        self._can_compile_fullgraph = not depth_layers
        self.layers = nn.ModuleList(
            [
                (MomaDepthDecoderLayer if layer_idx in depth_layers else MomaDecoderLayer)(config, layer_idx)
                for layer_idx in range(config.num_hidden_layers)
            ]
        )
        self.norm = MomaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MomaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        routing: str | None = None,
        depth_routing: str | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]
    ) -> MoeModelOutputWithPast:
        r"""
        mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Modality of each position, an index into `config.modalities`; used only with `inputs_embeds` (all text
            without it). With `input_ids` the ids themselves tell the modality.
        routing (`str`, *optional*):
            How experts and tokens choose each other: `"expert_choice"`, `"threshold"`, `"token_choice"` or
            `"auxiliary"`. Defaults to `config.training_routing` in `train()` mode and to `config.inference_routing` in
            `eval()` mode. A loss under `"expert_choice"` sees the future and says nothing about quality.
        depth_routing (`str`, *optional*):
            How depth layers choose their tokens. Defaults to `routing` where that is given, else to the fields of the
            config.
        """
        check_inputs(input_ids, inputs_embeds, position_ids)
        check_replica(self)
        starts_E, seq_idx = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
        batch = Batch(
            input_ids, inputs_embeds, attention_mask, position_ids, mm_token_type_ids, cache, starts_E, seq_idx
        )
        is_recorded = bool(kwargs.get("output_router_logits", self.config.output_router_logits))
        states = self.embed_tokens.weight if inputs_embeds is None else inputs_embeds
        pairs = choose_dispatch_layout(self.config, input_ids, states)
        # routing comes before the embedding, so that a bad token id raises the clearer error
        context = routing_of_batch(self.config, batch, self.training, routing, depth_routing, is_recorded, pairs)
        # a cache would take the documents of a row for one
        if use_cache and cache is None and not context.rows.are_packed:
            cache = DynamicCache(config=self.config)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen_positions(cache)
            position_ids = position_ids.unsqueeze(0)
        rows = context.rows
        inputs = attention_inputs(self.config, hidden_states, attention_mask, cache, position_ids, rows)
        inputs = {**kwargs, **inputs, "position_embeddings": self.rotary_emb(hidden_states, position_ids)}
        # not by gradients: checkpointing has them in the second of two forwards that have to agree
        if self.training and rows.document_BT is not None:
            from .cpu_moma import tiles_of

            inputs["tiles"] = tiles_of(self.config, hidden_states, rows.document_BT, rows.padding_BT)
        # fewer where the model drafts for itself (`assistant_early_exit`)
        for decoder_layer in islice(self.layers, self.config.num_hidden_layers):
            hidden_states = decoder_layer(hidden_states, context, cache=cache, use_cache=use_cache, **inputs)
        hidden_states = self.norm(hidden_states)
        if context.track:
            update_routers(context, self.config.router_bias_update_rate)
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, cache=cache)


@auto_docstring
class MomaForCausalLM(MomaPreTrainedModel, MomaGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MomaConfig):
        super().__init__(config)
        self.model = MomaModel(config)
        self._can_compile_fullgraph = self.model._can_compile_fullgraph
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(
        config: MomaConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | BlockMask | None:
        """Return the mask of a step; a prompt's is made by the model itself: its routers have to see the padding."""
        # CODEPATH: models with mixture of depths, whose caches are not compiled
        if inputs_embeds.shape[1] > 1 or config.depth_layers:
            return attention_mask
        return create_causal_mask(
            config, inputs_embeds, attention_mask, cache, position_ids=position_ids, allow_is_causal_skip=False
        )

    @can_return_tuple
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        routing: str | None = None,
        depth_routing: str | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]
    ) -> MomaCausalLMOutput:
        r"""
        mm_token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            See [`MomaModel.forward`].
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Targets, a copy of `input_ids` with -100 where no loss is wanted; shifted inside. Image codes count like
            words. What `attention_mask` hides is no target and predicts none.
        routing (`str`, *optional*):
            See [`MomaModel.forward`].
        depth_routing (`str`, *optional*):
            See [`MomaModel.forward`].
        skip_logits (`bool`, *optional*):
            With labels, compute the loss from the logits of a few positions at a time and return none: the memory of
            a large vocabulary is spared. The loss and its gradients are the same up to rounding.

        Example:

        ```python
        >>> from PIL import Image
        >>> from transformers import AutoModelForCausalLM, AutoProcessor
        >>> import modeling_moma

        >>> model = AutoModelForCausalLM.from_pretrained("model_cards/moma-emoji")
        >>> processor = AutoProcessor.from_pretrained("model_cards/moma-emoji")
        >>> inputs = processor(images=[Image.open("image.png")], text=["<image>"], return_tensors="pt")
        >>> ids = model.generate(**inputs, max_new_tokens=16, generation_mode="text")
        >>> processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ```"""
        if use_cache is None and self.training and torch.is_grad_enabled():
            # checkpointing from outside, as FSDP's, writes a cache twice, and a training step has no next token
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            use_cache=use_cache,
            routing=routing,
            depth_routing=depth_routing,
            **kwargs,  # pyright: ignore[reportCallIssue]
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        loss = logits = modality_losses = modality_tokens = None
        has_labels = labels is not None or kwargs.get("shift_labels") is not None
        if not (skip_logits and has_labels):
            logits = self.lm_head(hidden_states).contiguous()
        if has_labels:
            parts = causal_lm_loss(
                self.config,
                hidden_states if logits is None else logits,
                labels,
                training=self.training,
                attention_mask=columns_of_batch(attention_mask, outputs.cache, outputs.last_hidden_state.shape[1]),
                head=self.lm_head if logits is None else None,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
            loss, modality_losses, modality_tokens = parts.loss, parts.modality_losses, parts.modality_tokens
        return MomaCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            modality_losses=modality_losses,
            modality_tokens=modality_tokens,
        )


__all__ = [
    "MomaAttention",
    "MomaCausalLMOutput",
    "MomaDecoderLayer",
    "MomaDepthDecoderLayer",
    "MomaExpertGroup",
    "MomaExperts",
    "MomaFeedForward",
    "MomaForCausalLM",
    "MomaModel",
    "MomaPreTrainedModel",
]
