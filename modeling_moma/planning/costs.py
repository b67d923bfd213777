# SPDX-License-Identifier: Apache-2.0
"""What a MoMa costs: FLOPs per token in closed form, and the saving eta that a loss curve shows against another."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..configuration_moma import MomaConfig, RoutingRule, rule_of
from ..errors_moma import InputError


def flops_per_token(
    config: MomaConfig, modality: str, sequence_length: int, training: bool = False, routing: str | None = None
) -> float:
    """Return FLOPs that one token of a modality costs on average, head included.

    Counted are matmuls, `2 * m * n * k` each, as `torch.utils.flop_counter.FlopCounterMode` counts them:
    attention over all `sequence_length` positions, causal or not; embeddings, norms, activations and rotary embeddings
    are free. A training step is three forwards; what activation checkpointing or a fused attention kernel computes a
    second time is not counted.

    Under `expert_choice` and `threshold` a token meets `c` experts of its group (`expert_capacity_factor`): exactly in
    the mean for the former up to the rounding of `K`, as far as the thresholds are settled for the latter. Under
    `token_choice` it meets `num_experts_per_tok`. `auxiliary` counts as `threshold`, with the auxiliary routers.

    A depth layer costs the share `depth_capacity` of another layer, with that share of the keys, and its router. Where
    modalities have capacities of their own, the keys are counted as if all modalities were equally frequent.

    Args:
        config (`MomaConfig`):
            the model.
        modality (`str`):
            a name of `config.modalities`.
        sequence_length (`int`):
            positions that the token's attention covers.
        training (`bool`, *optional*, defaults to `False`):
            count the backward pass too.
        routing (`str`, *optional*):
            of experts and depth layers; by default each has that of the configuration, in training or at inference.

    Returns:
        `float`: FLOPs.

    Raises:
        ValueError: unknown modality or routing, or a length below 1.
    """
    if modality not in config.modalities:
        raise InputError(f"`modality` must be one of {config.modalities}, got {modality!r}.")
    if sequence_length < 1:
        raise InputError(f"`sequence_length` must be at least 1, got {sequence_length}.")
    depth_routing = routing
    if routing is None:
        routing = config.training_routing if training else config.inference_routing
        depth_routing = config.depth_training_routing if training else config.depth_inference_routing
    rule, depth_rule = rule_of(routing), rule_of(depth_routing or routing)
    group = group_of(config, modality)
    feed_forward = _feed_forward_flops(config, group, rule)
    num_depth_layers = len(config.depth_layers or ())
    layers = (config.num_hidden_layers - num_depth_layers) * (_attention_flops(config, sequence_length) + feed_forward)
    if num_depth_layers:
        layers += num_depth_layers * _depth_flops(config, modality, sequence_length, feed_forward, depth_rule)
    forward = layers + 2 * config.hidden_size * config.vocab_size
    # the gradient of a matmul is two more of its size
    return 3 * forward if training else forward


def training_flops(
    config: MomaConfig, tokens_by_modality: Mapping[str, float], sequence_length: int, routing: str | None = None
) -> float:
    """Return FLOPs of training on so many tokens of each modality, in sequences of `sequence_length`.

    Args:
        config (`MomaConfig`):
            the model.
        tokens_by_modality (`Mapping[str, float]`):
            number of tokens by modality; modalities left out have none.
        sequence_length (`int`):
            positions of one sequence.
        routing (`str`, *optional*):
            defaults to `config.training_routing`.

    Returns:
        `float`: FLOPs, forward and backward.

    Raises:
        ValueError: unknown modality, or a negative number of tokens.
    """
    total = 0.0
    for modality, count in tokens_by_modality.items():
        if not (math.isfinite(count) and count >= 0):
            raise InputError(f"`tokens_by_modality` has {count} tokens of {modality!r}: must be 0 or more.")
        total += count * flops_per_token(config, modality, sequence_length, training=True, routing=routing)
    return total


def group_of(config: MomaConfig, modality: str) -> str:
    """Return the group of experts that a modality goes to."""
    return next(name for name, members in config.expert_groups.items() if modality in members)


def _attention_flops(config: MomaConfig, sequence_length: float) -> float:
    query_width = config.num_attention_heads * config.head_dim
    key_width = config.num_key_value_heads * config.head_dim
    projections = 2 * config.hidden_size * (2 * query_width + 2 * key_width)
    # scores, then the weighted sum of values
    return projections + 2 * 2 * sequence_length * query_width


def _depth_flops(
    config: MomaConfig, modality: str, sequence_length: float, feed_forward: float, rule: RoutingRule
) -> float:
    capacities = [config.pool_depth_capacity(pool) for pool in config.depth_pools]
    num_keys = sum(capacities) / len(capacities) * sequence_length
    share = config.pool_depth_capacity(modality)
    return _router_flops(config, 1, rule) + share * (_attention_flops(config, num_keys) + feed_forward)


def _router_flops(config: MomaConfig, num_scores: int, rule: RoutingRule) -> int:
    auxiliary = config.hidden_size // 2 * (config.hidden_size + num_scores) if rule.needs_auxiliary else 0
    return 2 * (config.hidden_size * num_scores + auxiliary)


def _feed_forward_flops(config: MomaConfig, group: str, rule: RoutingRule) -> float:
    num_experts = config.group_num_experts(group)
    if num_experts == 1:
        used, router = 1, 0
    else:
        used = rule.experts_per_token(config, group)
        router = _router_flops(config, num_experts, rule)
    shared = config.common_shared_intermediate_size + config.group_shared_intermediate_size(group)
    width = used * config.group_intermediate_size(group) + shared
    return router + 2 * 3 * config.hidden_size * width


@dataclass(frozen=True)
class Eta:
    """A FLOPs saving, or what the curves tell of it.

    Attributes:
        value (`float`):
            the dense model's FLOPs over the sparse model's at the same loss.
        bound (`str`):
            `"exact"`; `"at_most"` when the sparse curve ends before it reaches the dense model's loss; `"at_least"`
            when its first point is already there.
    """

    value: float
    bound: str = "exact"

    def __str__(self) -> str:
        return {"exact": "", "at_most": "<", "at_least": ">="}[self.bound] + f"{self.value:.2f}x"


def eta(dense: Sequence[tuple[float, float]], sparse: Sequence[tuple[float, float]]) -> Eta:
    """Return FLOPs saving of a sparse model against a dense one (MoMa footnote 6).

    A model has the factor eta if it reaches the dense model's final loss with `1 / eta` of its FLOPs. Noise must
    favour neither side: both curves are replaced by their running minimum, linear between the points; the dense
    model's loss is its lowest, at the FLOPs that first reach it (the whole training, when the curve ends at its
    lowest). So `eta(curve, curve)` is 1.

    Args:
        dense (`Sequence[tuple[float, float]]`):
            points `(FLOPs, loss)`, FLOPs ascending. Steps serve as well when a step of both models costs the same.
        sparse (`Sequence[tuple[float, float]]`):
            the other model's curve, in the same unit.

    Returns:
        [`Eta`]: the factor, or a bound of it.

    Raises:
        TypeError: a curve is not a sequence of pairs of numbers.
        ValueError: a curve is empty, not finite, or its FLOPs are not positive and ascending.
    """
    dense_flops, dense_losses = _envelope("dense", dense)
    flops, losses = _envelope("sparse", sparse)
    target = dense_losses[-1]
    dense_cost = dense_flops[dense_losses.index(target)]
    if losses[-1] > target:
        return Eta(dense_cost / flops[-1], "at_most")
    first = next(index for index, loss in enumerate(losses) if loss <= target)
    if first == 0:
        # a curve whose first point equals the dense model's only one says all there is to say
        same_start = losses[0] == target
        return Eta(dense_cost / flops[0], "exact" if same_start else "at_least")
    share = (losses[first - 1] - target) / (losses[first - 1] - losses[first])
    cost = flops[first - 1] + share * (flops[first] - flops[first - 1])
    return Eta(dense_cost / cost)


def _envelope(name: str, curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    try:
        points = [(float(flops), float(loss)) for flops, loss in curve]
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be a sequence of (FLOPs, loss) pairs of numbers, got {curve!r}.") from error
    if not points:
        raise InputError(f"`{name}` is an empty curve.")
    losses = []
    previous = 0.0
    for flops, loss in points:
        if not (math.isfinite(flops) and math.isfinite(loss)):
            raise InputError(f"`{name}` has the point ({flops}, {loss}): FLOPs and loss must be finite.")
        if flops <= previous:
            raise InputError(f"`{name}` has {flops} FLOPs after {previous}: FLOPs must be positive and ascending.")
        previous = flops
        losses.append(min(loss, losses[-1]) if losses else loss)
    return [flops for flops, _ in points], losses
