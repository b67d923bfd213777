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
"""What makes the fields of a configuration contradict themselves or one another, group by group of the fields."""

from typing import TYPE_CHECKING, Any

from transformers.activations import ACT2FN

from .errors_moma import InputError
from .frames_moma import FRAME_FIELDS, IMAGE, config_frames
from .routing_rules_moma import CAUSAL_ROUTINGS, NOISY_ROUTINGS, RULES, TRAINING_ROUTINGS


if TYPE_CHECKING:
    from .configuration_moma import MomaConfig


def require(condition: bool, name: str, value: Any, demand: str):
    """Raise a `ValueError` that names a field, its value and what it has to be, unless the condition holds."""
    if not condition:
        raise InputError(f"`{name}` = {value!r}: {demand}.")


def check_sizes(config: "MomaConfig"):
    """Check sizes, heads and the fields of attention."""
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "image_seq_length",
    ):
        require(getattr(config, name) > 0, name, getattr(config, name), "must be a positive integer")
    require(
        config.num_attention_heads % config.num_key_value_heads == 0,
        "num_key_value_heads",
        config.num_key_value_heads,
        f"must divide num_attention_heads ({config.num_attention_heads}): each serves a group of query heads",
    )
    require(
        config.head_dim % 2 == 0,
        "head_dim",
        config.head_dim,
        "must be even: rotary embeddings turn pairs of channels. Unset, it is hidden_size // num_attention_heads",
    )
    require(0 <= config.attention_dropout < 1, "attention_dropout", config.attention_dropout, "must be in [0, 1)")
    require(config.rms_norm_eps > 0, "rms_norm_eps", config.rms_norm_eps, "must be positive")
    require(config.initializer_range > 0, "initializer_range", config.initializer_range, "must be positive")
    require(
        config.pad_token_id is None or 0 <= config.pad_token_id < config.vocab_size,
        "pad_token_id",
        config.pad_token_id,
        f"must be None or below vocab_size ({config.vocab_size})",
    )
    require(config.hidden_act in ACT2FN, "hidden_act", config.hidden_act, "must be an activation of Transformers")


def check_modalities(config: "MomaConfig"):
    """Check the ranges of ids and the tokens around a picture."""
    require(
        "text" not in config.modality_token_ranges,
        "modality_token_ranges",
        config.modality_token_ranges,
        "must not name 'text': every id outside the ranges is text",
    )
    taken = []
    for modality, ranges in config.modality_token_ranges.items():
        for bounds in ranges:
            require(
                len(bounds) == 2 and 0 <= bounds[0] < bounds[1] <= config.vocab_size,
                "modality_token_ranges",
                {modality: bounds},
                f"needs [start, stop) with 0 <= start < stop <= vocab_size ({config.vocab_size})",
            )
            for other in taken:
                require(
                    bounds[1] <= other[0] or other[1] <= bounds[0],
                    "modality_token_ranges",
                    {modality: bounds},
                    f"overlaps {other}: an id has one modality",
                )
            taken.append(bounds)
    for name in ("begin_image_token_id", "end_image_token_id"):
        token_id = getattr(config, name)
        if token_id is None:
            continue
        require(0 <= token_id < config.vocab_size, name, token_id, f"must be below vocab_size ({config.vocab_size})")
        require(
            not any(start <= token_id < stop for start, stop in taken),
            name,
            token_id,
            "lies inside modality_token_ranges: the tokens around a picture are text",
        )
    if "image" in config.modality_token_ranges:
        require(
            config.begin_image_token_id is None or config.begin_image_token_id != config.end_image_token_id,
            "begin_image_token_id",
            config.begin_image_token_id,
            "must differ from end_image_token_id",
        )
        require(
            config.image_seq_length + 2 <= config.max_position_embeddings,
            "image_seq_length",
            config.image_seq_length,
            f"plus two tokens around a picture must fit max_position_embeddings ({config.max_position_embeddings})",
        )
    check_frames(config)


def check_frames(config: "MomaConfig"):
    """Check the tokens around the codes of modalities other than pictures."""
    for modality, frame in (config.modality_frames or {}).items():
        own = {modality: frame}
        require(
            modality != IMAGE,
            "modality_frames",
            own,
            "the frame of pictures stands in begin_image_token_id, end_image_token_id and image_seq_length",
        )
        require(
            modality in config.modality_token_ranges,
            "modality_frames",
            own,
            "names no modality of modality_token_ranges that can have one: "
            f"{sorted(set(config.modality_token_ranges) - {IMAGE})}",
        )
        require(
            set(frame) == set(FRAME_FIELDS), "modality_frames", own, f"needs exactly the keys {list(FRAME_FIELDS)}"
        )
        length = frame["length"]
        require(
            length is None or length >= 1,
            "modality_frames",
            own,
            "'length' must be a positive number of codes, or None for any number",
        )
        require(
            (length or 1) + 2 <= config.max_position_embeddings,
            "modality_frames",
            own,
            "'length' plus two tokens around the codes must fit max_position_embeddings "
            f"({config.max_position_embeddings})",
        )
    _check_frame_ids(config)


def _check_frame_ids(config: "MomaConfig"):
    taken = {}
    image = config_frames(config).get(IMAGE)
    if image is not None:
        taken = {image.begin: "begin_image_token_id", image.end: "end_image_token_id"}
    codes = [bounds for ranges in config.modality_token_ranges.values() for bounds in ranges]
    for modality, frame in (config.modality_frames or {}).items():
        for key in ("begin", "end"):
            given = frame[key]
            token_id, own = -1 if given is None else given, {modality: frame}
            require(
                0 <= token_id < config.vocab_size,
                "modality_frames",
                own,
                f"{key!r} must be an id below vocab_size ({config.vocab_size})",
            )
            require(
                not any(start <= token_id < stop for start, stop in codes),
                "modality_frames",
                own,
                f"{key!r} lies inside modality_token_ranges: tokens around codes are text",
            )
            require(
                token_id not in taken,
                "modality_frames",
                own,
                f"{key!r} is also {taken.get(token_id)}: each token needs its own id",
            )
            taken[token_id] = f"{key!r} of {modality!r}"


def check_experts(config: "MomaConfig"):
    """Check the expert groups: counts, widths, capacities, shared experts."""
    _require_modalities(config, "num_experts", complete=True)
    for group in config.expert_groups:
        count = config.group_num_experts(group)
        require(count >= 1, "num_experts", config.num_experts, "must be at least 1 in every group")
        capacity = config.group_capacity_factor(group)
        require(
            0 < capacity <= count,
            "expert_capacity_factor",
            config.expert_capacity_factor,
            f"must be in (0, E]: with c = E = {count} every expert takes every token of group {group!r}",
        )
    if config.expert_intermediate_size is not None:
        require(
            isinstance(config.num_experts, dict),
            "expert_intermediate_size",
            config.expert_intermediate_size,
            "needs num_experts as a dict: a single group of experts has the width intermediate_size",
        )
    for name in ("expert_intermediate_size", "shared_expert_intermediate_size", "expert_capacity_factor"):
        _require_modalities(config, name)
    for name in ("expert_intermediate_size", "shared_expert_intermediate_size"):
        value = getattr(config, name)
        widths = value.values() if isinstance(value, dict) else [] if value is None else [value]
        require(all(width > 0 for width in widths), name, value, "must be positive; leave it out for none")
    for name in ("shared_expert_intermediate_size", "expert_capacity_factor"):
        require(
            isinstance(config.num_experts, dict) or not isinstance(getattr(config, name), dict),
            name,
            getattr(config, name),
            "by modality needs num_experts by modality: a single group of experts serves all",
        )
    require(
        1 <= config.num_experts_per_tok,
        "num_experts_per_tok",
        config.num_experts_per_tok,
        "must be at least 1",
    )
    if any(
        name in RULES and RULES[name].counts_experts for name in (config.training_routing, config.inference_routing)
    ):
        fewest = min(config.group_num_experts(group) for group in config.expert_groups)
        require(
            config.num_experts_per_tok <= fewest,
            "num_experts_per_tok",
            config.num_experts_per_tok,
            f"exceeds the smallest group of experts ({fewest})",
        )


def check_routing(config: "MomaConfig"):
    """Check the switches of norms, routing and losses."""
    for name, choices in (
        ("norm_placement", ("pre", "post")),
        ("qk_norm", ("layernorm", "layernorm_per_head", "rmsnorm", "none")),
        ("training_routing", TRAINING_ROUTINGS),
    ):
        require(getattr(config, name) in choices, name, getattr(config, name), f"must be one of {choices}")
    require(
        config.inference_routing in CAUSAL_ROUTINGS,
        "inference_routing",
        config.inference_routing,
        f"must be one of {CAUSAL_ROUTINGS}: expert_choice sees the future. To measure it, call "
        "forward(routing='expert_choice')",
    )
    require(
        not (config.gate_after_norm and config.norm_placement == "pre"),
        "gate_after_norm",
        config.gate_after_norm,
        "needs norm_placement='post': with 'pre' nothing cancels the gate",
    )
    for name in ("threshold_momentum", "depth_threshold_momentum"):
        require(0 <= getattr(config, name) < 1, name, getattr(config, name), "must be in [0, 1)")
    require(
        config.gumbel_noise == 0 or config.training_routing in NOISY_ROUTINGS,
        "gumbel_noise",
        config.gumbel_noise,
        f"needs a training_routing of {NOISY_ROUTINGS}: others cut scores where they were found without noise",
    )
    require(
        config.gumbel_noise_steps is None or config.gumbel_noise_steps > 0,
        "gumbel_noise_steps",
        config.gumbel_noise_steps,
        "must be positive, or None for noise that stays",
    )
    for name in ("routing_warmup_steps", "router_bias_update_rate", "z_loss_coef", "gumbel_noise"):
        require(getattr(config, name) >= 0, name, getattr(config, name), "must not be negative")
    _require_modalities(config, "modality_loss_weights")
    weights = config.modality_loss_weights or {}
    require(
        all(weight >= 0 for weight in weights.values()),
        "modality_loss_weights",
        config.modality_loss_weights,
        "must not be negative",
    )


def check_depth(config: "MomaConfig"):
    """Check the depth layers and the routing of their tokens."""
    layers = config.depth_layers or []
    require(
        all(0 <= layer < config.num_hidden_layers for layer in layers) and sorted(set(layers)) == layers,
        "depth_layers",
        config.depth_layers,
        f"must be ascending indices of the {config.num_hidden_layers} layers, counted from 0",
    )
    _require_modalities(config, "depth_capacity", complete=True)
    for pool in config.depth_pools:
        capacity = config.pool_depth_capacity(pool)
        require(0 < capacity <= 1, "depth_capacity", config.depth_capacity, "is a share of the tokens, in (0, 1]")
    require(config.depth_pool in ("batch", "row"), "depth_pool", config.depth_pool, "must be 'batch' or 'row'")
    for name, choices in (
        ("depth_training_routing", TRAINING_ROUTINGS),
        ("depth_inference_routing", CAUSAL_ROUTINGS),
    ):
        value = getattr(config, name)
        require(
            value is None or value in choices,
            name,
            value,
            f"must be one of {choices}, or None for {name.removeprefix('depth_')}",
        )
    for name in ("inference_routing", "depth_inference_routing"):
        value = getattr(config, name)
        require(
            value is None or not RULES[value].needs_auxiliary or config.auxiliary_routers,
            name,
            value,
            "needs auxiliary_routers=True, and `moma train-auxiliary-routers` to train them",
        )


def _require_modalities(config: "MomaConfig", name: str, complete: bool = False) -> None:
    value = getattr(config, name)
    if not isinstance(value, dict):
        return
    unknown = sorted(set(value) - set(config.modalities))
    require(not unknown, name, value, f"names {unknown}, which modality_token_ranges does not define")
    missing = sorted(set(config.modalities) - set(value)) if complete else []
    require(not missing, name, value, f"lacks {missing}: every modality needs its own")


__all__ = ["check_depth", "check_experts", "check_modalities", "check_routing", "check_sizes", "require"]
