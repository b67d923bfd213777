# SPDX-License-Identifier: Apache-2.0
"""From what the model was called with to the groups of tokens that experts see, found once per forward.

Which positions belong to which modality and go to which expert group, and what else one forward tells all its layers;
with the checks of a batch.

Shape suffixes:
    B rows, T positions, D hidden size, N tokens of one group in the batch, H heads, Q queries, S positions that the
    cache has seen and those of the batch, C thresholds of a router (one for each expert, or for each pool of a depth
    router), M modalities.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers.cache_utils import Cache, StaticCache
from transformers.utils import logging

from .configuration_moma import RULES, MomaConfig, rule_of
from .devices_moma import moved
from .documents_moma import (
    Batch,
    Rows,
    check_own_mask,
    document_begins,
    document_questions,
    documents_of,
    uses_flash_attention_mask,
)
from .errors_moma import InputError


logger = logging.get_logger(__name__)


@dataclass
class ModalitySplit:
    """Which positions of a batch go to which expert group, computed once per forward and shared by all layers.

    Attributes:
        counts (`dict[str, int]`):
            tokens of each group.
        order (`torch.LongTensor`, *optional*):
            flat positions `[B * T]`, group by group, padding last. `None` when all positions belong to one group.
        inverse (`torch.LongTensor`, *optional*):
            the place of each position in `order`.
        group_BT (`torch.LongTensor`):
            index of each position's group, the number of groups at padding, `[B, T]`.
        used_groups (`list[str]`):
            groups that have tokens.
    """

    counts: dict[str, int]
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    group_BT: torch.Tensor

    def __post_init__(self):
        # computed once: all layers ask for it
        self.used_groups = [name for name, count in self.counts.items() if count]

    @property
    def is_whole(self) -> bool:
        """Whether all positions belong to one group."""
        return self.order is None

    @classmethod
    def from_groups(cls, group_BT: torch.Tensor, counts: dict[str, int]) -> "ModalitySplit":
        """Lay out positions whose numbers in each group are known, without a device sync."""
        group_flat = group_BT.flatten()
        if group_flat.shape[0] in counts.values():
            return cls(counts, None, None, group_BT)
        order = torch.argsort(group_flat, stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        return cls(counts, order, inverse, group_BT)

    def to(self, device: torch.device, non_blocking: bool = False) -> "ModalitySplit":
        """Return the same split on another device."""
        tensors = (moved(each, device, non_blocking) for each in (self.order, self.inverse, self.group_BT))
        return ModalitySplit(self.counts, *tensors)

    def split(self, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gather `[B, T, D]` into the groups' tokens, `[N, D]` each."""
        flat = hidden_BTD.flatten(0, 1)
        if self.order is None:
            return {name: flat if count else flat[:0] for name, count in self.counts.items()}
        num_tokens = sum(self.counts.values())
        # index_select, whose backward is much cheaper than that of indexing on CPU
        groups = flat.index_select(0, self.order[:num_tokens]).split(list(self.counts.values()))
        return dict(zip(self.counts, groups))

    def merge(self, groups: dict[str, torch.Tensor], like_BTD: torch.Tensor) -> torch.Tensor:
        """Put the groups' outputs `[N, ...]` back in place, `[B, T, ...]`; padding gets zeros.

        Groups without a token may be missing.
        """
        parts = [groups[name] for name in self.counts if name in groups]
        if self.order is None or self.inverse is None:
            # matmuls without rows, for the gradients of their weights
            rows = parts[0] if len(parts) == 1 else torch.cat(parts)
            return rows.unflatten(0, like_BTD.shape[:2])
        num_padding = self.order.shape[0] - sum(self.counts.values())
        if num_padding:
            parts.append(parts[0].new_zeros(num_padding, *parts[0].shape[1:]))
        return torch.cat(parts).index_select(0, self.inverse).unflatten(0, like_BTD.shape[:2])


@dataclass
class FixedSplit:
    """A split whose shapes do not depend on the tokens: every group gets every position, and gives up the others'.

    For steps of one token, where a device sync for the numbers would cost more than the surplus work, and where
    `torch.compile` needs every step to look alike; and for programs of `torch.export`, which hold for any tokens.

    Attributes:
        groups (`list[str]`):
            names of the groups.
        group_BT (`torch.LongTensor`):
            index of each position's group, the number of groups at padding, `[B, T]`.
    """

    groups: list[str]
    group_BT: torch.Tensor

    def __post_init__(self):
        # computed once: all layers ask for these masks
        self._is_member_N = [self.group_BT.flatten() == index for index in range(len(self.groups))]
        # without a device sync it is unknown which groups have tokens
        self.used_groups = self.groups

    @property
    def is_whole(self) -> bool:
        """Whether all positions surely belong to one group: padding may make it False."""
        return False

    def to(self, device: torch.device, non_blocking: bool = False) -> "FixedSplit":
        """Return the same split on another device."""
        return FixedSplit(self.groups, self.group_BT.to(device, non_blocking=non_blocking))

    def split(self, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Give each group all positions, `[B * T, D]`."""
        return dict.fromkeys(self.groups, hidden_BTD.flatten(0, 1))

    def merge(self, groups: dict[str, torch.Tensor], like_BTD: torch.Tensor) -> torch.Tensor:
        """Return each position's output from its own group, `[B, T, ...]`; padding gets zeros."""
        merged: Any = 0.0
        for name, is_member_N in zip(self.groups, self._is_member_N):
            merged = torch.where(is_member_N.view(-1, *[1] * (groups[name].ndim - 1)), groups[name], merged)
        return merged.unflatten(0, like_BTD.shape[:2])


def token_modalities(config: MomaConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the modality of each token id, an index into `config.modalities`."""
    modality = None
    for index, name in enumerate(config.modalities[1:], start=1):
        for start, stop in config.modality_token_ranges[name]:
            is_within = (input_ids >= start) & (input_ids < stop)
            modality = is_within * index if modality is None else torch.where(is_within, index, modality)
    return torch.zeros_like(input_ids) if modality is None else modality


def position_groups(config: MomaConfig, modality_BT: torch.Tensor, padding_BT: torch.Tensor | None) -> torch.Tensor:
    """Return the index of each position's expert group, the number of groups at padding, `[B, T]`."""
    num_groups = len(config.modalities) if isinstance(config.num_experts, dict) else 1
    # one group serves every modality, or each modality has its own in the same order
    group_BT = modality_BT if num_groups > 1 else torch.zeros_like(modality_BT)
    return group_BT if padding_BT is None else torch.where(padding_BT, num_groups, group_BT)


def split_modalities(
    config: MomaConfig,
    modality_BT: torch.Tensor,
    padding_BT: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    masked_B: torch.Tensor | None = None,
    others: Sequence[torch.Tensor] = (),
) -> tuple[ModalitySplit, list[int]]:
    """Assign every position to its expert group, with one device sync."""
    groups = list(config.expert_groups)
    group_BT = position_groups(config, modality_BT, padding_BT)
    checked = modality_BT if input_ids is None else input_ids
    numbers = _count(group_BT.flatten(), checked, masked_B, len(groups), others)
    low, high, num_masked, first_masked, *counts = numbers[: 4 + len(groups)]
    _check_bounds(config, low, high, input_ids is not None)
    if num_masked:
        raise InputError(
            f"`attention_mask` is 0 in all of row {first_masked}: a row needs at least one token. Is its text empty, "
            "or was the mask inverted?"
        )
    return ModalitySplit.from_groups(group_BT, dict(zip(groups, counts))), numbers[4 + len(groups) :]


def _count(
    group_flat: torch.Tensor,
    checked: torch.Tensor,
    masked_B: torch.Tensor | None,
    num_groups: int,
    others: Sequence[torch.Tensor],
) -> list[int]:
    """Return lowest and highest of what is checked, masked rows, the first of them, positions of groups, others."""
    if masked_B is None:
        masked_B = torch.zeros_like(group_flat[:1], dtype=torch.bool)
    bounds = torch.stack([checked.min(), checked.max(), masked_B.sum(), masked_B.int().argmax()])
    counts = torch.stack([(group_flat == index).sum() for index in range(num_groups)])
    return torch.cat([bounds, counts, *(other.view(1) for other in others)]).tolist()


def _check_bounds(config: MomaConfig, low: int, high: int, are_ids: bool) -> None:
    if are_ids and (low < 0 or high >= config.vocab_size):
        bad = low if low < 0 else high
        raise IndexError(
            f"`input_ids` holds the id {bad}, outside the vocabulary of {config.vocab_size}. Was the tokenizer given "
            "tokens that the model does not have (see `resize_token_embeddings`), or -100 of the labels?"
        )
    if not are_ids and (low < 0 or high >= len(config.modalities)):
        wrong, known = low if low < 0 else high, dict(enumerate(config.modalities))
        raise InputError(f"`mm_token_type_ids` holds {wrong}; the modalities are {known}.")


def is_distributed() -> bool:
    """Return whether other processes take part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def logistic_noise_like(logits: torch.Tensor) -> torch.Tensor:
    """Draw standard logistic samples: differences of independent Gumbel samples, `G' - G''` of MoMa equation 5."""
    return torch.rand_like(logits).logit(eps=1e-6)


class DispatchLayout(Enum):
    """In what form a selection has its (token, expert) pairs where their number is known to the device alone.

    - `RAGGED`: no others, for a device sync.
    - `SORTED`: a row for each token and expert, those that are taken first: an implementation leaves the others out.
    - `PADDED`: a row for each token and expert, expert by expert, which all run.
    """

    RAGGED = "ragged"
    SORTED = "sorted"
    PADDED = "padded"


class RouterState(NamedTuple):
    """What a router selects with: its buffers of these names, as they were when the forward met it."""

    threshold: torch.Tensor
    balance_bias: torch.Tensor
    num_updates: torch.Tensor


class RouterStatistics(NamedTuple):
    """What one router saw in one forward, for each of its `C` thresholds."""

    kth_C: torch.Tensor
    next_best_C: torch.Tensor
    load_deficit_C: torch.Tensor | None = None
    count_C: torch.Tensor | None = None


@dataclass
class RouterStep:
    """What one router leaves behind of one forward: what it saw, and its noise.

    Recomputation under activation checkpointing may come with another state of the generator, and has to select the
    same tokens again.
    """

    statistics: RouterStatistics | None = None
    noise: torch.Tensor | None = None


class RoutingContext:
    """What one forward of the model tells all its layers, and what their routers leave behind.

    Not a dataclass: FSDP rebuilds the dataclasses, dicts and lists among a layer's arguments when it casts them, and
    what routers leave in such a copy is lost. Objects of other classes go through as they are.
    """

    def __init__(
        self,
        routing: str,
        split: ModalitySplit | FixedSplit,
        track: bool = False,
        depth_routing: str | None = None,
        modality_BT: torch.Tensor | None = None,
        rows: Rows | None = None,
        keep_empty_groups: bool = True,
        pairs: DispatchLayout = DispatchLayout.RAGGED,
    ):
        self.routing, self.split, self.track = routing, split, track
        # both are given wherever there are depth layers
        self.depth_routing: Any = depth_routing
        self.modality_BT: Any = modality_BT
        self.rows = rows or Rows()
        self.keep_empty_groups, self.pairs = keep_empty_groups, pairs
        self.steps: dict[Any, RouterStep] = {}
        # apart, as compiled code is made anew where a dict that it reads has grown
        self.states: dict[Any, RouterState] = {}

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether no shape may depend on who chooses whom."""
        return isinstance(self.split, FixedSplit) or self.pairs is DispatchLayout.PADDED

    @property
    def allow_host_sync(self) -> bool:
        """Whether the device may be asked for the number of pairs."""
        return self.pairs is DispatchLayout.RAGGED

    def to(self, device: torch.device | int | str, non_blocking: bool = False) -> "RoutingContext":
        """Move the tensors in place, as Accelerate's hooks ask for before each layer; layers of a device move none."""
        device = torch.device(device)
        if device != self.split.group_BT.device:
            self.split = self.split.to(device, non_blocking)
            self.modality_BT = moved(self.modality_BT, device, non_blocking)
            rows = self.rows
            tensors = rows.padding_BT, rows.document_BT, rows.own_mask_BHQS
            padding_BT, document_BT, own_mask_BHQS = (moved(each, device, non_blocking) for each in tensors)
            self.rows = Rows(padding_BT, document_BT, rows.lengths, own_mask_BHQS, rows.hidden)
        return self

    @property
    def modality_N(self) -> torch.Tensor:
        """Modality of each token of the one group that serves all, `[N]`."""
        (modality_N1,) = self.split.split(self.modality_BT.unsqueeze(-1)).values()
        return modality_N1.squeeze(-1)

    def for_tokens(self, split: ModalitySplit, modality_BT: torch.Tensor) -> "RoutingContext":
        """Return the same context for a part of the tokens; what routers leave behind lies in this one."""
        return self._but(split=split, modality_BT=modality_BT)

    def allowing_host_sync(self) -> "RoutingContext":
        """Return the same context, in which layers may ask the device for numbers."""
        return self if self.allow_host_sync else self._but(pairs=DispatchLayout.RAGGED)

    def with_routing(self, routing: str, track: bool = False) -> "RoutingContext":
        """Return a separate context for the same tokens, in which experts and depth layers choose by another rule."""
        return self._but(routing=routing, depth_routing=routing, track=track, steps={}, states={})

    def _but(self, **changes: Any) -> "RoutingContext":
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def run_by_group(
        self, x_BTD: torch.Tensor, run: Callable[[str, torch.Tensor], torch.Tensor], pad_empty_input: bool = False
    ) -> torch.Tensor:
        """Return what is made of each group's tokens, back in place, `[B, T, ...]`."""
        tokens, used = self.split.split(x_BTD), self.split.used_groups
        outputs: dict[str, torch.Tensor] = {}
        # a chunk of padding alone has no tokens in any group
        for name in tokens if self.keep_empty_groups or not used else used:
            x_ND = tokens[name]
            is_empty = pad_empty_input and x_ND.shape[0] == 0
            outputs[name] = run(name, x_ND.new_zeros(1, x_ND.shape[1]))[:0] if is_empty else run(name, x_ND)
        return self.split.merge(outputs, x_BTD)

    def step_of(self, router: Any) -> RouterStep:
        """Return what a router leaves behind."""
        return self.steps.setdefault(router, RouterStep())

    def router_state(self, router: Any) -> Any:
        """Return the buffers to select with: recomputation comes after [`update_routers`], which keeps them here."""
        return self.states.get(router, router)

    def router_noise(self, router: Any, logits: torch.Tensor) -> torch.Tensor:
        """Return a router's noise, drawn once."""
        step = self.step_of(router)
        if step.noise is None:
            step.noise = logistic_noise_like(logits)
        return step.noise


def routing_of_batch(
    config: MomaConfig,
    batch: Batch,
    is_training: bool,
    routing: str | None = None,
    depth_routing: str | None = None,
    is_recorded: bool = False,
    pairs: DispatchLayout = DispatchLayout.RAGGED,
) -> RoutingContext:
    """Describe the routing of one forward to all its layers, and raise where something cannot be routed."""
    routing, depth_routing = _resolve_rules(config, is_training, routing, depth_routing)
    if torch.compiler.is_exporting():
        check_exportable(config, routing, is_training)
    # a cache gives its length as a tensor only if it is static and holds something; the caches of depth layers take as
    # many tokens as there are
    is_step = batch.inputs.shape[1] == 1 and isinstance(seen_positions(batch.cache), torch.Tensor)
    may_fix = is_step and not config.depth_layers and rule_of(routing).is_causal and not is_training
    if torch.compiler.is_exporting() or may_fix:
        split, modality_BT, rows = _split_fixed(config, batch)
    else:
        split, modality_BT, rows = _split_batch(config, batch)  # pyright: ignore[reportCallIssue]
    # samples drawn between the steps of a training are no steps; reentrant checkpointing has gradients here
    has_gradients = torch.is_grad_enabled()
    return RoutingContext(
        routing,
        split,
        is_training and has_gradients,
        depth_routing,
        modality_BT,
        rows,
        keep_empty_groups=is_training or has_gradients or is_distributed() or is_recorded,
        pairs=pairs,
    )


def check_inputs(input_ids: Any, inputs_embeds: Any, position_ids: torch.Tensor | None = None):
    """Raise at what is neither ids nor embeddings, and at positions of another number of tokens."""
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("You must specify exactly one of `input_ids` or `inputs_embeds`.")
    name, given, axes = "input_ids", input_ids, ("batch_size", "sequence_length")
    if given is None:
        name, given, axes = "inputs_embeds", inputs_embeds, (*axes, "hidden_size")
    if not isinstance(given, torch.Tensor):
        raise InputError(f"`{name}` is a {type(given).__name__}: give a tensor of shape ({', '.join(axes)}).")
    if given.ndim != len(axes):
        raise InputError(f"`{name}` has the shape {tuple(given.shape)}, but needs ({', '.join(axes)}).")
    if (input_ids is None) != given.is_floating_point():
        wanted, other = ("floating-point numbers", "ids") if input_ids is None else ("integers", "embeddings")
        raise InputError(f"`{name}` has the dtype {given.dtype}, but holds {wanted}: were {other} given in its place?")
    if position_ids is None:
        return
    shape = tuple(getattr(position_ids, "shape", ()))
    if shape not in ((1, given.shape[1]), given.shape[:2]):
        raise InputError(
            f"`position_ids` has the shape {shape}, but `{name}` has {given.shape[1]} positions in each of its "
            f"{given.shape[0]} rows: give a tensor of one row for all, or of as many."
        )


def seen_positions(cache: Cache | None) -> int | torch.Tensor:
    """Return the positions that came before those of a batch; a tensor from the layers of static caches."""
    # the paged cache of continuous batching counts no tokens
    return cache.get_seq_length() if cache is not None and hasattr(cache, "get_seq_length") else 0


def check_batch(
    config: MomaConfig, batch: Batch, past_length: int | torch.Tensor, num_columns: int | torch.Tensor | None = None
):
    """Raise at a batch that is empty or too long, and at masks and modalities that do not fit it.

    Ids outside the vocabulary, rows of padding alone and documents are found by [`split_modalities`] and
    [`documents_of`], by numbers of which the device is asked once.
    """
    (num_rows, length), limit = batch.inputs.shape[:2], config.max_position_embeddings
    if num_rows == 0 or length == 0:
        name = "input_ids" if batch.input_ids is not None else "inputs_embeds"
        raise InputError(f"`{name}` has {num_rows} rows of {length} tokens: the input is empty.")
    is_exported, is_known = torch.compiler.is_exporting(), not isinstance(past_length, torch.Tensor)
    has_room = isinstance(batch.cache, StaticCache) or isinstance(past_length, torch.Tensor)
    capacity = batch.cache.get_max_length() if has_room else None
    # a cache that ends before the limit needs no device sync for the number of its tokens, and a program cannot sync
    if is_known or (capacity is not None and capacity > limit and not is_exported):
        num_seen = past_length + length
        # scaled rotary embeddings are made to go beyond
        is_long = config.rope_parameters["rope_type"] == "default" and num_seen > limit
        # a row of many packed requests is longer than any of them
        if is_long and (is_exported or batch.position_ids is None or batch.position_ids.max() >= limit):
            raise InputError(
                f"The sequence has {num_seen} positions, but `max_position_embeddings` is {limit}: the model has "
                "never seen later ones. Shorten the input, or set `rope_parameters` to a scaled type."
            )
    if is_known and capacity is not None and past_length + length > capacity:
        raise InputError(
            f"`cache` has room for {capacity} positions, but there are {past_length + length} with those that it "
            f"holds already: make it with `max_cache_len` of at least {past_length + length}."
        )
    mask, modality_BT = batch.attention_mask, batch.mm_token_type_ids
    if batch.padding_mask_BS is not None:
        fewest = past_length + length if num_columns is None else num_columns
        most = fewest if capacity is None else max(fewest, capacity)
        if mask.shape[0] != num_rows or not fewest <= mask.shape[1] <= most:
            or_more = " or more" if most > fewest else ""
            raise InputError(
                f"`attention_mask` has the shape {tuple(mask.shape)}, but there are {num_rows} rows of {int(fewest)} "
                f"positions{or_more}: with a cache it has to cover the cached positions, too, and with a static one "
                "alone it may go on to the end of the cache."
            )
    elif batch.own_mask_BHQS is not None:
        check_own_mask(config, batch.own_mask_BHQS, num_rows, length)
    elif mask is not None and config.depth_layers:
        raise TypeError(
            f"`attention_mask` is a {type(mask).__name__}: depth layers can pack tensors only, of shape "
            "(batch_size, sequence_length) or (batch_size, 1, query_length, key_length)."
        )
    if batch.input_ids is not None or modality_BT is None:
        return
    if modality_BT.shape != batch.inputs.shape[:2]:
        raise InputError(
            f"`mm_token_type_ids` has the shape {tuple(modality_BT.shape)}, but `inputs_embeds` has {num_rows} rows "
            f"of {length} positions: each needs its modality."
        )
    if modality_BT.is_floating_point():
        raise InputError(f"`mm_token_type_ids` is of {modality_BT.dtype}: whole numbers are needed.")


def check_exportable(config: MomaConfig, routing: str, is_training: bool):
    """Raise at what no program of `torch.export` can hold."""
    if config.depth_layers:
        raise InputError(
            f"`depth_layers` is {list(config.depth_layers)}: a model with depth layers cannot be exported, since the "
            "shapes of what they compute and cache depend on who is chosen."
        )
    if config.rope_parameters["rope_type"] in ("dynamic", "longrope"):
        raise InputError(
            f"`rope_parameters` has the type {config.rope_parameters['rope_type']!r}, whose frequencies depend on the "
            "largest position of a batch: it cannot be exported. 'linear' and 'yarn' can."
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
    if rule_of(routing).counts_experts:
        wanted, sizes = config.num_experts_per_tok, [config.group_num_experts(group) for group in config.expert_groups]
        # a group of one expert has no router
        too_few = [size for size in sizes if 1 < size < wanted]
        if too_few:
            raise InputError(
                f"`routing` = {routing!r} gives each token `num_experts_per_tok` = {wanted} experts, but the smallest "
                f"group with a router has {min(too_few)}: choose another rule, or lower the configuration's field."
            )
    if rule_of(depth_routing, "depth_routing").choose is None and config.depth_layers:
        with_depth = sorted(name for name, rule in RULES.items() if rule.choose is not None)
        raise InputError(
            f"`depth_routing` = {depth_routing!r}: this rule has no form for depth layers; those that have one are "
            f"{with_depth}."
        )
    return routing, depth_routing


def _split_fixed(config: MomaConfig, batch: Batch) -> tuple[FixedSplit, torch.Tensor, Rows]:
    """Give every group every position: for steps with a static cache, and for exported programs."""
    num_rows, length = batch.inputs.shape[:2]
    past_length, mask_BS = seen_positions(batch.cache), batch.padding_mask_BS
    num_columns = None
    if isinstance(past_length, torch.Tensor) and mask_BS is not None:
        # a device is asked only about a mask that looks too short: `reset()` may have emptied the cache
        is_known = past_length.device.type == "cpu" or mask_BS.shape[1] <= length
        if torch.compiler.is_compiling() or not is_known:
            num_columns = length + 1
    check_batch(config, batch, past_length, num_columns)
    modality_BT, padding_BT, document_BT = _modalities(config, batch), None, None
    if mask_BS is not None and isinstance(past_length, torch.Tensor):
        places_T = past_length.view(1)
        if length > 1:
            places_T = places_T + torch.arange(length, device=places_T.device)
        padding_BT = mask_BS.index_select(1, places_T) == 0
    elif mask_BS is not None:
        padding_BT = mask_BS[:, past_length : past_length + length] == 0
    # a program holds for rows of several documents, too, where its inputs may say so
    position_ids = batch.position_ids if batch.attention_mask is None and batch.cache is None else None
    if torch.compiler.is_exporting() and position_ids is not None and not uses_flash_attention_mask(config):
        document_BT = document_begins(position_ids.expand(num_rows, -1)).cumsum(1)
    split = FixedSplit(list(config.expert_groups), position_groups(config, modality_BT, padding_BT))
    return split, modality_BT, Rows(padding_BT, document_BT)


# the device sync for numbers of tokens would break the graph here and in every caller
@torch.compiler.disable
def _split_batch(config: MomaConfig, batch: Batch) -> tuple[ModalitySplit, torch.Tensor, Rows]:
    """Ask the device once for the number of each group's positions, and of what else depends on the batch."""
    length, mask_BS = batch.inputs.shape[1], batch.padding_mask_BS
    past_length: Any = seen_positions(batch.cache)
    if length != 1 or mask_BS is not None:
        # one more device sync, for a chunk that a static cache goes on with
        past_length = int(past_length)
    check_batch(config, batch, past_length)
    modality_BT = _modalities(config, batch)
    padding_BT = masked_B = before_BS = None
    if mask_BS is not None:
        before_BS, padding_BT, _ = (mask_BS == 0).tensor_split([past_length, past_length + length], dim=1)
        masked_B = padding_BT.all(dim=-1) if batch.cache is None else None
    begins_BT, questions = document_questions(config, batch, padding_BT, past_length)
    if config.depth_layers and before_BS is not None and batch.cache is not None:
        questions["hidden"] = before_BS.sum()
    split, numbers = split_modalities(
        config, modality_BT, padding_BT, batch.input_ids, masked_B, [*questions.values()]
    )
    num_padding = modality_BT.numel() - sum(split.counts.values())
    answers = dict(zip(questions, numbers))
    rows = documents_of(begins_BT, answers, batch.cache is not None)
    rows = rows._replace(padding_BT=padding_BT if num_padding else None)
    if config.depth_layers:
        hidden = (mask_BS, answers["hidden"], answers["hidden"] + num_padding) if "hidden" in answers else None
        rows = rows._replace(own_mask_BHQS=batch.own_mask_BHQS, hidden=hidden)
    return split, modality_BT, rows


def _modalities(config: MomaConfig, batch: Batch) -> torch.Tensor:
    """Return the modality of each position, `[B, T]`."""
    if batch.input_ids is not None:
        return token_modalities(config, batch.input_ids)
    if batch.mm_token_type_ids is not None:
        return batch.mm_token_type_ids.long()
    # soft prompts of PEFT come this way, before images too
    if len(config.expert_groups) > 1 and not torch.compiler.is_compiling():
        logger.warning_once(
            "`inputs_embeds` came without `mm_token_type_ids`: all positions go to the experts of text. Where there "
            "are images among them, give the modality of each."
        )
    return torch.zeros(batch.inputs.shape[:2], dtype=torch.long, device=batch.inputs.device)


def columns_of_batch(attention_mask: Any, cache: Cache | None, num_positions: int) -> Any:
    """Return the columns of a padding mask that stand for a batch's own positions.

    Before them stand those that a cache holds, and behind them, in the mask of a static cache, perhaps later ones.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return attention_mask
    if isinstance(cache, StaticCache):
        attention_mask = attention_mask[:, : int(seen_positions(cache))]
    return attention_mask[:, -num_positions:]
