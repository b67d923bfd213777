# SPDX-License-Identifier: Apache-2.0
"""Which positions of a batch belong to which modality and go to which expert group, found once per forward.

Shape suffixes:
    B rows, T positions, D hidden size, N tokens of one group in the batch.
"""

from dataclasses import dataclass

import torch

from .configuration_moma import MomaConfig
from .errors_moma import InputError
from .host_moma import is_on_host


# positions of a step on a CPU
FEW_POSITIONS = 64


@dataclass
class ModalitySplit:
    """Which positions of a batch go to which expert group, computed once per forward and shared by all layers.

    Attributes:
        counts (`dict[str, int]`): tokens of each group.
        order (`torch.LongTensor`, *optional*): flat positions `[B * T]`, group by group, padding last. `None` when all
            positions belong to one group.
        inverse (`torch.LongTensor`, *optional*): the place of each position in `order`.
        group_BT (`torch.LongTensor`): index of each position's group, the number of groups at padding, `[B, T]`.
        used_groups (`list[str]`): groups that have tokens.
    """

    counts: dict[str, int]
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    group_BT: torch.Tensor

    def __post_init__(self):
        # all layers ask for it
        self.used_groups = [name for name, count in self.counts.items() if count]

    @property
    def is_whole(self) -> bool:
        """Whether all positions belong to one group."""
        return self.order is None

    @classmethod
    def from_groups(cls, group_BT: torch.Tensor, counts: dict[str, int]) -> "ModalitySplit":
        """Lay out positions whose numbers in each group are known to the host, so that nothing waits."""
        group_flat = group_BT.flatten()
        if group_flat.shape[0] in counts.values():
            return cls(counts, None, None, group_BT)
        if group_flat.shape[0] <= FEW_POSITIONS and is_on_host(group_flat) and not torch.compiler.is_compiling():
            return cls(counts, *_order_on_host(group_flat), group_BT)
        order = torch.argsort(group_flat, stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        return cls(counts, order, inverse, group_BT)

    def of_rows(self, row_R: torch.Tensor) -> "ModalitySplit":
        """The split of some of the rows, with one wait on the device."""
        group_RT = self.group_BT.index_select(0, row_R)
        groups = group_RT.flatten().tolist()
        return ModalitySplit.from_groups(group_RT, {name: groups.count(i) for i, name in enumerate(self.counts)})

    def to(self, device: torch.device, non_blocking: bool = False) -> "ModalitySplit":
        """The same split on another device."""
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
            # products without rows, for the gradients of their weights
            rows = parts[0] if len(parts) == 1 else torch.cat(parts)
            return rows.unflatten(0, like_BTD.shape[:2])
        num_padding = self.order.shape[0] - sum(self.counts.values())
        if num_padding:
            parts.append(parts[0].new_zeros(num_padding, *parts[0].shape[1:]))
        return torch.cat(parts).index_select(0, self.inverse).unflatten(0, like_BTD.shape[:2])


@dataclass
class FixedSplit:
    """A split whose shapes do not depend on the tokens: every group gets every position, and gives up the others'.

    For steps of one token, where a wait on the device for the numbers would cost more than the surplus work, and where
    `torch.compile` needs every step to look alike; and for programs of `torch.export`, which hold for any tokens.

    Attributes:
        groups (`list[str]`): names of the groups.
        group_BT (`torch.LongTensor`): index of each position's group, the number of groups at padding, `[B, T]`.
    """

    groups: list[str]
    group_BT: torch.Tensor

    def __post_init__(self):
        # all layers ask for these
        self._is_member_N = [self.group_BT.flatten() == index for index in range(len(self.groups))]
        # which have tokens is not known
        self.used_groups = self.groups

    @property
    def is_whole(self) -> bool:
        """Whether all positions belong to one group: where they may be padding nobody knows."""
        return False

    def to(self, device: torch.device, non_blocking: bool = False) -> "FixedSplit":
        """The same split on another device."""
        return FixedSplit(self.groups, self.group_BT.to(device, non_blocking=non_blocking))

    def split(self, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
        """All positions for each group, `[B * T, D]`."""
        return dict.fromkeys(self.groups, hidden_BTD.flatten(0, 1))

    def merge(self, groups: dict[str, torch.Tensor], like_BTD: torch.Tensor) -> torch.Tensor:
        """Each position's output from its own group, `[B, T, ...]`; padding gets zeros."""
        merged = torch.zeros_like(groups[self.groups[0]])
        for name, is_member_N in zip(self.groups, self._is_member_N):
            merged = torch.where(is_member_N.view(-1, *[1] * (merged.ndim - 1)), groups[name], merged)
        return merged.unflatten(0, like_BTD.shape[:2])


def token_modalities(config: MomaConfig, input_ids: torch.Tensor) -> torch.Tensor:
    """Modality of each token id, an index into `config.modalities`."""
    modality = torch.zeros_like(input_ids)
    for index, name in enumerate(config.modalities[1:], start=1):
        for start, stop in config.modality_token_ranges[name]:
            modality = torch.where((input_ids >= start) & (input_ids < stop), index, modality)
    return modality


def position_groups(config: MomaConfig, modality_BT: torch.Tensor, padding_BT: torch.Tensor | None) -> torch.Tensor:
    """Index of each position's expert group, the number of groups at padding, `[B, T]`."""
    num_groups = len(config.expert_groups)
    # one group serves every modality, or each modality has its own in the same order
    group_BT = modality_BT if num_groups > 1 else torch.zeros_like(modality_BT)
    return group_BT if padding_BT is None else torch.where(padding_BT, num_groups, group_BT)


def split_modalities(
    config: MomaConfig,
    modality_BT: torch.Tensor,
    padding_BT: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    masked_B: torch.Tensor | None = None,
) -> ModalitySplit:
    """Assign every position to its expert group, with one wait on the device.

    Args:
        config (`MomaConfig`): gives the groups and the size of the vocabulary.
        modality_BT (`torch.LongTensor`): modality of each position, `[B, T]`.
        padding_BT (`torch.BoolTensor`, *optional*): True where a position is padding, `[B, T]`.
        input_ids (`torch.LongTensor`, *optional*): checked against the vocabulary in the same wait.
        masked_B (`torch.BoolTensor`, *optional*): True where a whole row is padding, cached positions included, `[B]`.

    Raises:
        IndexError: an id lies outside the vocabulary.
        ValueError: a modality index is not one of `config.modalities`, or a row is all padding.
    """
    groups = list(config.expert_groups)
    group_BT = position_groups(config, modality_BT, padding_BT)
    group_flat = group_BT.flatten()
    checked = modality_BT if input_ids is None else input_ids
    is_step = is_on_host(group_flat) and group_flat.shape[0] <= FEW_POSITIONS
    count = _count_on_host if is_step else _count_on_device
    low, high, num_masked, first_masked, *counts = count(group_flat, checked, masked_B, len(groups))
    _check_bounds(config, low, high, input_ids is not None)
    if num_masked:
        raise InputError(
            f"`attention_mask` is 0 in all of row {first_masked}: a row needs at least one token. Is its text empty, "
            "or was the mask inverted?"
        )
    return ModalitySplit.from_groups(group_BT, dict(zip(groups, counts)))


def _count_on_device(
    group_flat: torch.Tensor, checked: torch.Tensor, masked_B: torch.Tensor | None, num_groups: int
) -> list[int]:
    """Lowest and highest of what is checked, masked rows, the first of them, and positions of each group."""
    if masked_B is None:
        masked_B = torch.zeros_like(group_flat[:1], dtype=torch.bool)
    bounds = torch.stack([checked.min(), checked.max(), masked_B.sum(), masked_B.int().argmax()])
    counts = torch.stack([(group_flat == index).sum() for index in range(num_groups)])
    return torch.cat([bounds, counts]).tolist()


def _count_on_host(
    group_flat: torch.Tensor, checked: torch.Tensor, masked_B: torch.Tensor | None, num_groups: int
) -> list[int]:
    """As [`_count_on_device`], in less time than its operations take to start."""
    values, groups = checked.flatten().tolist(), group_flat.tolist()
    masked = [] if masked_B is None else masked_B.tolist()
    num_masked = sum(masked)
    first_masked = masked.index(True) if num_masked else 0
    return [min(values), max(values), num_masked, first_masked, *(groups.count(index) for index in range(num_groups))]


def _order_on_host(group_flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions group by group and their places in that order, in less time than a sort takes to start."""
    groups = group_flat.tolist()
    order = sorted(range(len(groups)), key=groups.__getitem__)
    inverse = sorted(range(len(groups)), key=order.__getitem__)
    order, inverse = torch.tensor((order, inverse), device=group_flat.device).unbind()
    return order, inverse


def _check_bounds(config: MomaConfig, low: int, high: int, are_ids: bool) -> None:
    if are_ids and (low < 0 or high >= config.vocab_size):
        bad = low if low < 0 else high
        raise IndexError(
            f"`input_ids` holds the id {bad}, outside the vocabulary of {config.vocab_size}. Was the tokenizer given "
            "tokens that the model does not have (see `resize_token_embeddings`), or -100 of the labels?"
        )
    if not are_ids and (low < 0 or high >= len(config.modalities)):
        raise InputError(
            f"`mm_token_type_ids` holds {low if low < 0 else high}; the modalities are "
            f"{dict(enumerate(config.modalities))}."
        )
