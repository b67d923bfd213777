# SPDX-License-Identifier: Apache-2.0
"""The documents of packed rows: where they begin, and the lengths or mask by which attention keeps them apart.

Shape suffixes:
    B rows of the batch, T positions of a row, N = B * T positions, S = T - 1 steps between positions, E documents of
    the batch and one, H heads, Q queries, S keys of a mask, D hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

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


# names of the lengths, those of queries' first
FLASH_LENGTHS = tuple(FlashAttentionKwargs.__annotations__)


class Documents(NamedTuple):
    """What keeps the documents of packed rows apart, in the form that attention takes; nothing in other rows."""

    document_BT: torch.Tensor | None = None
    lengths: FlashAttentionKwargs | None = None

    @property
    def are_packed(self) -> bool:
        """Whether rows hold several documents, which do not see one another."""
        return self.document_BT is not None or self.lengths is not None


def uses_flash_attention_mask(config: MomaConfig) -> bool:
    """Return whether no mask can tell attention of documents, as with flash attention of any version and kernel."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation) is flash_attention_mask


def packed_lengths(position_ids: torch.Tensor) -> FlashAttentionKwargs:
    """Return where the documents of packed rows lie in the flattened batch, with one device sync.

    A document begins with each row, and where a position does not follow the one before it, which is Transformers'
    rule for masks.
    """
    is_start_BT = _with_rows(document_begins(position_ids))
    return _lengths_of(is_start_BT, *torch.stack(_number_and_longest(is_start_BT)).tolist())


def check_replica(model: PreTrainedModel, given: Mapping[str, Any]) -> None:
    """Raise where a copy that `DataParallel` has made is trained, or gets lengths of documents that it has cut."""
    # compiled forwards are no copies, and torch leaves copies without parameters
    if torch.compiler.is_compiling() or next(model.parameters(), None) is not None:
        return
    if model.training:
        raise InputError(f"`DataParallel` trains copies of routers, which lose what they learn: {EACH_DEVICE}")
    if FLASH_LENGTHS[0] in given:
        raise InputError(
            f"`{FLASH_LENGTHS[0]}` counts through all rows, but `DataParallel` has cut it, and may have dropped rows: "
            f"{EACH_DEVICE}"
        )


class DocumentSearch:
    """Finds the documents of packed rows; how many there are is read together with the numbers of the split.

    Flash attention goes by the caller's lengths. Where there are none, and under other attentions, a document begins
    where a position does not follow the one before it. To a cache each row is one document.
    """

    def __init__(
        self,
        config: MomaConfig,
        given: Mapping[str, Any],
        inputs: torch.Tensor,
        attention_mask: Any,
        padding_BT: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        past_length: int | torch.Tensor,
    ):
        self.attention, self.by_lengths = config._attn_implementation, uses_flash_attention_mask(config)
        self.has_cache, self.padding_BT = cache is not None, padding_BT
        self.num_rows, self.length = inputs.shape[:2]
        self.questions: dict[str, torch.Tensor] = {}
        self.begins_BT: torch.Tensor | None = None
        self.is_start_BT: torch.Tensor | None = None
        self.lengths: Any = {name: given[name] for name in FLASH_LENGTHS if given.get(name) is not None}
        custom_mask = attention_mask if padding_BT is None else None
        _check_own_mask(custom_mask, self.num_rows, self.length, self.attention)
        if custom_mask is not None and self.by_lengths:
            raise InputError(
                f"`attention_mask` has the shape {tuple(custom_mask.shape)}: {self.attention!r} takes 0 and 1 for "
                "each position, (batch_size, sequence_length). For other masks choose 'sdpa' or 'eager'."
            )
        # continuous batching gives a paged cache, and lengths that belong to it; an attention registered elsewhere
        # tells documents apart in a way of its own, and the caller's own mask does
        is_paged = cache is not None and not hasattr(cache, "get_seq_length")
        if custom_mask is not None or is_paged or self.attention not in ALL_MASK_ATTENTION_FUNCTIONS:
            self.lengths = {}
        elif self.by_lengths and self.lengths:
            _check_lengths(self.lengths, self.num_rows)
            self._ask_of_lengths(self.lengths[FLASH_LENGTHS[0]])
        elif position_ids is not None:
            # a tensor, which comes from a static cache and may be 0 after `reset()`, is not read here
            may_be_later = isinstance(past_length, torch.Tensor) or past_length > 0
            if may_be_later and attention_mask is None:
                self.questions["restarts"] = ((position_ids[:, 0] == 0) & (past_length > 0)).sum()
            if self.length > 1:
                self._ask_of_positions(position_ids.expand(self.num_rows, -1))
        else:
            self._check_positions("there are none")
            if given.get("seq_idx") is not None and not self.has_cache:
                raise InputError(
                    "`seq_idx` came without `position_ids`, by which documents of packed rows are told apart: pass "
                    "those that begin again with every document."
                )

    def _ask_of_lengths(self, starts_E: torch.Tensor) -> None:
        row_B = torch.arange(self.num_rows, device=starts_E.device, dtype=starts_E.dtype) * self.length
        place_B = torch.searchsorted(starts_E, row_B).clamp(max=starts_E.shape[0] - 1)
        self.questions["end"], self.questions["rows"] = starts_E[-1], (starts_E[place_B] == row_B).sum()
        if self.padding_BT is not None:
            self._ask_of_starts(self._starts(starts_E))

    def _ask_of_positions(self, position_BT: torch.Tensor) -> None:
        self.begins_BT = document_begins(position_BT, self.padding_BT, may_jump=self.has_cache)
        self.questions["begins"] = self.begins_BT.sum()
        if self.by_lengths and not self.has_cache:
            self._ask_of_starts(self.begins_BT)
        if self.lengths:
            # documents of the lengths that are not all padding
            place_BT = _places(self._starts(self.lengths[FLASH_LENGTHS[0]]))
            self.questions["given"] = document_begins(place_BT, self.padding_BT).sum()

    def _ask_of_starts(self, begins_BT: torch.Tensor) -> None:
        # each run of padding is a document of its own
        if self.padding_BT is not None:
            begins_BT = begins_BT | torch.nn.functional.pad(self.padding_BT.diff(), (1, 0))
        self.is_start_BT = _with_rows(begins_BT)
        self.questions["number"], self.questions["longest"] = _number_and_longest(self.is_start_BT)

    def _starts(self, starts_E: torch.Tensor) -> torch.Tensor:
        """Return where documents begin by their lengths, `[B, T]`."""
        num_positions = self.num_rows * self.length
        is_start_N = torch.zeros(num_positions + 1, dtype=torch.bool, device=starts_E.device)
        is_start_N = is_start_N.index_fill(0, starts_E.clamp(0, num_positions).long(), True)
        return is_start_N[:-1].view(self.num_rows, self.length)

    def documents(self, answers: Mapping[str, int], has_padding: bool) -> Documents:
        """Return what was found."""
        if self.by_lengths and self.lengths:
            num_positions = self.num_rows * self.length
            if answers["end"] != num_positions or answers["rows"] != self.num_rows:
                raise InputError(
                    f"`{FLASH_LENGTHS[0]}` ends with {answers['end']}, and {answers['rows']} of {self.num_rows} rows "
                    f"begin a document by it; the batch has {num_positions} positions. {_CUT_LENGTHS}"
                )
            if self.has_cache:
                self._refuse(f"`{FLASH_LENGTHS[0]}` is given")
            return Documents(lengths=self._found_lengths(answers) if has_padding else self.lengths)
        if answers.get("restarts"):
            self._refuse("`position_ids` begin again at 0 behind what the cache holds")
        if not answers.get("begins"):
            if answers.get("given"):
                self._check_positions("they never begin again")
            return Documents()
        if self.has_cache:
            self._refuse("`position_ids` begin again within a row")
        if self.by_lengths:
            return Documents(lengths=self._found_lengths(answers))
        return Documents(self.begins_BT.cumsum(1))  # pyright: ignore[reportOptionalMemberAccess]

    def _found_lengths(self, answers: Mapping[str, int]) -> FlashAttentionKwargs:
        return _lengths_of(self.is_start_BT, answers["number"], answers["longest"])  # pyright: ignore[reportArgumentType]

    def _check_positions(self, reason: str) -> None:
        """Raise at documents that only their lengths tell apart, where attention goes by positions."""
        starts_E = self.lengths.get(FLASH_LENGTHS[0])
        if starts_E is not None and starts_E.shape[0] > self.num_rows + 1:
            raise InputError(
                f"`{FLASH_LENGTHS[0]}` has {starts_E.shape[0] - 1} documents in {self.num_rows} rows, but "
                f"{self.attention!r} goes by `position_ids`, and {reason}: pass those that begin again with every "
                "document."
            )

    def _refuse(self, sign: str) -> NoReturn:
        raise InputError(f"{sign}, but to a cache each row is one document: pass `use_cache=False`, and no cache.")


_CUT_LENGTHS = (
    "It begins with 0 and ends with the number of positions in all rows, each of which begins a document. Was it cut "
    "with the batch, as `dispatch_batches` does? Without the four lengths the model finds documents by `position_ids`."
)


def _check_own_mask(mask: Any, num_rows: int, length: int, attention: str | None) -> None:
    """Raise at a mask that is neither one of padding nor what the layers could add to their scores."""
    # flex attention has masks of its own type
    if not isinstance(mask, torch.Tensor | Sequence):
        return
    shape = tuple(getattr(mask, "shape", ()))
    if len(shape) != 4 or shape[0] not in (1, num_rows) or shape[2] != length:
        raise InputError(
            f"`attention_mask` is a {type(mask).__name__} of the shape {shape}, but there are {num_rows} rows of "
            f"{length} positions: give 0 and 1 for each position, (batch_size, sequence_length), or a mask of your "
            "own, (batch_size, 1, query_length, key_length)."
        )
    dtype, takes_bools = getattr(mask, "dtype", None), attention == "sdpa"
    fits = getattr(dtype, "is_floating_point", False) or (takes_bools and dtype == torch.bool)
    if attention in ("eager", "sdpa") and not fits:
        raise InputError(
            f"`attention_mask` has four dimensions and the dtype {dtype}, which {attention!r} would add to the "
            "scores as numbers: give 0 where a key is seen and the least number of the model's dtype elsewhere"
            f"{', or Booleans' if takes_bools else ''}."
        )


def _check_lengths(lengths: Mapping[str, Any], num_rows: int) -> None:
    missing = [name for name in FLASH_LENGTHS if name not in lengths]
    if missing:
        raise InputError(f"`{missing[0]}` is missing beside {list(lengths)}: flash attention takes all four or none.")
    num_entries = lengths[FLASH_LENGTHS[0]].shape[0]
    if num_entries < num_rows + 1:
        raise InputError(f"`{FLASH_LENGTHS[0]}` has {num_entries} entries for {num_rows} rows. {_CUT_LENGTHS}")


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


def _with_rows(begins_BT: torch.Tensor) -> torch.Tensor:
    """Return where documents begin, with the first of each row, `[B, T]`."""
    return torch.nn.functional.pad(begins_BT[:, 1:], (1, 0), value=True)


def _number_and_longest(is_start_BT: torch.Tensor) -> list[torch.Tensor]:
    return [is_start_BT.sum(), _places(is_start_BT).max() + 1]


def _places(is_start_BT: torch.Tensor) -> torch.Tensor:
    """Return the place of each position in its document, `[B, T]`."""
    place_T = torch.arange(is_start_BT.shape[1], device=is_start_BT.device)
    return place_T - torch.where(is_start_BT, place_T, 0).cummax(dim=1).values


def _lengths_of(is_start_BT: torch.Tensor, number: int, longest: int) -> FlashAttentionKwargs:
    """Return the lengths of documents that begin at some positions, so many of them."""
    # the number of documents is known, so no device sync is needed
    first_E = is_start_BT.flatten().byte().argsort(descending=True, stable=True)[:number]
    cumulative_E = torch.nn.functional.pad(first_E, (0, 1), value=is_start_BT.numel()).int()
    lengths: Any = dict(zip(FLASH_LENGTHS, (cumulative_E, cumulative_E, longest, longest)))
    return lengths


def causal_mask_of(
    config: MomaConfig,
    inputs_BTD: torch.Tensor,
    attention_mask: Any,
    cache: Cache | None,
    documents: Documents,
    has_padding: bool,
) -> Any:
    """Return the attention mask that all full layers of a forward share, in the form that attention takes."""
    if documents.lengths is not None:
        return None
    num_rows, length = inputs_BTD.shape[:2]
    is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    num_keys = length if cache is None or not is_padding_mask else cache.get_mask_sizes(length, 0)[0]
    if is_padding_mask and not has_padding and attention_mask.shape[1] == num_keys == length:
        # what it hides has been counted: nothing
        attention_mask = None
    if documents.document_BT is None:
        mask = create_causal_mask(
            config=config,
            inputs_embeds=inputs_BTD,
            attention_mask=attention_mask,
            cache=cache,
            # the columns of a static cache that no token fills yet have to be hidden, in steps of one token too
            allow_is_causal_skip=not isinstance(cache, StaticCache) or length > 1,
        )
    else:
        mask = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=num_rows,
            q_length=length,
            kv_length=length,
            mask_function=and_masks(causal_mask_function, packed_sequence_mask_function(documents.document_BT)),
            attention_mask=None if attention_mask is None else attention_mask.to(inputs_BTD.device, torch.bool),
            allow_is_causal_skip=False,
            dtype=inputs_BTD.dtype,
            config=config,
            device=inputs_BTD.device,
        )
    if config._attn_implementation == "sdpa" and mask is not None and mask.dtype == torch.bool:
        mask = _additive(mask, inputs_BTD)
    return mask


def _additive(mask_BHQS: torch.Tensor, inputs_BTD: torch.Tensor) -> torch.Tensor:
    """Return what is added to the scores, in their type: every layer makes and keeps that of a mask of Booleans."""
    device, dtype = mask_BHQS.device, inputs_BTD.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return torch.where(mask_BHQS, torch.zeros((), dtype=dtype, device=device), -torch.inf)
