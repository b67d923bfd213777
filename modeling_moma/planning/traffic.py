# SPDX-License-Identifier: Apache-2.0
"""Bytes between GPUs in a training step, in closed form, by layout."""

import math
from dataclasses import dataclass

from ..configuration_moma import MomaConfig
from .layouts import Layout
from .memory import BF16, FP32, experts_per_token, mean_over_modalities, parameter_parts


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
