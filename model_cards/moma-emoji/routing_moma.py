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
"""Who goes where: the split of a batch by modality, and routers that answer with a selection and its weights.

Shape suffixes:
    B rows, T positions, D hidden size, G expert groups, N tokens of one group in the batch, E experts of the group,
    K tokens that one expert takes, P (token, expert) pairs,
    C cuts of a router (one for each expert, or for each pool of a depth router).
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .auxiliary_moma import Fp32Buffers, MomaAuxiliaryRouter
from .configuration_moma import MomaConfig


@dataclass
class ExpertSelection:
    """Every expert takes the same number of tokens.

    Attributes:
        token_EK (`torch.LongTensor`): positions in the group's tokens, `[E, K]`. A token may stand in several rows or
            in none.
        weight_EK (`torch.Tensor`): gates, fp32, `[E, K]`.
    """

    token_EK: torch.Tensor
    weight_EK: torch.Tensor


@dataclass
class PairSelection:
    """Any number of (token, expert) pairs, in the order of the tokens.

    Attributes:
        token_P (`torch.LongTensor`): positions in the group's tokens, `[P]`.
        expert_P (`torch.LongTensor`): the expert of each pair, `[P]`.
        weight_P (`torch.Tensor`): gates, fp32, `[P]`.
    """

    token_P: torch.Tensor
    expert_P: torch.Tensor
    weight_P: torch.Tensor


@dataclass
class GateSelection:
    """Every expert with every token, in shapes that do not depend on who chose whom.

    Attributes:
        weight_NE (`torch.Tensor`): gates, fp32, 0 where an expert does not take the token, `[N, E]`.
    """

    weight_NE: torch.Tensor


class MomaRouterBase(Fp32Buffers, nn.Module):
    """Sigmoid scores, and the state that lets a router choose without looking at other tokens.

    A score is the sigmoid of a projection, so it depends on its token alone. Everything is fp32: bf16 sigmoids tie,
    and a tie changes who is chosen.
    """

    def __init__(
        self, config: MomaConfig, num_scores: int, num_cuts: int, momentum: float, updates_shape: tuple[int, ...] = ()
    ):
        super().__init__()
        self.momentum = momentum
        self.warmup_steps = config.routing_warmup_steps
        self.weight = nn.Parameter(torch.empty(num_scores, config.hidden_size, dtype=torch.float32))
        # an untrained router scores about 0.5
        self.threshold = nn.Buffer(torch.full((num_cuts,), 0.5, dtype=torch.float32))
        self.balance_bias = nn.Buffer(torch.zeros(num_cuts, dtype=torch.float32))
        self.num_updates = nn.Buffer(torch.zeros(updates_shape, dtype=torch.float32))
        self.auxiliary = MomaAuxiliaryRouter(config, num_scores, num_cuts) if config.auxiliary_routers else None

    @property
    def is_frozen(self) -> bool:
        """Whether the router is as it will be: in a frozen group, or of a model under an adapter.

        It then keeps its cuts, so that the model stays as it was saved, and has neither noise nor warm-up.
        """
        return not self.weight.requires_grad

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to `[..., scores]`, in fp32 also under autocast."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float())

    def predicted_scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Probabilities of membership by the auxiliary router, `[..., D]` to `[..., scores]`.

        Raises:
            ValueError: the model has no auxiliary routers.
        """
        if self.auxiliary is None:
            raise ValueError(
                "`routing` or `depth_routing` = 'auxiliary' needs a model with config.auxiliary_routers=True; "
                "scripts/train_auxiliary_routers.py adds and trains them."
            )
        return torch.sigmoid(self.auxiliary(hidden_states))


class MomaRouter(MomaRouterBase):
    """Scores of a group's tokens for its experts (MoMa equation 1), and the choice between them.

    State dict:
        weight           [E, D]  fp32
        threshold        [E]     fp32, running mean of each expert's K-th best score
        balance_bias     [E]     fp32, added to the scores when `token_choice` selects
        num_updates      []      fp32, training steps that the running mean has seen
        auxiliary.       see [`MomaAuxiliaryRouter`], with `config.auxiliary_routers`
    """

    def __init__(self, config: MomaConfig, group: str):
        num_experts = config.group_num_experts(group)
        super().__init__(config, num_scores=num_experts, num_cuts=num_experts, momentum=config.threshold_momentum)
        self.num_experts = num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.capacity_factor = config.group_capacity_factor(group)
        self.gumbel_noise, self.gumbel_noise_steps = config.gumbel_noise, config.gumbel_noise_steps

    def forward(
        self, x_ND: torch.Tensor, context: "RoutingContext"
    ) -> tuple[torch.Tensor, ExpertSelection | PairSelection | GateSelection]:
        """Score the tokens and select.

        Args:
            x_ND (`torch.Tensor`): the group's tokens, `[N, D]`, padding excluded: it must not compete.
            context (`RoutingContext`): the routing of this forward.

        Returns:
            `tuple`: router logits `[N, E]` in fp32, without noise, and the selection.
        """
        logits_NE = self.logits(x_ND)
        noisy_NE = logits_NE
        is_noisy = self.training and not self.is_frozen and self.gumbel_noise > 0 and context.routing in NOISY_ROUTINGS
        if is_noisy:
            noisy_NE = logits_NE + self._noise_scale(context) * context.router_noise(self, logits_NE)
        selection = ROUTINGS[context.routing](self, x_ND, torch.sigmoid(noisy_NE), context)
        if context.track:
            context.record(self, *self._statistics(logits_NE.detach(), selection, is_noisy))
        return logits_NE, selection

    def capacity(self, num_tokens: int) -> int:
        """Tokens `K = ceil(c * N / E)` that one expert takes from `num_tokens`."""
        return min(num_tokens, math.ceil(self.capacity_factor * num_tokens / self.num_experts))

    def _noise_scale(self, context):
        if self.gumbel_noise_steps is None:
            return self.gumbel_noise
        steps_left = self.gumbel_noise_steps - context.router_state(self).num_updates
        return self.gumbel_noise * (steps_left / self.gumbel_noise_steps).clamp(min=0)

    def _statistics(self, logits_NE, selection, is_noisy):
        num_tokens = logits_NE.shape[0]
        if num_tokens == 0:
            zeros_E = logits_NE.new_zeros(self.num_experts)
            return zeros_E, zeros_E, zeros_E
        is_by_rank = isinstance(selection, ExpertSelection)
        if is_by_rank and not is_noisy:
            kth_E = selection.weight_EK[:, -1].detach()
        else:
            # inference cuts scores without noise
            kth_E = torch.sigmoid(logits_NE).t().topk(self.capacity(num_tokens), dim=-1).values[:, -1]
        if is_by_rank:
            load_E = torch.full_like(kth_E, selection.token_EK.shape[1])
        else:
            load_E = nn.functional.one_hot(selection.expert_P, self.num_experts).sum(0).float()
        return kth_E, (load_E.mean() - load_E) / num_tokens, torch.ones_like(kth_E)


def expert_choice(
    router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: "RoutingContext"
) -> ExpertSelection:
    """Each expert takes its top `K` tokens of the batch (MoMa section 2.2). Not causal: for training."""
    weight_EK, token_EK = scores_NE.t().topk(router.capacity(scores_NE.shape[0]), dim=-1)
    return ExpertSelection(token_EK, weight_EK)


def threshold(
    router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: "RoutingContext"
) -> PairSelection | GateSelection:
    """An expert takes a token iff its score reaches the running mean of the expert's K-th best score.

    In the first `routing_warmup_steps` of training it takes its K best tokens of the batch instead.
    """
    state = context.router_state(router)
    is_taken_NE = scores_NE >= state.threshold
    if context.track and router.warmup_steps and not router.is_frozen:
        token_EK = expert_choice(router, x_ND, scores_NE.detach(), context).token_EK
        is_best_EN = torch.zeros_like(is_taken_NE.t()).scatter_(1, token_EK, True)
        is_taken_NE = torch.where(state.num_updates < router.warmup_steps, is_best_EN.t(), is_taken_NE)
    return _select(is_taken_NE, scores_NE, context)


def token_choice(
    router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: "RoutingContext"
) -> PairSelection | GateSelection:
    """Each token takes its best experts; the balance bias selects but does not weigh (arXiv 2408.15664)."""
    num_tokens = scores_NE.shape[0]
    bias_E = context.router_state(router).balance_bias
    expert_Nk = (scores_NE + bias_E).topk(router.num_experts_per_tok, dim=-1).indices
    if context.has_fixed_shapes:
        return _select(torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(1, expert_Nk, True), scores_NE, context)
    token_N = torch.arange(num_tokens, device=scores_NE.device)
    token_P = token_N.repeat_interleave(router.num_experts_per_tok)
    return PairSelection(token_P, expert_Nk.flatten(), scores_NE.gather(1, expert_Nk).flatten())


def auxiliary(
    router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: "RoutingContext"
) -> PairSelection | GateSelection:
    """An expert takes a token iff the auxiliary router predicts so; the weight is the main router's (section 2.4)."""
    return _select(router.predicted_scores(x_ND) >= router.auxiliary.threshold, scores_NE, context)


def _select(is_taken_NE, scores_NE, context):
    if context.has_fixed_shapes:
        return GateSelection(torch.where(is_taken_NE, scores_NE, 0.0))
    token_P, expert_P = is_taken_NE.nonzero(as_tuple=True)
    return PairSelection(token_P, expert_P, scores_NE[token_P, expert_P])


ROUTINGS = {
    "expert_choice": expert_choice,
    "threshold": threshold,
    "token_choice": token_choice,
    "auxiliary": auxiliary,
}
# the others compare scores with cuts that were found without noise
NOISY_ROUTINGS = ("expert_choice", "token_choice")


def logistic_noise_like(logits: torch.Tensor) -> torch.Tensor:
    """Differences of two independent Gumbel samples, `G' - G''` of MoMa equation 5: standard logistic samples."""
    return torch.rand_like(logits).logit(eps=1e-6)


@dataclass
class ModalitySplit:
    """Which positions of a batch go to which expert group, computed once per forward and shared by all layers.

    Attributes:
        counts (`dict[str, int]`): tokens of each group.
        order (`torch.LongTensor`, *optional*): flat positions `[B * T]`, group by group, padding last. `None` when all
            positions belong to one group.
        inverse (`torch.LongTensor`, *optional*): the place of each position in `order`.
        group_BT (`torch.LongTensor`): index of each position's group, the number of groups at padding, `[B, T]`.
    """

    counts: dict[str, int]
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    group_BT: torch.Tensor

    @classmethod
    def from_groups(cls, group_BT: torch.Tensor, counts: dict[str, int]) -> "ModalitySplit":
        """Lay out positions whose numbers in each group are known to the host, so that nothing waits."""
        group_flat = group_BT.flatten()
        if len(counts) == 1 and sum(counts.values()) == group_flat.shape[0]:
            return cls(counts, None, None, group_BT)
        order = torch.argsort(group_flat, stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        return cls(counts, order, inverse, group_BT)

    def split(self, hidden_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gather `[B, T, D]` into the groups' tokens, `[N, D]` each."""
        flat = hidden_BTD.flatten(0, 1)
        if self.order is None:
            return dict.fromkeys(self.counts, flat)
        num_tokens = sum(self.counts.values())
        # index_select, whose backward is much cheaper than that of indexing on CPU
        groups = flat.index_select(0, self.order[:num_tokens]).split(list(self.counts.values()))
        return dict(zip(self.counts, groups))

    def merge(self, groups: dict[str, torch.Tensor], like_BTD: torch.Tensor) -> torch.Tensor:
        """Put the groups' outputs `[N, ...]` back in place, `[B, T, ...]`; padding gets zeros."""
        parts = [groups[name] for name in self.counts]
        if self.order is None:
            return parts[0].unflatten(0, like_BTD.shape[:2])
        num_padding = self.order.shape[0] - sum(self.counts.values())
        if num_padding:
            parts.append(parts[0].new_zeros(num_padding, *parts[0].shape[1:]))
        return torch.cat(parts).index_select(0, self.inverse).unflatten(0, like_BTD.shape[:2])


@dataclass
class FixedSplit:
    """A split whose shapes do not depend on the tokens: every group gets every position, and gives up the others'.

    For steps of one token, where a wait on the device for the numbers would cost more than the surplus work, and where
    `torch.compile` needs every step to look alike.

    Attributes:
        groups (`list[str]`): names of the groups.
        group_BT (`torch.LongTensor`): index of each position's group, the number of groups at padding, `[B, T]`.
    """

    groups: list[str]
    group_BT: torch.Tensor

    def __post_init__(self):
        # all layers ask for these
        self._is_member_N = [self.group_BT.flatten() == index for index in range(len(self.groups))]

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
    """Modality of each token id: 0 is text, then the order of `config.modality_token_ranges`."""
    modality = torch.zeros_like(input_ids)
    for index, ranges in enumerate(config.modality_token_ranges.values(), start=1):
        for start, stop in ranges:
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
    if masked_B is None:
        masked_B = torch.zeros_like(group_flat[:1], dtype=torch.bool)
    # the last two are the number of masked rows and the first of them
    bounds = torch.stack([checked.min(), checked.max(), masked_B.sum(), masked_B.int().argmax()])
    counts = torch.stack([(group_flat == index).sum() for index in range(len(groups) + 1)])
    low, high, num_masked, first_masked, *counts = torch.cat([bounds, counts]).tolist()
    _check_bounds(config, low, high, input_ids is not None)
    if num_masked:
        raise ValueError(
            f"`attention_mask` is 0 in all of row {first_masked}: a row needs at least one token. Is its text empty, "
            "or was the mask inverted?"
        )
    return ModalitySplit.from_groups(group_BT, dict(zip(groups, counts)))


def _check_bounds(config, low, high, are_ids):
    if are_ids and (low < 0 or high >= config.vocab_size):
        bad = low if low < 0 else high
        raise IndexError(
            f"`input_ids` holds the id {bad}, outside the vocabulary of {config.vocab_size}. Was the tokenizer given "
            "tokens that the model does not have (see `resize_token_embeddings`), or -100 of the labels?"
        )
    if not are_ids and (low < 0 or high >= len(config.modalities)):
        raise ValueError(
            f"`mm_token_type_ids` holds {low if low < 0 else high}; the modalities are "
            f"{dict(enumerate(config.modalities))}."
        )


def is_distributed() -> bool:
    """Whether other processes take part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class RouterState(NamedTuple):
    """What a router selects with: its buffers, as they were when the forward met it."""

    threshold: torch.Tensor
    balance_bias: torch.Tensor
    num_updates: torch.Tensor


@dataclass
class RoutingContext:
    """What one forward of the model tells all its layers, and what their routers leave behind.

    Attributes:
        routing (`str`): a name of `ROUTINGS`, for experts.
        split (`ModalitySplit` or `FixedSplit`): positions of each group.
        track (`bool`): whether routers record statistics (in training).
        depth_routing (`str`, *optional*): a name of `ROUTINGS`, for depth layers.
        modality_BT (`torch.LongTensor`, *optional*): modality of each position, `[B, T]`.
        padding_BT (`torch.BoolTensor`, *optional*): True where a position is padding, `[B, T]`.
        document_BT (`torch.LongTensor`, *optional*): document of each position in packed rows, `[B, T]`.
        custom_mask_BHQS (`torch.Tensor`, *optional*): the caller's own attention mask, as it came.
        statistics (`dict`): K-th best scores, shortfalls of load and votes, by router. Recomputation under
            activation checkpointing writes the same entry again, so a step counts once.
        state (`dict`): [`RouterState`] by router.
        noise (`dict`): the noise that each router drew, before it is scaled.
    """

    routing: str
    split: ModalitySplit | FixedSplit
    track: bool = False
    depth_routing: str | None = None
    modality_BT: torch.Tensor | None = None
    padding_BT: torch.Tensor | None = None
    document_BT: torch.Tensor | None = None
    custom_mask_BHQS: torch.Tensor | None = None
    statistics: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)
    noise: dict = field(default_factory=dict)

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether no shape may depend on who chooses whom."""
        return isinstance(self.split, FixedSplit)

    def router_state(self, router: MomaRouterBase) -> RouterState:
        """Buffers to select with.

        In training they are kept from the forward: recomputation under activation checkpointing comes after
        `update_routers` and has to select the same tokens again.
        """
        buffers = (router.threshold, router.balance_bias, router.num_updates)
        if not self.track:
            return RouterState(*buffers)
        if router not in self.state:
            self.state[router] = RouterState(*(buffer.clone() for buffer in buffers))
        return self.state[router]

    def router_noise(self, router: MomaRouterBase, logits: torch.Tensor) -> torch.Tensor:
        """Noise for a router's logits, drawn once: recomputation may come with another state of the generator."""
        if router not in self.noise:
            self.noise[router] = logistic_noise_like(logits)
        return self.noise[router]

    def record(self, router: MomaRouterBase, kth_C: torch.Tensor, shortfall_C: torch.Tensor, votes_C: torch.Tensor):
        """Keep what `update_routers` needs of one router's step, for each of its `C` cuts.

        Args:
            router (`MomaRouterBase`): whose.
            kth_C (`torch.Tensor`): the K-th best score.
            shortfall_C (`torch.Tensor`): by how much the load lags behind its target, as a share of the tokens.
            votes_C (`torch.Tensor`): 1, or 0 where this process had no token to judge by.
        """
        self.statistics[router] = (kth_C, shortfall_C, votes_C)


@torch.no_grad()
def update_routers(context: RoutingContext, bias_update_rate: float):
    """Move thresholds and balance biases after a training step, averaged over all processes in one collective.

    A process without tokens of a group has no say in that group's average.
    """
    statistics = {router: record for router, record in context.statistics.items() if not router.is_frozen}
    if not statistics:
        return
    routers = list(statistics)
    device = routers[0].weight.device
    rows = []
    for kth_C, shortfall_C, votes_C in statistics.values():
        rows += [(kth_C * votes_C).to(device), (shortfall_C * votes_C).to(device), votes_C.to(device)]
    flat = torch.cat(rows)
    if is_distributed():
        dist.all_reduce(flat)
    pieces = iter(flat.split([row.shape[0] for row in rows]))
    for router, kth_C, shortfall_C, votes_C in zip(routers, pieces, pieces, pieces):
        has_vote_C = votes_C > 0
        votes_C = votes_C.clamp(min=1)
        kth_C, shortfall_C = kth_C / votes_C, shortfall_C / votes_C
        # the plain mean until it has seen enough steps, so that no start value lingers
        decay = (router.num_updates / (router.num_updates + 1)).clamp(max=router.momentum)
        router.threshold.copy_(
            torch.where(has_vote_C, decay * router.threshold + (1 - decay) * kth_C, router.threshold)
        )
        router.num_updates.add_((has_vote_C if router.num_updates.ndim else has_vote_C[0]).float())
        routing = context.routing if isinstance(router, MomaRouter) else context.depth_routing
        if routing == "token_choice":
            step_C = bias_update_rate * torch.sign(shortfall_C)
            router.balance_bias.copy_(torch.where(has_vote_C, router.balance_bias + step_C, router.balance_bias))
