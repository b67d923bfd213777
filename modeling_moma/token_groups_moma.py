# SPDX-License-Identifier: Apache-2.0
"""From what the model was called with to the groups of tokens that experts see, found once per forward.

Which positions belong to which modality and go to which expert group, and what else one forward tells all its layers;
with the checks of a batch.

Shape suffixes:
    B rows, T positions, D hidden size, N tokens of one group in the batch, H heads, Q queries, S positions that the
    cache has seen and those of the batch, C thresholds of a router (one for each expert, or for each pool of a depth
    router), M modalities.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from transformers.cache_utils import Cache, StaticCache
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import logging

from .configuration_moma import RULES, MomaConfig, rule_of
from .documents_moma import Documents, document_begins, document_questions, documents_of, uses_flash_attention_mask
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
        order, inverse = (
            None if each is None else each.to(device, non_blocking=non_blocking) for each in (self.order, self.inverse)
        )
        return ModalitySplit(self.counts, order, inverse, self.group_BT.to(device, non_blocking=non_blocking))

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


class RoutingContext:
    """What one forward of the model tells all its layers, and what their routers leave behind.

    Not a dataclass: FSDP rebuilds the dataclasses, dicts and lists among a layer's arguments when it casts them, and
    what routers leave in such a copy is lost. Objects of other classes go through as they are.
    """

    _tensors = ("modality_BT", "padding_BT", "document_BT", "custom_mask_BHQS")

    def __init__(
        self,
        routing: str,
        split: ModalitySplit | FixedSplit,
        track: bool = False,
        depth_routing: str | None = None,
        modality_BT: torch.Tensor | None = None,
        padding_BT: torch.Tensor | None = None,
        document_BT: torch.Tensor | None = None,
        custom_mask_BHQS: torch.Tensor | None = None,
        lengths: FlashAttentionKwargs | None = None,
        keep_empty_groups: bool = True,
        pairs: DispatchLayout = DispatchLayout.RAGGED,
        takes_hints: bool = False,
        is_recorded: bool = False,
    ):
        self.routing = routing
        # both are given wherever there are depth layers
        self.depth_routing: str = depth_routing  # pyright: ignore[reportAttributeAccessIssue]
        self.modality_BT: torch.Tensor = modality_BT  # pyright: ignore[reportAttributeAccessIssue]
        self.split, self.track = split, track
        self.padding_BT, self.document_BT = padding_BT, document_BT
        self.custom_mask_BHQS, self.lengths = custom_mask_BHQS, lengths
        self.hidden: tuple[torch.Tensor, int, int] | None = None
        self.keep_empty_groups, self.pairs, self.takes_hints = keep_empty_groups, pairs, takes_hints
        self.is_recorded = is_recorded
        self.statistics: dict[Any, RouterStatistics] = {}
        self.state: dict[Any, RouterState] = {}
        self.noise: dict[Any, torch.Tensor] = {}
        self._by_device: dict[torch.device, RoutingContext] = {}

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether no shape may depend on who chooses whom."""
        return isinstance(self.split, FixedSplit) or self.pairs is DispatchLayout.PADDED

    @property
    def allow_host_sync(self) -> bool:
        """Whether the device may be asked for the number of pairs."""
        return self.pairs is DispatchLayout.RAGGED

    @property
    def documents(self) -> Documents:
        """What keeps the documents of packed rows apart."""
        return Documents(self.document_BT, self.lengths)

    @property
    def has_padding(self) -> bool:
        """Whether a position may be padding; without a device sync it is unknown."""
        if self.padding_BT is None or not isinstance(self.split, ModalitySplit):
            return self.padding_BT is not None
        return sum(self.split.counts.values()) < self.padding_BT.numel()

    def to(self, device: torch.device | int | str, non_blocking: bool = False) -> "RoutingContext":
        """Return the same context for layers on another device, which Accelerate's hooks ask for.

        What routers leave behind lies in this one.
        """
        device = torch.device(device)
        if device == self.split.group_BT.device:
            return self
        # computed once for all layers of a device
        if device not in self._by_device:
            tensors = {name: getattr(self, name) for name in self._tensors}
            moved = {
                name: None if tensor is None else tensor.to(device, non_blocking=non_blocking)
                for name, tensor in tensors.items()
            }
            self._by_device[device] = self._view(split=self.split.to(device, non_blocking), **moved)
        return self._by_device[device]

    @property
    def modality_N(self) -> torch.Tensor:
        """Modality of each token of the one group that serves all, `[N]`."""
        (modality_N1,) = self.split.split(self.modality_BT.unsqueeze(-1)).values()
        return modality_N1.squeeze(-1)

    def with_split(self, split: ModalitySplit, modality_BT: torch.Tensor | None = None) -> "RoutingContext":
        """Return the same context for a part of the tokens; what routers leave behind lies in this one."""
        return self._view(split=split, modality_BT=modality_BT)

    def allowing_host_sync(self) -> "RoutingContext":
        """Return the same context, in which layers may ask the device for numbers."""
        return self if self.allow_host_sync else self._view(pairs=DispatchLayout.RAGGED)

    def with_routing(self, routing: str, track: bool = False) -> "RoutingContext":
        """Return a separate context for the same tokens, in which experts and depth layers choose by another rule."""
        return self._copy(routing=routing, depth_routing=routing, track=track)

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

    def _copy(self, **changes: Any) -> "RoutingContext":
        names = ("routing", "split", "track", "depth_routing", "keep_empty_groups", "pairs", "takes_hints")
        names += ("is_recorded", *self._tensors)
        return RoutingContext(**{**{name: getattr(self, name) for name in names}, **changes})

    def _view(self, **changes: Any) -> "RoutingContext":
        view = self._copy(**changes)
        view.statistics, view.state, view.noise, view.hidden = self.statistics, self.state, self.noise, self.hidden
        return view

    def router_state(self, router: Any) -> Any:
        """Return the buffers of a router to select with.

        Recomputation under activation checkpointing comes after `update_routers`, which has kept what they were, and
        has to select the same tokens again.
        """
        return self.state.get(router, router)

    def router_noise(self, router: Any, logits: torch.Tensor) -> torch.Tensor:
        """Return a router's noise, drawn once: recomputation may come with another state of the generator."""
        if router not in self.noise:
            self.noise[router] = logistic_noise_like(logits)
        return self.noise[router]

    def record(self, router: Any, statistics: RouterStatistics):
        """Keep what `update_routers` needs of one router's step."""
        self.statistics[router] = statistics


def routing_of_batch(
    config: MomaConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
    cache: Cache | None,
    is_training: bool,
    routing: str | None = None,
    depth_routing: str | None = None,
    is_recorded: bool = False,
    pairs: DispatchLayout = DispatchLayout.RAGGED,
    takes_hints: bool = False,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> RoutingContext:
    """Describe the routing of one forward to all its layers, and raise where something cannot be routed."""
    routing, depth_routing = _resolve_rules(config, is_training, routing, depth_routing)
    # the caller gives `input_ids` or `inputs_embeds`
    inputs: torch.Tensor = input_ids if input_ids is not None else inputs_embeds  # pyright: ignore[reportAssignmentType]
    past_length = seen_positions(cache)
    has_records = is_recorded or bool(given.get("output_attentions", config.output_attentions))
    # a cache gives its length as a tensor only if it is static and holds something
    may_fix = _may_fix_shapes(config, inputs, routing, is_training)
    is_exported = torch.compiler.is_exporting()
    if is_exported:
        check_exportable(config, routing, is_training)
    documents, hidden = Documents(), None
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
        # a program holds for rows of several documents, too, where its inputs may say so
        if is_exported and position_ids is not None and attention_mask is None and cache is None:
            begins_BT = document_begins(position_ids.expand(inputs.shape[0], -1))
            documents = Documents(None if uses_flash_attention_mask(config) else begins_BT.cumsum(1))
    else:
        split, modality_BT, padding_BT, documents, hidden = _split_batch(
            config,
            input_ids,  # pyright: ignore[reportCallIssue]
            inputs,
            attention_mask,
            position_ids,
            mm_token_type_ids,
            past_length,
            cache,
            given,
        )
    # samples drawn between the steps of a training are no steps; reentrant checkpointing has gradients here
    has_gradients = torch.is_grad_enabled()
    context = RoutingContext(
        routing,
        split,
        is_training and has_gradients,
        depth_routing,
        modality_BT,
        padding_BT,
        documents.document_BT,
        lengths=documents.lengths,
        keep_empty_groups=is_training or has_gradients or is_distributed() or is_recorded,
        pairs=pairs,
        takes_hints=takes_hints,
        is_recorded=has_records,
    )
    if config.depth_layers:
        _describe_rows(context, attention_mask, hidden)
    return context


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


def check_length(
    config: MomaConfig, length: int, past_length: int | torch.Tensor, position_ids: torch.Tensor | None = None
):
    """Raise at positions that an unscaled model has never seen."""
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


def _may_fix_shapes(config: MomaConfig, inputs: torch.Tensor, routing: str, is_training: bool) -> bool:
    """Return whether this is a step of one token, whose shapes must not depend on the token if the cache is static."""
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
    """Give every group every position: for steps with a static cache of `max_length`, and for exported programs."""
    length = inputs.shape[1]
    # a cache that ends before the limit needs no device sync for the number of its tokens, and a program cannot sync
    if not isinstance(past_length, torch.Tensor):
        check_length(config, length, past_length)
    elif max_length > config.max_position_embeddings and not torch.compiler.is_exporting():  # pyright: ignore[reportOptionalOperand]
        check_length(config, length, past_length)
    modality_BT = _modalities(config, input_ids, inputs, mm_token_type_ids)
    padding_BT = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        fewest = most = past_length + length
        if isinstance(past_length, torch.Tensor):
            # a device is asked only about a mask that looks too short: `reset()` may have emptied the cache
            is_known = past_length.device.type == "cpu" or attention_mask.shape[1] <= length
            if torch.compiler.is_compiling() or not is_known:
                fewest = length + 1
            most = max(fewest, max_length)  # pyright: ignore[reportArgumentType]
        _check_mask(attention_mask, inputs.shape[0], fewest, most)
        if isinstance(past_length, torch.Tensor):
            places_T = past_length.view(1)
            if length > 1:
                places_T = places_T + torch.arange(length, device=places_T.device)
            padding_BT = attention_mask.index_select(1, places_T) == 0
        else:
            padding_BT = attention_mask[:, past_length:fewest] == 0
    split = FixedSplit(list(config.expert_groups), position_groups(config, modality_BT, padding_BT))
    return split, modality_BT, padding_BT


# the device sync for numbers of tokens would break the graph here and in every caller
@torch.compiler.disable
def _split_batch(
    config: MomaConfig,
    input_ids: torch.Tensor | None,
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    mm_token_type_ids: torch.Tensor | None,
    past_length: int | torch.Tensor,
    cache: Cache | None,
    given: Mapping[str, Any],
) -> tuple[ModalitySplit, torch.Tensor, torch.Tensor | None, Documents, tuple[torch.Tensor, int, int] | None]:
    batch_size, length = inputs.shape[:2]
    if batch_size == 0 or length == 0:
        name = "input_ids" if input_ids is not None else "inputs_embeds"
        raise InputError(f"`{name}` has {batch_size} rows of {length} tokens: the input is empty.")
    # a step on a static cache that ends before the limit needs no device sync for the number of its tokens
    is_static_step = isinstance(past_length, torch.Tensor) and length == 1
    if not is_static_step or cache.get_max_length() > config.max_position_embeddings:  # pyright: ignore[reportOptionalMemberAccess]
        check_length(config, length, past_length, position_ids)
    if not is_static_step:
        # one device sync for a chunk that a static cache goes on with
        past_length = int(past_length)
        _check_room(cache, past_length + length)
    modality_BT = _modalities(config, input_ids, inputs, mm_token_type_ids)
    padding_BT = masked_B = None
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        end = int(past_length) + length
        most = max(end, cache.get_max_length()) if isinstance(cache, StaticCache) else end
        _check_mask(attention_mask, batch_size, end, most)
        padding_BT = attention_mask[:, end - length : end] == 0
        masked_B = (attention_mask == 0).all(dim=-1) if cache is None else None
    begins_BT, questions = document_questions(
        config, given, inputs, attention_mask, padding_BT, position_ids, cache, past_length
    )
    if config.depth_layers and attention_mask is not None and padding_BT is not None and cache is not None:
        questions["hidden"] = (attention_mask[:, : end - length] == 0).sum()
    asked = [*questions.values()]
    split, numbers = split_modalities(config, modality_BT, padding_BT, input_ids, masked_B, asked)
    num_padding = modality_BT.numel() - sum(split.counts.values())
    answers, hidden = dict(zip(questions, numbers)), None
    if attention_mask is not None and "hidden" in answers:
        hidden = attention_mask, answers["hidden"], answers["hidden"] + num_padding
    return split, modality_BT, padding_BT, documents_of(begins_BT, answers, cache is not None), hidden


def _modalities(
    config: MomaConfig, input_ids: torch.Tensor | None, inputs: torch.Tensor, mm_token_type_ids: torch.Tensor | None
) -> torch.Tensor:
    """Return the modality of each position, `[B, T]`."""
    if input_ids is not None:
        return token_modalities(config, input_ids)
    if mm_token_type_ids is not None:
        if mm_token_type_ids.shape != inputs.shape[:2]:
            raise InputError(
                f"`mm_token_type_ids` has the shape {tuple(mm_token_type_ids.shape)}, but `inputs_embeds` has "
                f"{inputs.shape[0]} rows of {inputs.shape[1]} positions: each needs its modality."
            )
        if mm_token_type_ids.is_floating_point():
            raise InputError(f"`mm_token_type_ids` is of {mm_token_type_ids.dtype}: whole numbers are needed.")
        return mm_token_type_ids.long()
    # soft prompts of PEFT come this way, before images too
    if len(config.expert_groups) > 1 and not torch.compiler.is_compiling():
        logger.warning_once(
            "`inputs_embeds` came without `mm_token_type_ids`: all positions go to the experts of text. Where there "
            "are images among them, give the modality of each."
        )
    return torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)


def _check_room(cache: Cache | None, length: int) -> None:
    if isinstance(cache, StaticCache) and length > cache.get_max_length():
        raise InputError(
            f"`cache` has room for {cache.get_max_length()} positions, but there are {length} with those that it "
            f"holds already: make it with `max_cache_len` of at least {length}."
        )


def _check_mask(
    attention_mask: torch.Tensor, batch_size: int, fewest: int | torch.Tensor, most: int | torch.Tensor
) -> None:
    num_rows, num_columns = attention_mask.shape
    if num_rows == batch_size and fewest <= num_columns <= most:
        return
    or_more = " or more" if most > fewest else ""
    raise InputError(
        f"`attention_mask` has the shape {tuple(attention_mask.shape)}, but there are {batch_size} rows of "
        f"{int(fewest)} positions{or_more}: with a cache it has to cover the cached positions, too, and with a static "
        "one alone it may go on to the end of the cache."
    )


def columns_of_batch(attention_mask: Any, cache: Cache | None, num_positions: int) -> Any:
    """Return the columns of a padding mask that stand for a batch's own positions.

    Before them stand those that a cache holds, and behind them, in the mask of a static cache, perhaps later ones.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return attention_mask
    if isinstance(cache, StaticCache):
        attention_mask = attention_mask[:, : int(seen_positions(cache))]
    return attention_mask[:, -num_positions:]


def _describe_rows(context: RoutingContext, attention_mask: torch.Tensor | None, hidden: Any) -> None:
    context.hidden = hidden
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise TypeError(
            f"`attention_mask` is a {type(attention_mask).__name__}: depth layers can pack tensors only, of shape "
            "(batch_size, sequence_length) or (batch_size, 1, query_length, key_length)."
        )
    if attention_mask is not None and attention_mask.ndim == 4:
        context.custom_mask_BHQS = attention_mask
