# SPDX-License-Identifier: Apache-2.0
"""Documents of packed rows for flash attention, whose mask says nothing of them: it goes by their lengths.

Shape suffixes:
    B rows, T positions, E documents of the batch and one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import PreTrainedModel

from .configuration_moma import MomaConfig
from .errors_moma import InputError


# `FlashAttentionKwargs` of Transformers
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# what Transformers gives masks of pairs, which tell documents apart by `position_ids`
_BY_MASK = ("sdpa", "eager", "flex_attention")


def goes_by_lengths(config: MomaConfig) -> bool:
    """Whether no mask can tell attention of documents, as with flash attention of any version and kernel."""
    name = config._attn_implementation
    if name in _BY_MASK:
        return False
    return name in ALL_MASK_ATTENTION_FUNCTIONS and ALL_MASK_ATTENTION_FUNCTIONS[name] is flash_attention_mask


def packed_lengths(position_ids: torch.Tensor) -> dict[str, Any]:
    """Where the documents of packed rows lie in the flattened batch, with one wait on the device.

    A document begins with each row, and where a position does not follow the one before it, which is Transformers'
    rule for masks.

    Args:
        position_ids (`torch.LongTensor`): `[B, T]`.

    Returns:
        `dict`: what Transformers calls `FlashAttentionKwargs`. `cu_seq_lens_q` and `cu_seq_lens_k` are one
        `torch.IntTensor` `[E]` of the documents' first tokens and the end of the batch; `max_length_q` and
        `max_length_k` are the tokens of the longest document, an `int`.
    """
    return _lengths_between(position_ids.diff() != 1)


def document_lengths(
    model: PreTrainedModel,
    given: Mapping[str, Any],
    inputs_BTD: torch.Tensor,
    attention_mask: Any,
    causal_mask: Any,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> dict[str, Any]:
    """The lengths by which flash attention tells the documents of this forward apart.

    They are the caller's, or else those of `position_ids` that begin again within a row: Transformers looks for these
    in batches of one row alone.

    Args:
        model (`PreTrainedModel`): whose config gives the attention implementation.
        given (`Mapping`): the caller's further arguments, with lengths or without.
        inputs_BTD (`torch.Tensor`): the embedded tokens, `[B, T, D]`.
        attention_mask (`torch.Tensor`, *optional*): the caller's.
        causal_mask (`torch.Tensor`, *optional*): what attention gets in its place.
        position_ids (`torch.LongTensor`, *optional*): the caller's, `[B, T]` or `[1, T]`.
        cache (`Cache`, *optional*): of this forward.

    Returns:
        `dict`: see [`packed_lengths`]; empty where there is nothing to tell apart, or attention goes by a mask.

    Raises:
        ValueError: documents would see one another, or rows would be lost.
    """
    config: MomaConfig = model.config  # pyright: ignore[reportAssignmentType]
    # set by torch
    if getattr(model, "_is_replica", False) and LENGTHS[0] in given:
        raise InputError(
            f"`{LENGTHS[0]}` counts through all rows, but `DataParallel` has cut it, and may have dropped rows: start "
            "one process for each device with torchrun, or show this one a single device."
        )
    # continuous batching gives a paged cache, and lengths that belong to it
    if cache is not None and not hasattr(cache, "get_seq_length"):
        return {}
    num_rows, length = inputs_BTD.shape[:2]
    if not goes_by_lengths(config):
        if position_ids is None and attention_mask is None and cache is None:
            _check_has_positions(config, given.get(LENGTHS[0]), num_rows)
        return {}
    # keys of a cache that holds something, or has room for it, are not those of the batch
    is_fresh = cache is None or cache.get_mask_sizes(length, 0)[0] == length
    lengths = {name: given[name] for name in LENGTHS if given.get(name) is not None}
    sign = f"`{LENGTHS[0]}` is given"
    if lengths:
        _check_lengths(lengths, num_rows)
    elif position_ids is not None and length > 1 and is_fresh:
        sign = "`position_ids` begin again within a row"
        position_BT = position_ids.expand(num_rows, -1)
        lengths = _find_lengths(position_BT, attention_mask, cache)  # pyright: ignore[reportCallIssue]
    if lengths and cache is not None and (config.depth_layers or not is_fresh):
        raise InputError(f"{sign}, but to a cache each row is one document: pass `use_cache=False`.")
    if lengths and causal_mask is not None:
        raise InputError(
            f"{sign}, and `attention_mask` hides positions: {config._attn_implementation!r} goes by the mask alone, "
            "and documents would see one another. Leave `attention_mask` out: padding behind a row's documents is a "
            "document of its own, whose positions begin again and whose labels are -100."
        )
    return lengths


def _check_has_positions(config: MomaConfig, starts_E: torch.Tensor | None, num_rows: int) -> None:
    """Refuse documents that only their lengths tell apart, where attention goes by a mask."""
    # whoever registers another attention knows what it goes by
    if starts_E is not None and starts_E.shape[0] > num_rows + 1 and config._attn_implementation in _BY_MASK:
        raise InputError(
            f"`{LENGTHS[0]}` has {starts_E.shape[0] - 1} documents in {num_rows} rows, but "
            f"{config._attn_implementation!r} goes by `position_ids`, and there are none: pass those that begin again "
            "with every document."
        )


def _check_lengths(lengths: dict[str, Any], num_rows: int) -> None:
    missing = [name for name in LENGTHS if name not in lengths]
    if missing:
        raise InputError(f"`{missing[0]}` is missing beside {list(lengths)}: flash attention takes all four or none.")
    num_entries = lengths[LENGTHS[0]].shape[0]
    if num_entries < num_rows + 1:
        raise InputError(
            f"`{LENGTHS[0]}` has {num_entries} entries for {num_rows} rows: it begins with 0 and ends with the number "
            "of tokens in all rows, each of which begins a document. Was it cut with the batch, as `dispatch_batches` "
            "does? Without the four lengths the model finds documents by `position_ids`."
        )


# its wait for the number of documents would break the graph here and in every function around it
@torch.compiler.disable
def _find_lengths(position_BT: torch.Tensor, attention_mask: Any, cache: Cache | None) -> dict[str, Any]:
    """Lengths by positions, empty where each row is one document."""
    # a row of a cache may have gaps
    is_start_BT = position_BT.diff() < 1 if cache is not None else position_BT.diff() != 1
    if attention_mask is not None:
        if attention_mask.ndim != 2:
            return {}
        # positions of padding mean nothing
        is_token_BT = attention_mask[:, : position_BT.shape[1]] != 0
        is_start_BT = is_start_BT & is_token_BT[:, 1:] & is_token_BT[:, :-1]
    lengths = _lengths_between(is_start_BT)
    return lengths if lengths["cu_seq_lens_q"].shape[0] > position_BT.shape[0] + 1 else {}


def _lengths_between(is_start_BT: torch.Tensor) -> dict[str, Any]:
    """Lengths of documents, which begin where it is said of all positions but a row's first."""
    is_start_BT = torch.nn.functional.pad(is_start_BT, (1, 0), value=True)
    place_T = torch.arange(is_start_BT.shape[1], device=is_start_BT.device)
    start_BT = torch.where(is_start_BT, place_T, 0).cummax(dim=1).values
    num_documents, longest = torch.stack([is_start_BT.sum(), (place_T - start_BT).max() + 1]).tolist()
    # their number is known, so that nothing waits for it
    first_E = is_start_BT.flatten().byte().argsort(descending=True, stable=True)[:num_documents]
    cumulative_E = torch.nn.functional.pad(first_E, (0, 1), value=is_start_BT.numel()).int()
    return dict(zip(LENGTHS, (cumulative_E, cumulative_E, longest, longest)))


__all__ = ["LENGTHS", "document_lengths", "goes_by_lengths", "packed_lengths"]
