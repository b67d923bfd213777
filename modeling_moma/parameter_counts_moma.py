# SPDX-License-Identifier: Apache-2.0
"""Parameters of `MomaForCausalLM` in closed form, part by part."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .configuration_moma import MomaConfig


def count_parameters(config: "MomaConfig", active: bool, modality: str | None, exclude_norms_and_routers: bool) -> int:
    """Parameters of the model of a [`MomaConfig`]; see [`MomaConfig.num_parameters`] for the arguments."""
    if active and modality is None:
        return max(count_parameters(config, True, name, exclude_norms_and_routers) for name in config.modalities)
    width = config.hidden_size
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    layer = attention_parameters(config) + 3 * width * config.common_shared_intermediate_size
    layer += sum(
        _group(config, name, active, exclude_norms_and_routers)
        for name, members in config.expert_groups.items()
        if modality is None or modality in members
    )
    if not exclude_norms_and_routers:
        layer += _norms(config)
    num_depth_layers = len(config.depth_layers or ())
    layers = (config.num_hidden_layers - num_depth_layers) * layer
    layers += (
        num_depth_layers * layer * (1 if modality is None or not active else config.pool_depth_capacity(modality))
    )
    if not exclude_norms_and_routers:
        layers += width + num_depth_layers * router_parameters(config, 1)
    return round(embeddings + layers)


def attention_parameters(config: "MomaConfig") -> int:
    """Matrices and biases of one attention, without the norms of queries and keys."""
    query_width, key_width = (
        heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    biases = query_width + 2 * key_width + config.hidden_size if config.attention_bias else 0
    return config.hidden_size * (2 * query_width + 2 * key_width) + biases


def _norms(config: "MomaConfig") -> int:
    qk_norm = {
        "none": 0,
        "rmsnorm": 2 * config.head_dim,
        "layernorm": 4 * config.head_dim,
        "layernorm_per_head": 2 * config.head_dim * (config.num_attention_heads + config.num_key_value_heads),
    }
    return 2 * config.hidden_size + qk_norm[config.qk_norm]


def router_parameters(config: "MomaConfig", num_scores: int) -> int:
    """One router of so many scores, its auxiliary router included."""
    width = config.hidden_size
    auxiliary = width // 2 * (width + num_scores) if config.auxiliary_routers else 0
    return num_scores * width + auxiliary


def _group(config: "MomaConfig", group: str, active: bool, exclude_routers: bool) -> float:
    num_experts = config.group_num_experts(group)
    expert = 3 * config.hidden_size * config.group_intermediate_size(group)
    shared = 3 * config.hidden_size * config.group_shared_intermediate_size(group)
    if num_experts == 1:
        return expert + shared
    router = 0 if exclude_routers else router_parameters(config, num_experts)
    used = config.group_capacity_factor(group) if active else num_experts
    return used * expert + shared + router
