# SPDX-License-Identifier: Apache-2.0
"""How GPUs share a model, which layouts its sizes allow, and their memory and traffic in a training, in closed form.

Counted is training with bf16 matmuls and AdamW: weights, gradients and both moments are kept in fp32, 16 bytes per
parameter. Gathered weights, FSDP's gradients on the wire and activations of matmuls are bf16.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..configuration_moma import MomaConfig, attention_parameters, router_parameters, rule_of
from ..errors_moma import InputError
from .costs import group_of


FP32, BF16 = 4, 2


@dataclass(frozen=True)
class Layout:
    """How GPUs share a model.

    Ranks are numbered with tensor parallelism innermost, then sharding, then replicas. Expert parallelism uses the
    ranks of a shard group: `expert` consecutive ones hold the experts of every group between them and exchange tokens.

    Attributes:
        replicate (`int`):
            copies of the sharded model: DDP with `shard=1`, HSDP otherwise.
        shard (`int`):
            ranks over which FSDP shards weights, gradients and moments.
        tensor (`int`):
            ranks that split attention heads and inner widths.
        expert (`int`):
            ranks that split the experts of each group.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.replicate * self.shard * self.tensor

    def __str__(self) -> str:
        if self.shard == 1:
            name = f"DDP {self.replicate}" if self.replicate > 1 else "one copy"
        elif self.replicate == 1:
            name = f"FSDP {self.shard}"
        else:
            name = f"HSDP {self.replicate} x {self.shard}"
        parts = [name, *(f"{label} {size}" for label, size in (("TP", self.tensor), ("EP", self.expert)) if size > 1)]
        return " + ".join(parts)

    def check(self, config: MomaConfig):
        """Refuse what the model's sizes forbid."""
        for name in ("replicate", "shard", "tensor", "expert"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"`{name}` must be a positive integer, got {size!r}.")
        for name, size in _tensor_sizes(config).items():
            if size % self.tensor:
                raise InputError(f"`tensor` = {self.tensor} does not divide {name} ({size}).")
        if self.expert == 1:
            return
        if self.shard % self.expert:
            raise InputError(f"`expert` = {self.expert} does not divide the shard group ({self.shard}).")
        counts = [config.group_num_experts(group) for group in config.expert_groups]
        if max(counts) == 1:
            raise InputError(f"`expert` = {self.expert}: the model has no group of several experts.")
        for group, count in zip(config.expert_groups, counts, strict=True):
            if count > 1 and count % self.expert:
                raise InputError(f"`expert` = {self.expert} does not divide the {count} experts of group {group!r}.")
            # Transformers splits the experts of an expert-parallel rank over the rest of the group, each unsplit
            if count > 1 and self.shard * self.tensor > count:
                raise InputError(
                    f"`expert` = {self.expert} in shard groups of {self.shard * self.tensor}: the {count} experts of "
                    f"group {group!r} are not enough for a part on every rank. Use more replicas of smaller groups."
                )


def _tensor_sizes(config: MomaConfig) -> dict[str, int]:
    sizes = {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads", "vocab_size")}
    for group in config.expert_groups:
        sizes[f"the inner width of {group!r} experts"] = config.group_intermediate_size(group)
        shared = config.group_shared_intermediate_size(group) or config.common_shared_intermediate_size
        sizes[f"the inner width of {group!r} shared experts"] = shared
    return sizes


@dataclass(frozen=True)
class ParameterParts:
    """Parameters by the way that layouts split them."""

    experts: int
    matrices: int
    replicated: int
    ends: int


def parameter_parts(config: MomaConfig) -> ParameterParts:
    """Count the parameters of a layer by how layouts split them; see [`ParameterParts`]."""
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


@dataclass(frozen=True)
class Collective:
    """One kind of exchange between GPUs, summed over a training step."""

    name: str
    kind: str
    payload: float
    ranks: int
    stride: int
    calls: float
    is_overlapped: bool

    @property
    def sent(self) -> float:
        """Bytes that each GPU sends."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.payload * (self.ranks - 1) / self.ranks

    @property
    def hops(self) -> int:
        """Sends of one call that wait for one another: rings gather and scatter, trees reduce to all."""
        if self.kind == "all_to_all":
            return 1
        return 2 * math.ceil(math.log2(self.ranks)) if self.kind == "all_reduce" else self.ranks - 1


def training_traffic(
    config: MomaConfig, layout: Layout, tokens: int, micro_batches: int = 1, checkpointing: bool = False
) -> list[Collective]:
    """Return what the GPUs exchange in one optimiser step.

    Args:
        config (`MomaConfig`):
            the model.
        layout (`Layout`):
            who holds what.
        tokens (`int`):
            tokens of one data-parallel rank in the step, over all micro-batches.
        micro_batches (`int`, *optional*, defaults to `1`):
            forwards of the step. FSDP gathers weights twice and scatters gradients once in each; DDP reduces once.
        checkpointing (`bool`, *optional*, defaults to `False`):
            tokens are sent a second time when layers are computed again.

    Returns:
        `list[Collective]`: groups of one rank are left out.

    Raises:
        ValueError: the layout does not fit the model.
    """
    layout.check(config)
    collectives = _weight_traffic(config, layout, micro_batches) + _token_traffic(
        config, layout, tokens, micro_batches, 3 if checkpointing else 2
    )
    return [collective for collective in collectives if collective.ranks > 1]


def _weight_traffic(config: MomaConfig, layout: Layout, micro_batches: int) -> list[Collective]:
    parts = parameter_parts(config)
    layers = config.num_hidden_layers
    dense = layers * (parts.matrices / layout.tensor + parts.replicated) + parts.ends / layout.tensor
    experts = layers * parts.experts / (layout.tensor * layout.expert)
    outer = layout.tensor * layout.shard
    # a call for each layer, and one for embedding and head
    calls = layers + 1
    if layout.shard == 1:
        payload = FP32 * (dense + experts)
        return [Collective("gradients", "all_reduce", payload, layout.replicate, outer, calls, True)]
    calls *= micro_batches
    result = []
    groups = (
        ("weights", dense, layout.shard, layout.tensor),
        ("experts", experts, layout.shard // layout.expert, layout.tensor * layout.expert),
    )
    for name, count, ranks, stride in groups:
        payload = micro_batches * BF16 * count
        gradients = f"gradients of {name}"
        result += [
            Collective(name, "all_gather", 2 * payload, ranks, stride, 2 * calls, True),
            Collective(gradients, "reduce_scatter", payload, ranks, stride, calls, True),
            Collective(gradients, "all_reduce", payload / ranks, layout.replicate, outer, calls, True),
        ]
    return result


def _token_traffic(
    config: MomaConfig, layout: Layout, tokens: int, micro_batches: int, passes: int
) -> list[Collective]:
    share = mean_over_modalities(config, config.pool_depth_capacity) if config.depth_layers else 0
    num_depth = len(config.depth_layers or ())
    layers = config.num_hidden_layers - num_depth + share * num_depth
    stream = tokens * BF16 * config.hidden_size
    # each group sends tokens there and back in each pass
    dispatched = 2 * passes * layers * experts_per_token(config) * stream
    groups = sum(config.group_num_experts(group) > 1 for group in config.expert_groups)
    dispatches = micro_batches * 2 * passes * groups * config.num_hidden_layers
    # all-reduce after attention and after feed-forward, once for the embedding and once for the head's gradient
    reduced = (2 * passes * layers + 2) * stream
    reductions = micro_batches * (2 * passes * config.num_hidden_layers + 2)
    logits = tokens * BF16 * config.vocab_size
    return [
        Collective("tokens to experts", "all_to_all", dispatched, layout.expert, layout.tensor, dispatches, False),
        Collective("partial sums", "all_reduce", reduced, layout.tensor, 1, reductions, False),
        Collective("logits", "all_gather", logits, layout.tensor, 1, micro_batches, False),
    ]
