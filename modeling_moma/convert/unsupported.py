# SPDX-License-Identifier: Apache-2.0
"""What a text model computes that no `MomaConfig` can express, feature by feature."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .reading import CheckpointError


MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def check_model_type(config: Mapping[str, Any], where: Path) -> None:
    """Refuse kinds of models that cannot be converted; where much is alike, by all that differs."""
    model_type = config.get("model_type")
    if model_type in MODEL_TYPES:
        return
    text_config = config.get("text_config") or config
    differences = {
        "smollm3": _smollm3,
        "gemma3": _gemma3,
        "gemma3_text": _gemma3,
        "qwen3_moe": _qwen3_moe,
    }.get(str(model_type), lambda fields: [])(text_config)
    if differences:
        listed = "; ".join(differences)
        raise CheckpointError(f"{where}: `model_type` = {model_type!r}: MoMa cannot express {listed}.")
    raise CheckpointError(f"{where}: `model_type` = {model_type!r}: it must be one of {MODEL_TYPES}.")


def _smollm3(config: Mapping[str, Any]) -> list[str]:
    return ["layers without rotary embeddings (SmolLM2, of model_type 'llama', can be converted)"]


def _gemma3(config: Mapping[str, Any]) -> list[str]:
    # norms of 1 + weight, query and key norms and the activation would go
    found = ["norms both before and after attention and feed-forward (`norm_placement` is 'pre' or 'post')"]
    width = config.get("hidden_size")
    if isinstance(width, int) and config.get("tie_word_embeddings", True):
        found.append(f"embeddings times {math.sqrt(width):.2f} at the input but not in the tied head")
    window = config.get("sliding_window")
    if window is not None:
        found.append(f"attention within `sliding_window` = {window} in most layers, with rotary embeddings of its own")
    scalar, head_dim = config.get("query_pre_attn_scalar", 256), config.get("head_dim", 256)
    if scalar != head_dim:
        found.append(f"attention scaled by `query_pre_attn_scalar` = {scalar} where a head has {head_dim}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name) is not None:
            found.append(f"`{name}` = {config[name]}")
    return found


def _qwen3_moe(config: Mapping[str, Any]) -> list[str]:
    experts, chosen = config.get("num_experts", 128), config.get("num_experts_per_tok", 8)
    found = []
    if chosen != 1 or not config.get("norm_topk_prob", False):
        scaled = "scaled to sum to 1" if config.get("norm_topk_prob", False) else "not scaled"
        found.append(
            f"gates that are the softmax over {experts} experts, of which the best {chosen} are kept, {scaled} (gates "
            "of MoMa are sigmoids of single scores)"
        )
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        found.append("layers without experts between layers with them")
    # a single expert, of gate 1, could be expressed; no released model is like that
    return found or ["this mixture of experts: a conversion of several experts has not been written"]


def check_features(config: PreTrainedConfig, where: Path) -> None:
    """Refuse, by its field, what a model of a known kind may have and MoMa lacks."""
    rope = config.rope_parameters or {}
    sliding = config.model_type == "mistral" and config.sliding_window is not None
    sliding = sliding or "sliding_attention" in (getattr(config, "layer_types", None) or ())
    for is_foreign, field, what in (
        (getattr(config, "mlp_bias", False), "mlp_bias", "feed-forward layers with biases"),
        (sliding, "sliding_window", "attention within a sliding window"),
        (rope.get("partial_rotary_factor", 1.0) != 1.0, "partial_rotary_factor", "heads that turn in part only"),
        (rope.get("rope_type") not in ("default", *ROPE_INIT_FUNCTIONS), "rope_parameters", "such rotary embeddings"),
    ):
        if is_foreign:
            value = getattr(config, field, rope.get(field))
            raise CheckpointError(f"{where}: `{field}` = {value!r}: MoMa cannot express {what}.")
