# SPDX-License-Identifier: Apache-2.0
"""From what the model was called with to the routing of one forward: its rules, its groups of tokens, its checks.

Shape suffixes:
    B rows, T positions, D hidden size, H heads, Q queries, S positions that the cache has seen and those of the batch.
"""

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices

from .configuration_moma import MomaConfig
from .depth_moma import depth_form_of
from .dispatch_moma import DEFAULT_IMPLEMENTATION
from .document_lengths_moma import goes_by_lengths
from .errors_moma import InputError
from .host_moma import is_on_host
from .modality_split_moma import (
    FEW_POSITIONS,
    FixedSplit,
    ModalitySplit,
    position_groups,
    split_modalities,
    token_modalities,
)
from .routing_context_moma import RoutingContext, is_distributed
from .routing_rules_moma import rule_of


def routing_of_batch(
    config: MomaConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
    cache: Cache | None,
    is_whole_prompt: bool,
    is_training: bool,
    routing: str | None = None,
    depth_routing: str | None = None,
    is_recorded: bool = False,
) -> RoutingContext:
    """Describe the routing of one forward to all its layers, and refuse what cannot be routed.

    Args:
        config (`MomaConfig`): the model's.
        input_ids (`torch.LongTensor`, *optional*): `[B, T]`; this or `inputs_embeds`.
        inputs_embeds (`torch.Tensor`, *optional*): `[B, T, D]`.
        attention_mask (`torch.Tensor`, *optional*): 0 at padding, `[B, S]`, or the caller's own `[B, 1 or H, Q, S]`.
        position_ids (`torch.LongTensor`, *optional*): `[B, T]`.
        mm_token_type_ids (`torch.LongTensor`, *optional*): modality of each position of `inputs_embeds`, `[B, T]`.
        cache (`Cache`, *optional*): of this forward.
        is_whole_prompt (`bool`): whether no cache came from the caller, so that a row without a token is an error.
        is_training (`bool`): whether the model is in `train()` mode.
        routing (`str`, *optional*): the caller's rule for experts.
        depth_routing (`str`, *optional*): the caller's rule for depth layers.
        is_recorded (`bool`, *optional*, defaults to `False`): whether each router's logits are asked for.

    Raises:
        IndexError: an id lies outside the vocabulary.
        TypeError: depth layers cannot pack this attention mask.
        ValueError: there is no such rule, or the batch is empty, too long, or does not fit its mask or modalities.
    """
    routing, depth_routing = _resolve_rules(config, is_training, routing, depth_routing)
    # the caller gives one of the two
    inputs: torch.Tensor = input_ids if input_ids is not None else inputs_embeds  # pyright: ignore[reportAssignmentType]
    past_length = seen_positions(cache)
    # only static layers count in tensors, and only once they hold something
    may_fix = _may_fix_shapes(config, inputs, routing, is_training)
    is_exported = torch.compiler.is_exporting()
    if is_exported:
        check_exportable(config, routing, is_training)
    if is_exported or (may_fix and isinstance(past_length, torch.Tensor)):
        split, modality_BT, padding_BT = _split_fixed(
            config,
            input_ids,
            inputs,
            attention_mask,
            mm_token_type_ids,
            past_length,
            cache.get_max_length() if isinstance(past_length, torch.Tensor) else None,  # pyright: ignore[reportOptionalMemberAccess]
        )
    else:
        split, modality_BT, padding_BT = _split_batch(
            config,
            input_ids,  # pyright: ignore[reportCallIssue]
            inputs,
            attention_mask,
            position_ids,
            mm_token_type_ids,
            past_length,
            is_whole_prompt,
        )
    # samples drawn between the steps of a training are no steps; reentrant checkpointing has gradients here
    track = is_training and torch.is_grad_enabled()
    runs_all = is_training or torch.is_grad_enabled() or is_distributed() or is_recorded
    # a row for each pair that there may be costs memory in a backward, and time with kernels that know of no holes
    is_plain = config._experts_implementation == DEFAULT_IMPLEMENTATION and not torch.compiler.is_compiling()
    may_wait = is_on_host(inputs) or torch.is_grad_enabled() or is_distributed() or not is_plain
    is_step = is_plain and not runs_all and _are_few(inputs, split)
    context = RoutingContext(
        routing,
        split,
        track,
        depth_routing,
        modality_BT,
        padding_BT,
        runs_all_groups=runs_all,
        may_wait=may_wait,
        is_step=is_step,
    )
    if config.depth_layers:
        _describe_rows(config, context, attention_mask, position_ids, cache)
    return context


def seen_positions(cache: Cache | None) -> int | torch.Tensor:
    """Positions that came before those of a batch; a tensor from the layers of static caches."""
    # the paged cache of continuous batching counts no tokens
    return cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0


def check_length(
    config: MomaConfig, length: int, past_length: int | torch.Tensor, position_ids: torch.Tensor | None = None
):
    """Refuse positions that an unscaled model has never seen.

    Args:
        config (`MomaConfig`): gives the limit.
        length (`int`): positions `T` of the batch.
        past_length (`int`): positions before them.
        position_ids (`torch.LongTensor`, *optional*): `[B, T]`.

    Raises:
        ValueError: the sequence is too long.
    """
    limit = config.max_position_embeddings
    # scaled rotary embeddings are made to go beyond
    is_long = config.rope_parameters["rope_type"] == "default" and past_length + length > limit
    # a row of many packed requests is longer than any of them
    if is_long and (position_ids is None or position_ids.max() >= limit):
        raise InputError(
            f"The sequence has {past_length + length} positions, but `max_position_embeddings` is {limit}: the "
            "model has never seen later ones. Shorten the input, or set `rope_parameters` to a scaled type."
        )


def check_exportable(config: MomaConfig, routing: str, is_training: bool):
    """Refuse what no program of `torch.export` can hold.

    Args:
        config (`MomaConfig`): the model's.
        routing (`str`): the rule for experts.
        is_training (`bool`): whether the model is in `train()` mode.

    Raises:
        ValueError: there are depth layers, the rule looks at the whole batch, or the model trains.
    """
    if config.depth_layers:
        raise InputError(
            f"`depth_layers` is {list(config.depth_layers)}: a model with depth layers cannot be exported, since the "
            "shapes of what they compute and cache depend on who is chosen."
        )
    if is_training:
        raise InputError("The model is in `train()` mode, and routers would learn: call `model.eval()` before export.")
    if not rule_of(routing).is_causal:
        raise InputError(
            f"`routing` is {routing!r}: how many tokens an expert takes depends on the batch, so it cannot be "
            "exported. Export a causal rule, such as 'threshold'."
        )


def _resolve_rules(
    config: MomaConfig, is_training: bool, routing: str | None, depth_routing: str | None
) -> tuple[str, str]:
    if depth_routing is None:
        depth_routing = routing
    if depth_routing is None:
        depth_routing = config.depth_training_routing if is_training else config.depth_inference_routing
    if routing is None:
        routing = config.training_routing if is_training else config.inference_routing
    if depth_routing is None:
        depth_routing = routing
    rule_of(routing)
    rule_of(depth_routing, "depth_routing")
    if config.depth_layers:
        depth_form_of(depth_routing)
    return routing, depth_routing


def _are_few(inputs: torch.Tensor, split: ModalitySplit | FixedSplit) -> bool:
    """Whether these are positions of a step on a CPU, as few as the host counts by itself, in the model's own type."""
    is_counted = isinstance(split, ModalitySplit) and is_on_host(inputs) and split.group_BT.numel() <= FEW_POSITIONS
    return is_counted and not torch.is_autocast_enabled(inputs.device.type)


def _may_fix_shapes(config: MomaConfig, inputs: torch.Tensor, routing: str, is_training: bool) -> bool:
    """Whether this is a step of one token, whose shapes must not depend on the token if the cache is static."""
    # the caches of depth layers take as many tokens as there are
    return inputs.shape[1] == 1 and not config.depth_layers and rule_of(routing).is_causal and not is_training


def _split_fixed(
    config: MomaConfig,
    input_ids: torch.Tensor | None,
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
    past_length: int | torch.Tensor,
    max_length: int | None,
) -> tuple[FixedSplit, torch.Tensor, torch.Tensor | None]:
    """Every group gets every position: for steps with a static cache of `max_length`, and for programs."""
    length = inputs.shape[1]
    # a cache that ends before the limit needs no wait for the number of its tokens, and a program cannot wait
    if not isinstance(past_length, torch.Tensor):
        check_length(config, length, past_length)
    elif max_length > config.max_position_embeddings and not torch.compiler.is_exporting():  # pyright: ignore[reportOptionalOperand]
        check_length(config, length, past_length)
    modality_BT = _modalities(config, input_ids, inputs, mm_token_type_ids)
    padding_BT = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        if not isinstance(past_length, torch.Tensor):
            _check_mask(attention_mask, inputs.shape[0], past_length + length)
            padding_BT = attention_mask[:, past_length : past_length + length] == 0
        else:
            if length == 1 and attention_mask.shape[1] == 1:
                _check_mask(attention_mask, inputs.shape[0], 2)
            places_T = past_length.view(1)
            if length > 1:
                places_T = places_T + torch.arange(length, device=places_T.device)
            padding_BT = attention_mask.index_select(1, places_T) == 0
    split = FixedSplit(list(config.expert_groups), position_groups(config, modality_BT, padding_BT))
    return split, modality_BT, padding_BT


# its wait for the numbers of tokens would break the graph here and in every function around it
@torch.compiler.disable
def _split_batch(
    config: MomaConfig,
    input_ids: torch.Tensor | None,
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
    past_length: int | torch.Tensor,
    is_whole_prompt: bool,
) -> tuple[ModalitySplit, torch.Tensor, torch.Tensor | None]:
    batch_size, length = inputs.shape[:2]
    if batch_size == 0 or length == 0:
        name = "input_ids" if input_ids is not None else "inputs_embeds"
        raise InputError(f"`{name}` has {batch_size} rows of {length} tokens: the input is empty.")
    check_length(config, length, past_length, position_ids)
    modality_BT = _modalities(config, input_ids, inputs, mm_token_type_ids)
    padding_BT = masked_B = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        _check_mask(attention_mask, batch_size, past_length + length)
        padding_BT = attention_mask[:, past_length : past_length + length] == 0
        masked_B = (attention_mask == 0).all(dim=-1) if is_whole_prompt else None
    return split_modalities(config, modality_BT, padding_BT, input_ids, masked_B), modality_BT, padding_BT


def _modalities(
    config: MomaConfig,
    input_ids: torch.Tensor | None,
    inputs: torch.Tensor,
    mm_token_type_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Modality of each position, `[B, T]`."""
    if input_ids is not None:
        return token_modalities(config, input_ids)
    if mm_token_type_ids is not None:
        return mm_token_type_ids
    return torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)


def _check_mask(attention_mask: torch.Tensor, batch_size: int, num_positions: int | torch.Tensor) -> None:
    if attention_mask.shape[0] == batch_size and attention_mask.shape[1] >= num_positions:
        return
    raise InputError(
        f"`attention_mask` has the shape {tuple(attention_mask.shape)}, but there are {batch_size} rows of "
        f"{num_positions} positions or more: with a cache it has to cover the cached positions, too."
    )


def _describe_rows(
    config: MomaConfig,
    context: RoutingContext,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> None:
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise TypeError(
            f"`attention_mask` is a {type(attention_mask).__name__}: depth layers can pack tensors only, of shape "
            "(batch_size, sequence_length) or (batch_size, 1, query_length, key_length)."
        )
    if attention_mask is not None and attention_mask.ndim == 4:
        context.custom_mask_BHQS = attention_mask
    # where the full layers look for packed documents, too
    if position_ids is not None and attention_mask is None and cache is None and not goes_by_lengths(config):
        context.document_BT = find_packed_sequence_indices(position_ids)


__all__ = ["check_exportable", "check_length", "routing_of_batch", "seen_positions"]
