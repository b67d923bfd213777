# SPDX-License-Identifier: Apache-2.0
"""Memory per GPU of training a MoMa on many, in closed form, by layout.

Counted is training with bf16 matmuls and AdamW: weights, gradients and both moments are kept in fp32, 16 bytes per
parameter. Gathered weights, FSDP's gradients on the wire and activations of matmuls are bf16.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..configuration_moma import MomaConfig, attention_parameters, router_parameters, rule_of
from .costs import check_config, group_of
from .layouts import Layout


FP32, BF16 = 4, 2


@dataclass(frozen=True)
class ParameterParts:
    """Parameters by the way that layouts split them."""

    experts: int
    matrices: int
    replicated: int
    ends: int


def parameter_parts(config: MomaConfig) -> ParameterParts:
    """Count the parameters of a layer by how layouts split them; see [`ParameterParts`]."""
    check_config(config)
    width = config.hidden_size
    experts = matrices = 0
    for group in config.expert_groups:
        weights = 3 * width * config.group_num_experts(group) * config.group_intermediate_size(group)
        if config.group_num_experts(group) > 1:
            experts += weights
        else:
            matrices += weights
        matrices += 3 * width * config.group_shared_intermediate_size(group)
    matrices += 3 * width * config.common_shared_intermediate_size
    matrices += attention_parameters(config)
    ends = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    depth_routers = len(config.depth_layers or ()) * router_parameters(config, 1)
    layers = config.num_parameters() - ends - width - depth_routers
    replicated = layers // config.num_hidden_layers - experts - matrices
    return ParameterParts(experts, matrices, replicated, ends)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a training step."""

    weights: float
    gradients: float
    moments: float
    working: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.gradients + self.moments + self.working + self.activations


def training_memory(config: MomaConfig, layout: Layout, tokens: int, checkpointing: bool = False) -> Memory:
    """Return the bytes on one GPU while it trains on `tokens` tokens at once.

    Args:
        config (`MomaConfig`):
            the model.
        layout (`Layout`):
            who holds what.
        tokens (`int`):
            tokens of one forward on one data-parallel rank. Ranks of a tensor-parallel group share them.
        checkpointing (`bool`, *optional*, defaults to `False`):
            keep the input of each layer and compute the rest again.

    Returns:
        [`Memory`]: without what the CUDA context, communication buffers and fragmentation take.

    Raises:
        ValueError: the layout does not fit the model.
    """
    layout.check(config)
    parts = parameter_parts(config)
    layer = (parts.matrices + parts.experts / layout.expert) / layout.tensor + parts.replicated
    ends = parts.ends / layout.tensor
    held = config.num_hidden_layers * ((parts.matrices + parts.experts) / layout.tensor + parts.replicated) + ends
    held /= layout.shard
    if layout.shard > 1:
        working = BF16 * (2 * layer + ends) + BF16 * (layer + ends)
    else:
        working = BF16 * held
    activations = activation_bytes(config, tokens, layout.tensor, checkpointing)
    return Memory(FP32 * held, FP32 * held, 2 * FP32 * held, working, activations)


def activation_bytes(config: MomaConfig, tokens: int, tensor: int = 1, checkpointing: bool = False) -> float:
    """Return the bytes that the backward pass needs under autocast to bf16, with attention that stores no scores.

    The peak is where the logits' gradient is made: fp32 logits, their log-softmax and the gradient of each use of
    them. The residual stream, norms and routers are fp32. Modalities are equally frequent; a token meets as many
    experts as under `training_routing`, which keep what they keep under `expert_choice`.
    """
    check_config(config)
    num_depth = len(config.depth_layers or ())
    share = mean_over_modalities(config, config.pool_depth_capacity) if num_depth else 0
    layer = _layer_bytes(config, tensor)
    # chosen tokens are packed and put back; of the others the stream and the router's input remain
    depth_layer = share * (layer + 3 * FP32 * config.hidden_size) + 2 * FP32 * config.hidden_size
    # both uses of the logits leave a gradient: the cross-entropy and, with z-loss, the target's logit
    logits = config.vocab_size * FP32 * (4 if config.z_loss_coef else 3)
    ends = (2 * FP32 + BF16) * config.hidden_size
    num_full = config.num_hidden_layers - num_depth
    if not checkpointing:
        return tokens * (num_full * layer + num_depth * depth_layer + ends + logits)
    inputs = config.num_hidden_layers * FP32 * config.hidden_size
    # the logits are freed before layers are recomputed
    again = layer if num_full else depth_layer
    return tokens * (inputs + ends + max(again, logits))


def mean_over_modalities(config: MomaConfig, of_modality: Callable[[str], float]) -> float:
    """Return the mean of a figure of each modality."""
    return sum(of_modality(modality) for modality in config.modalities) / len(config.modalities)


def experts_per_token(config: MomaConfig) -> float:
    """Return packed experts that a token meets in training on average; 0 without packed experts.

    Modalities are taken to be equally frequent.
    """
    check_config(config)
    rule = rule_of(config.training_routing)

    def used(modality: str) -> float:
        group = group_of(config, modality)
        return rule.experts_per_token(config, group) if config.group_num_experts(group) > 1 else 0

    return mean_over_modalities(config, used)


def _layer_bytes(config: MomaConfig, tensor: int) -> float:
    width, rule = config.hidden_size, rule_of(config.training_routing)
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    # norms of the residual stream and what they norm; the inputs of projections
    stream = width * (7 * BF16 + 2 * FP32 + (FP32 if config.norm_placement == "pre" else 0))
    if config.gate_after_norm:
        stream += width * FP32
    # queries and keys before and after their norm, values, the attention's output
    per_head = {"none": 2 * BF16, "rmsnorm": 3 * BF16 + FP32, "layernorm": 4 * BF16, "layernorm_per_head": 4 * BF16}
    attention = heads * per_head[config.qk_norm]
    if config.untied_attention:
        # queries, keys and values back in place, and the attention's output by modality
        attention += 2 * heads * BF16

    def feed_forward(modality: str) -> tuple[float, float]:
        group = group_of(config, modality)
        routed = config.group_num_experts(group) > 1
        used = rule.experts_per_token(config, group) if routed else 1
        shared = config.group_shared_intermediate_size(group) + config.common_shared_intermediate_size
        # the router's input; for each chosen token its place in the experts' input, output and sum
        dispatched = FP32 + (3 * used - 2) * BF16 if routed else 0
        dispatched += 2 * BF16 if shared else 0
        return width * dispatched, 4 * BF16 * (used * config.group_intermediate_size(group) + shared)

    dispatched = mean_over_modalities(config, lambda modality: feed_forward(modality)[0])
    inner = mean_over_modalities(config, lambda modality: feed_forward(modality)[1])
    return stream + dispatched + (attention + inner) / tensor
