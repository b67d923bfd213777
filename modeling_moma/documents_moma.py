# SPDX-License-Identifier: Apache-2.0
"""The documents of packed rows: where they begin, and the lengths or mask by which attention keeps them apart.

Shape suffixes:
    B rows of the batch, T positions of a row, N = B * T positions, S = T - 1 steps between positions, E documents of
    the batch and one, H heads, Q queries, S keys of a mask, D hidden size.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, StaticCache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    create_causal_mask,
    flash_attention_mask,
    packed_sequence_mask_function,
)
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_utils import PreTrainedModel

from .configuration_moma import MomaConfig
from .errors_moma import EACH_DEVICE, InputError


# names of flash attention's arguments: lengths of queries first, then of keys, then the two longest
FLASH_LENGTHS = tuple(FlashAttentionKwargs.__annotations__)


class Batch(NamedTuple):
    """What the model was called with: ids or embeddings, and what tells of their positions."""

    input_ids: torch.Tensor | None
    inputs_embeds: torch.Tensor | None
    attention_mask: Any
    position_ids: torch.Tensor | None
    mm_token_type_ids: torch.Tensor | None
    # any cache of Transformers
    cache: Any
    # as collators give them: where documents begin in all rows, and the end; the number of each position's document
    starts_E: torch.Tensor | None
    seq_idx: torch.Tensor | None

    @property
    def inputs(self) -> Any:
        """Ids or embeddings."""
        return self.inputs_embeds if self.input_ids is None else self.input_ids

    @property
    def padding_mask_BS(self) -> torch.Tensor | None:
        """0 at padding, for the positions of the cache and of the batch."""
        is_ours = isinstance(self.attention_mask, torch.Tensor) and self.attention_mask.ndim == 2
        return self.attention_mask if is_ours else None

    @property
    def own_mask_BHQS(self) -> torch.Tensor | None:
        """A mask that the caller has made, to be added to the scores."""
        is_own = isinstance(self.attention_mask, torch.Tensor) and self.attention_mask.ndim != 2
        return self.attention_mask if is_own else None


class Rows(NamedTuple):
    """What attention knows of a batch's rows.

    Attributes:
        padding_BT (`torch.BoolTensor`, *optional*):
            True at padding, where there is any.
        document_BT (`torch.LongTensor`, *optional*):
            number of each position's document, where rows hold several.
        lengths (`FlashAttentionKwargs`, *optional*):
            in its place for flash attention.
        own_mask_BHQS (`torch.Tensor`, *optional*):
            the caller's mask, for depth layers.
        hidden (`tuple`, *optional*):
            a mask of padding, and how many of the cached positions it hides, without and with those of the batch.
    """

    padding_BT: torch.Tensor | None = None
    document_BT: torch.Tensor | None = None
    lengths: FlashAttentionKwargs | None = None
    own_mask_BHQS: torch.Tensor | None = None
    hidden: tuple[torch.Tensor, int, int] | None = None

    @property
    def are_packed(self) -> bool:
        """Whether rows hold several documents, which do not see one another."""
        return self.document_BT is not None or self.lengths is not None


def uses_flash_attention_mask(config: MomaConfig) -> bool:
    """Return whether no mask can tell attention of documents, as with flash attention of any version and kernel."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation) is flash_attention_mask


def check_replica(model: PreTrainedModel) -> None:
    """Raise where a copy that `DataParallel` has made is trained."""
    # DataParallel's copies are known by having no parameters; compiled forwards are no copies
    if model.training and not torch.compiler.is_compiling() and next(model.parameters(), None) is None:
        raise InputError(f"`DataParallel` trains copies of routers, which lose what they learn: {EACH_DEVICE}")


def document_questions(
    config: MomaConfig, batch: Batch, padding_BT: torch.Tensor | None, past_length: int | torch.Tensor
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Return where documents may begin, `[B, T]`, and the numbers that [`documents_of`] needs of that.

    A document begins where a position does not follow the one before it, or where the caller's lengths of flash
    attention say so. To a cache each row is one document.
    """
    num_rows, length = batch.inputs.shape[:2]
    cache, position_ids = batch.cache, batch.position_ids
    # nothing to do for a caller's own mask, for continuous batching, whose paged cache comes with its lengths, and for
    # attention registered elsewhere, which tells documents apart in its own way
    is_paged = cache is not None and not hasattr(cache, "get_seq_length")
    has_own = batch.attention_mask is not None and padding_BT is None
    if has_own or is_paged or config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None, {}
    questions: dict[str, torch.Tensor] = {}
    positions = [] if position_ids is None else [position_ids.expand(num_rows, -1)]
    starts_E = batch.starts_E
    if starts_E is not None:
        is_start_N = torch.zeros(num_rows * length + 1, dtype=torch.bool, device=starts_E.device)
        is_start_N.index_fill_(0, starts_E.clamp(0, is_start_N.shape[0] - 1).long(), True)
        is_start_BT = is_start_N[:-1].view(num_rows, length)
        questions["fits"] = (starts_E[-1] == is_start_BT.numel()) & is_start_BT[:, 0].all()
        positions.append(_places(is_start_BT))
    elif position_ids is None and batch.seq_idx is not None:
        positions.append(_places(_with_rows(batch.seq_idx.diff() != 0)).expand(num_rows, -1))
    # a static cache gives its length as a tensor, which may be 0 after `reset()`; reading it would be a device sync
    may_be_later = batch.attention_mask is None and (isinstance(past_length, torch.Tensor) or past_length > 0)
    if not positions or (length == 1 and not may_be_later):
        return None, questions
    begins_BT = document_begins(positions[0], padding_BT, may_jump=cache is not None)
    if len(positions) > 1:
        begins_BT |= document_begins(positions[1], padding_BT, may_jump=cache is not None)
    if may_be_later and position_ids is not None:
        begins_BT[:, 0] |= (position_ids[:, 0] == 0) & (past_length > 0)
    questions["begins"] = begins_BT.sum()
    if uses_flash_attention_mask(config) and cache is None:
        if padding_BT is not None:
            # each run of padding is a document of its own
            begins_BT = begins_BT | torch.nn.functional.pad(padding_BT.diff(), (1, 0))
        begins_BT = _with_rows(begins_BT[:, 1:])
        questions |= {"number": begins_BT.sum(), "longest": _places(begins_BT).max() + 1}
    return begins_BT, questions


def documents_of(begins_BT: torch.Tensor | None, answers: Mapping[str, int], has_cache: bool) -> Rows:
    """Return the documents by the answers to [`document_questions`]."""
    if not answers.get("fits", True):
        raise InputError(
            f"`{FLASH_LENGTHS[0]}` has to begin a document with each row, and to end with the number of positions in "
            "all rows. Was it cut with the batch, as `DataParallel` and `dispatch_batches` do? Without the four "
            "lengths the model finds documents by `position_ids`."
        )
    if begins_BT is None or not answers["begins"]:
        return Rows()
    if has_cache:
        raise InputError(
            "`position_ids` begin again, within a row or behind what the cache holds, but to a cache each row is one "
            "document: pass `use_cache=False`, and no cache."
        )
    if "number" not in answers:
        return Rows(document_BT=begins_BT.cumsum(1))
    # sorted rather than `nonzero`, which would need a device sync for a number that is known
    first_E = begins_BT.flatten().byte().argsort(descending=True, stable=True)[: answers["number"]]
    starts_E = torch.nn.functional.pad(first_E, (0, 1), value=begins_BT.numel()).int()
    lengths: Any = dict(zip(FLASH_LENGTHS, (starts_E, starts_E, answers["longest"], answers["longest"])))
    return Rows(lengths=lengths)


def check_own_mask(config: MomaConfig, mask: torch.Tensor, num_rows: int, length: int) -> None:
    """Raise at a mask that is neither one of padding nor what the layers could add to their scores."""
    attention, shape = config._attn_implementation, tuple(mask.shape)
    fits = len(shape) == 4 and shape[0] in (1, num_rows) and shape[2] == length
    # a boolean mask is wrong for eager attention, which adds it to the scores
    if not fits or uses_flash_attention_mask(config) or (attention == "eager" and not mask.is_floating_point()):
        raise InputError(
            f"`attention_mask` has the shape {shape} and the dtype {mask.dtype} for {num_rows} rows of {length} "
            f"positions under {attention!r}: give 0 and 1 for each position, (batch_size, sequence_length). A mask of "
            "your own, (batch_size, 1, query_length, key_length), is added to the scores by 'sdpa' and 'eager': 0 "
            "where a key is seen, the least number of the model's dtype elsewhere. 'sdpa' takes Booleans, too."
        )


def document_begins(
    position_BT: torch.Tensor, padding_BT: torch.Tensor | None = None, may_jump: bool = False
) -> torch.Tensor:
    """Return which tokens begin a document within their row, by their positions, `[B, T]`."""
    if padding_BT is None:
        step_BS = position_BT.diff()
        return torch.nn.functional.pad(step_BS < 1 if may_jump else step_BS != 1, (1, 0))
    place_T = torch.arange(position_BT.shape[1], device=position_BT.device)
    last_BT = torch.where(padding_BT, -1, place_T).cummax(dim=1).values
    before_BT = torch.nn.functional.pad(last_BT[:, :-1], (1, 0), value=-1)
    step_BT = position_BT - position_BT.gather(1, before_BT.clamp(min=0))
    begins_BT = step_BT < 1
    if not may_jump:
        begins_BT = begins_BT | (step_BT > 1) & (before_BT == place_T - 1)
    return begins_BT & ~padding_BT & (before_BT >= 0)


def _with_rows(begins_BS: torch.Tensor) -> torch.Tensor:
    """Return where documents begin, with the first of each row, `[B, T]`."""
    return torch.nn.functional.pad(begins_BS, (1, 0), value=True)


def _places(is_start_BT: torch.Tensor) -> torch.Tensor:
    """Return the place of each position in its document, `[B, T]`."""
    place_T = torch.arange(is_start_BT.shape[1], device=is_start_BT.device)
    return place_T - torch.where(is_start_BT, place_T, 0).cummax(dim=1).values


def attention_inputs(
    config: MomaConfig,
    inputs_BTD: torch.Tensor,
    attention_mask: Any,
    cache: Cache | None,
    position_ids: torch.Tensor,
    rows: Rows,
) -> dict[str, Any]:
    """Return what attention of all full layers is called with, found once: a mask, or lengths, of rows."""
    return {
        "attention_mask": _causal_mask(config, inputs_BTD, attention_mask, cache, rows),
        # flash attention would look in every layer, with a device sync, for what has been found
        "position_ids": None if uses_flash_attention_mask(config) else position_ids,
        **(rows.lengths or {}),
    }


def _causal_mask(
    config: MomaConfig, inputs_BTD: torch.Tensor, attention_mask: Any, cache: Cache | None, rows: Rows
) -> Any:
    if rows.lengths is not None:
        return None
    num_rows, length = inputs_BTD.shape[:2]
    is_static = isinstance(cache, StaticCache)
    if rows.padding_BT is None and not is_static and getattr(attention_mask, "shape", None) == (num_rows, length):
        # the mask hides no token, as was counted
        attention_mask = None
    if rows.document_BT is None:
        mask = create_causal_mask(
            config=config,
            inputs_embeds=inputs_BTD,
            attention_mask=attention_mask,
            cache=cache,
            # columns of a static cache that no token has filled have to be hidden, even in steps of one token
            allow_is_causal_skip=not is_static or length > 1,
        )
    else:
        mask = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=num_rows,
            q_length=length,
            kv_length=length,
            mask_function=and_masks(causal_mask_function, packed_sequence_mask_function(rows.document_BT)),
            attention_mask=None if attention_mask is None else attention_mask.to(inputs_BTD.device, torch.bool),
            allow_is_causal_skip=False,
            dtype=inputs_BTD.dtype,
            config=config,
            device=inputs_BTD.device,
        )
    if config._attn_implementation == "sdpa" and mask is not None and mask.dtype == torch.bool:
        # made once here, as every layer would otherwise convert the boolean mask and keep its copy for the backward
        device, dtype = mask.device, inputs_BTD.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        mask = torch.where(mask, torch.zeros((), dtype=dtype, device=device), -torch.inf)
    return mask
