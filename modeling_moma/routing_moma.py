# SPDX-License-Identifier: Apache-2.0
"""How experts and tokens choose one another: scores of a router, and a rule that makes a selection of them.

From top to bottom: what a selection is, the capacity and the threshold of an expert, the routers, the rules (each one
function under `@routing_rule`), and what a training step moves in the routers.

Shape suffixes:
    D hidden size, N tokens of one group in the batch, E experts of the group, K tokens that one expert takes,
    k experts that one token takes, P (token, expert) pairs, C thresholds of a router (one for each expert, or for each
    pool of a depth router), M modalities.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_moma import RULES, MomaConfig, RoutingRule, rule_of
from .errors_moma import InputError
from .token_groups_moma import RouterState, RouterStatistics, RoutingContext, is_distributed


@dataclass
class Selection:
    """(Token, expert) pairs.

    Attributes:
        token_P (`torch.LongTensor`):
            positions in the group's tokens, `[P]`. A token may come several times or never.
        expert (`torch.LongTensor`):
            the expert of each pair, `[P]`, or where every expert takes as many tokens as the others `[E, K]`, which
            then may be a view of `[E, 1]`.
        weight_P (`torch.Tensor`):
            gates, fp32, `[P]`.
        shape_EK (`tuple[int, int]`, *optional*):
            where every expert takes as many tokens as the others; the pairs then come expert by expert.
        has_padding (`bool`):
            whether pairs of weight 0 stand for tokens that their expert does not take, so that no shape depends on who
            chose whom.
        is_sorted (`bool`):
            whether the pairs come expert by expert.
        ends_E (`torch.IntTensor`, *optional*):
            where each expert's pairs end where that is known to the device alone, `[E]`; later pairs are padding.
    """

    token_P: torch.Tensor
    expert: torch.Tensor
    weight_P: torch.Tensor
    shape_EK: Any = None
    has_padding: bool = False
    is_sorted: bool = False
    ends_E: torch.Tensor | None = None

    @classmethod
    def from_topk(cls, token_EK: torch.Tensor, weight_EK: torch.Tensor, has_padding: bool = False) -> "Selection":
        """Select the same number of tokens for every expert."""
        num_experts, num_taken = token_EK.shape
        expert_EK = torch.arange(num_experts, device=token_EK.device).unsqueeze(-1).expand(-1, num_taken)
        return cls(token_EK.flatten(), expert_EK, weight_EK.flatten(), (num_experts, num_taken), has_padding, True)

    @classmethod
    def from_mask(
        cls, is_taken_NE: torch.Tensor, scores_NE: torch.Tensor, has_fixed_shapes: bool, allow_host_sync: bool = True
    ) -> "Selection":
        """Return the pairs that a mask names, weighed by their scores."""
        if has_fixed_shapes:
            token_EN = torch.arange(scores_NE.shape[0], device=scores_NE.device).expand(scores_NE.shape[1], -1)
            return cls.from_topk(token_EN, torch.where(is_taken_NE, scores_NE, 0.0).t(), has_padding=True)
        if not allow_host_sync:
            return cls._from_all_pairs(is_taken_NE, scores_NE)
        # sorted by expert, as matmuls want them
        expert_P, token_P = is_taken_NE.t().nonzero(as_tuple=True)
        # one flat index per pair: on CPU its gradient is cheaper than that of two indices
        weight_P = scores_NE.flatten().index_select(0, torch.add(expert_P, token_P, alpha=scores_NE.shape[1]))
        return cls(token_P, expert_P, weight_P, is_sorted=True)

    @classmethod
    def _from_all_pairs(cls, is_taken_NE: torch.Tensor, scores_NE: torch.Tensor) -> "Selection":
        num_tokens = scores_NE.shape[0]
        is_taken_P = is_taken_NE.t().flatten()
        order_P = (~is_taken_P).byte().argsort(stable=True)
        weight_P = torch.where(is_taken_P, scores_NE.t().flatten(), 0.0).index_select(0, order_P)
        ends_E = is_taken_NE.sum(0).cumsum(0).int()
        # a group without a token has an empty index
        size = max(num_tokens, 1)
        return cls(order_P % size, order_P // size, weight_P, has_padding=True, is_sorted=True, ends_E=ends_E)

    def normalized(self, num_tokens: int) -> "Selection":
        """Return gates over the detached sum of their token's, for `config.normalize_gates`."""
        weight_P = self.weight_P.detach()
        total_N = weight_P.new_zeros(num_tokens).index_add(0, self.token_P, weight_P)
        total_P = total_N.clamp(min=torch.finfo(total_N.dtype).tiny).index_select(0, self.token_P)
        return replace(self, weight_P=self.weight_P / total_P)

    def dispatch(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Return a row for each pair, `[N, D]` to `[P, D]`."""
        return x_ND.index_select(0, self.token_P)

    def combine(self, y_PD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Add the weighted outputs of each token's pairs."""
        if self.has_padding:
            # an expert without a token may overflow in half precision, and infinity times 0 is NaN
            y_PD = y_PD.masked_fill(self.weight_P.unsqueeze(-1) <= 0, 0.0)
        return y_PD.new_zeros(num_tokens, y_PD.shape[1]).index_add_(0, self.token_P, y_PD)

    def gates(self, num_tokens: int) -> torch.Tensor:
        """Return the sum of each token's gates, `[N]`."""
        return self.weight_P.new_zeros(num_tokens).index_add(0, self.token_P, self.weight_P)

    def hints(self) -> dict[str, Any]:
        """Return what an experts implementation may know of the pairs, if it takes hints."""
        if self.shape_EK is not None:
            return {"num_taken": self.shape_EK[1]}
        return {"is_sorted": self.is_sorted, "ends_E": self.ends_E}

    @property
    def expert_P(self) -> torch.Tensor:
        """The expert of each pair, `[P]`."""
        return self.expert.flatten()

    @property
    def token_EK(self) -> torch.Tensor:
        """The tokens of each expert where all choose `K`, `[E, K]`."""
        return self.token_P.view(self.shape_EK)

    @property
    def weight_EK(self) -> torch.Tensor:
        """The gates of each expert where all choose `K` tokens, `[E, K]`."""
        return self.weight_P.view(self.shape_EK)


# shares are written by hand: 0.55 means 11 / 20, not the binary number next to it, whose ceiling may be higher
_LARGEST_DENOMINATOR = 10**6

Count = TypeVar("Count")


# those that are known: fractions would break a compiled graph
_EXACT_SHARES: dict[tuple[float, int], tuple[int, int]] = {}


def exact_share(share: float, parts: int = 1) -> tuple[int, int]:
    """Return numerator and denominator of `share / parts`, for [`ceil_share`]."""
    key = (share, parts)
    if key not in _EXACT_SHARES:
        # a share of nothing would take no token where it takes one at least
        exact = max(Fraction(1, _LARGEST_DENOMINATOR), Fraction(share).limit_denominator(_LARGEST_DENOMINATOR)) / parts
        _EXACT_SHARES[key] = exact.numerator, exact.denominator
    return _EXACT_SHARES[key]


def ceil_share(share: Iterable[Any], count: Count) -> Count:
    """Return `ceil(share * count)`, for integers or for integer tensors."""
    numerator, denominator = share
    return -(-numerator * count // denominator)


# scores that differ by less, relatively, are taken for one score that was rounded in two ways
_ROUNDING = 2.0**-18
# relative distance of a threshold below the lowest score, where all tokens are taken
_MARGIN = 2.0**-10


def batch_thresholds(scores_CN: torch.Tensor, kth_C: torch.Tensor) -> torch.Tensor:
    """Return the thresholds of one batch."""
    return midpoints(kth_C, lower_scores(scores_CN, kth_C.unsqueeze(-1)).amax(-1))


def lower_scores(scores: torch.Tensor, kth: torch.Tensor) -> torch.Tensor:
    """Return the scores lower than the K-th best by more than rounding, and what is no number; -1 elsewhere."""
    # so that the threshold of such scores is no number either
    return torch.where(scores >= kth * (1 - _ROUNDING), -1.0, scores)


def midpoints(kth_C: torch.Tensor, next_best_C: torch.Tensor) -> torch.Tensor:
    """Return midway between the K-th best scores and the next lower ones."""
    return torch.where(next_best_C < 0, kth_C * (1 - _MARGIN), (kth_C + next_best_C) / 2)


class Fp32Buffers(nn.Module):
    """For modules whose thresholds, counters or frequencies `model.bfloat16()` and the like must not round."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def widen_buffers(self):
        """Give buffers back the type that `buffer_dtype` of FSDP1 has taken from them, past `_apply`.

        The values of that moment are rounded; what is added to them later is not lost.
        """
        for buffer in self.buffers(recurse=False):
            if buffer.dtype != torch.float32:
                buffer.data = buffer.float()


class Fp32Linear(nn.Linear):
    """A linear layer that multiplies in fp32, whatever type its weights were given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[..., in_features]` to `[..., out_features]`, in fp32 also under autocast."""
        with maybe_autocast(x.device.type, enabled=False):
            return nn.functional.linear(x.float(), self.weight.float())


class MomaAuxiliaryRouter(Fp32Buffers):
    """Predicts membership in a router's top K: `Sigmoid(SiLU(x W_1) W_2)` (MoMa section 2.4, equations 3 and 4).

    It decides whether an expert or a depth layer runs; with what weight is the main router's business. Its parameters
    are frozen until [`AuxiliaryRouterTrainer`] trains them, so that the main training neither moves nor misses them.
    Thresholds are compared with fp32 probabilities, which are all 1 for logits above about 17: tokens that tie there
    are taken or left together.

    State dict:
        up_proj.weight    [D // 2, D]       fp32
        down_proj.weight  [scores, D // 2]  fp32
        threshold         [C]              fp32, least probability to be taken: 0.5 (the paper's) until calibrated
    """

    def __init__(self, config: MomaConfig, num_scores: int, num_thresholds: int):
        super().__init__()
        inner_size = config.hidden_size // 2
        self.up_proj = Fp32Linear(config.hidden_size, inner_size, bias=False, dtype=torch.float32)
        self.down_proj = Fp32Linear(inner_size, num_scores, bias=False, dtype=torch.float32)
        self.threshold = nn.Buffer(torch.full((num_thresholds,), 0.5, dtype=torch.float32))
        self.requires_grad_(False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits of membership, `[..., D]` to `[..., scores]`, in fp32 also under autocast."""
        # modules are called, and not their weights used, so that what gathers split weights sees the call
        return self.down_proj(nn.functional.silu(self.up_proj(hidden_states)))


class MomaRouterBase(Fp32Buffers):
    """Sigmoid scores, and the state that lets a router choose without looking at other tokens.

    A score is the sigmoid of a projection, so it depends on its token alone. It is computed in fp32, whatever type the
    weights were given: bf16 sigmoids tie, and a tie changes who is chosen.
    """

    # `None` in a model that has none
    auxiliary: Any

    def __init__(
        self,
        config: MomaConfig,
        num_scores: int,
        num_thresholds: int,
        updates_shape: tuple[int, ...] = (),
    ):
        super().__init__()
        # fields that change no weight may be changed in the model's configuration at any time
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_scores, config.hidden_size, dtype=torch.float32))
        # an untrained router scores about 0.5
        self.threshold = nn.Buffer(torch.full((num_thresholds,), 0.5, dtype=torch.float32))
        self.balance_bias = nn.Buffer(torch.zeros(num_thresholds, dtype=torch.float32))
        self.num_updates = nn.Buffer(torch.zeros(updates_shape, dtype=torch.float32))
        self.auxiliary = MomaAuxiliaryRouter(config, num_scores, num_thresholds) if config.auxiliary_routers else None

    @property
    def momentum(self) -> float:
        """Momentum of the thresholds' running mean."""
        return self.config.threshold_momentum

    @property
    def warmup_steps(self) -> int:
        """Training steps in which `threshold` takes the best of the batch."""
        return self.config.routing_warmup_steps

    @property
    def is_frozen(self) -> bool:
        """Whether the router is as it will be: in a frozen group, or of a model under an adapter.

        It then keeps its thresholds, so that the model stays as it was saved, and has neither noise nor warm-up.
        """
        return not self.weight.requires_grad

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if not memo:
            # a copy of a router alone, as PEFT's of `modules_to_save`, takes its place in the same model
            memo[id(self.config)] = self.config
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `[..., D]` to `[..., scores]`, in fp32 also under autocast."""
        self.widen_buffers()
        if self.auxiliary is not None:
            self.auxiliary.widen_buffers()
        with maybe_autocast(hidden_states.device.type, enabled=False):
            return nn.functional.linear(hidden_states.float(), self.weight.float())

    def predicted_scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the probabilities of membership by the auxiliary router, `[..., D]` to `[..., scores]`."""
        if self.auxiliary is None:
            raise InputError(
                "`routing` or `depth_routing` = 'auxiliary' needs a model with config.auxiliary_routers=True; "
                "`moma train-auxiliary-routers` adds and trains them."
            )
        return torch.sigmoid(self.auxiliary(hidden_states))


class MomaRouter(MomaRouterBase):
    """Scores of a group's tokens for its experts (MoMa equation 1), and the choice between them.

    State dict:
        weight           [E, D]  fp32
        threshold        [E]     fp32, running mean of each expert's threshold, see [`batch_thresholds`]
        balance_bias     [E]     fp32, added to the scores when `token_choice` selects; with
                                 `config.balance_bias_by_modality` [M, E], one for each modality
        num_updates      []      fp32, training forwards that the running mean has seen
        auxiliary.       see [`MomaAuxiliaryRouter`], with `config.auxiliary_routers`
    """

    def __init__(self, config: MomaConfig, group: str):
        num_experts = config.group_num_experts(group)
        super().__init__(config, num_scores=num_experts, num_thresholds=num_experts)
        if config.balance_bias_by_modality:
            self.balance_bias = nn.Buffer(torch.zeros(len(config.modalities), num_experts, dtype=torch.float32))
        self.group, self.num_experts = group, num_experts
        # known before a graph is compiled
        exact_share(self.capacity_factor, num_experts)

    @property
    def capacity_factor(self) -> float:
        """Experts that a token meets in the mean where experts choose."""
        return self.config.group_capacity_factor(self.group)

    @property
    def capacity_fraction(self) -> tuple[int, int]:
        """Share of the group's tokens that an expert takes, numerator and denominator."""
        return exact_share(self.capacity_factor, self.num_experts)

    @property
    def num_experts_per_tok(self) -> int:
        """Experts that a rule which counts them gives each token."""
        return self.config.num_experts_per_tok

    @property
    def normalizes_gates(self) -> bool:
        """Whether a token's gates are divided by their sum."""
        return self.config.normalize_gates

    def forward(self, x_ND: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, Selection]:
        """Score the tokens and select."""
        logits_NE = self.logits(x_ND)
        noisy_NE = logits_NE
        rule = rule_of(context.routing)
        is_noisy = self.training and not self.is_frozen and self.config.gumbel_noise > 0 and rule.takes_noise
        if is_noisy:
            noisy_NE = logits_NE + self._noise_scale(context) * context.router_noise(self, logits_NE)
        scores_NE = torch.sigmoid(noisy_NE)
        selection = rule.select(self, x_ND, scores_NE, context)
        if context.track:
            # inference compares scores without noise
            plain_NE = torch.sigmoid(logits_NE.detach()) if is_noisy else scores_NE.detach()
            statistics = self._statistics(plain_NE, selection, is_noisy, rule.moves_bias, context)
            context.step_of(self).statistics = statistics
        return logits_NE, selection

    def capacity(self, num_tokens: int) -> int:
        """Return the tokens `K = ceil(c * N / E)` that one expert takes from `num_tokens`."""
        return min(num_tokens, ceil_share(self.capacity_fraction, num_tokens))

    def _noise_scale(self, context: RoutingContext) -> float | torch.Tensor:
        scale, num_steps = self.config.gumbel_noise, self.config.gumbel_noise_steps
        if num_steps is None:
            return scale
        steps_left = num_steps - context.router_state(self).num_updates
        return scale * (steps_left / num_steps).clamp(min=0)

    def _statistics(
        self,
        scores_NE: torch.Tensor,
        selection: Selection,
        is_noisy: bool,
        moves_bias: bool,
        context: RoutingContext,
    ) -> RouterStatistics:
        num_tokens = scores_NE.shape[0]
        if num_tokens == 0:
            zeros_E = scores_NE.new_zeros(self.num_experts)
            return RouterStatistics(
                zeros_E, zeros_E, torch.zeros_like(self.balance_bias) if moves_bias else None, zeros_E
            )
        scores_EN = scores_NE.t()
        is_topk = selection.shape_EK is not None and not selection.has_padding
        if is_topk and not is_noisy:
            kth_E = selection.weight_EK[:, -1].detach()
        else:
            kth_E = scores_EN.topk(self.capacity(num_tokens), dim=-1).values[:, -1]
        lower_E = lower_scores(scores_EN, kth_E.unsqueeze(-1)).amax(-1)
        if not moves_bias:
            return RouterStatistics(kth_E, lower_E)
        return RouterStatistics(kth_E, lower_E, self._load_deficit(selection, num_tokens, context))

    def _load_deficit(self, selection: Selection, num_tokens: int, context: RoutingContext) -> torch.Tensor:
        """Return by how much each expert's load lags behind the mean, as a share of the tokens, `[E]`.

        With `config.balance_bias_by_modality` those of each modality, `[M, E]`.
        """
        weight_P = selection.weight_P.detach()
        is_taken_P = (weight_P > 0).float() if selection.has_padding else torch.ones_like(weight_P)
        if self.balance_bias.ndim == 1:
            load_E = weight_P.new_zeros(self.num_experts).index_add(0, selection.expert_P, is_taken_P)
            return (load_E.mean() - load_E) / num_tokens
        modality_N = context.modality_N
        place_P = modality_N.index_select(0, selection.token_P) * self.num_experts + selection.expert_P
        load_ME = torch.zeros_like(self.balance_bias).flatten().index_add(0, place_P, is_taken_P)
        load_ME = load_ME.view_as(self.balance_bias)
        # a modality without a token has no load and moves no bias
        count_M = torch.zeros_like(load_ME[:, 0]).index_add(0, modality_N, torch.ones_like(modality_N).to(load_ME))
        return (load_ME.mean(1, keepdim=True) - load_ME) / count_M.clamp(min=1).unsqueeze(-1)


SelectionFunction = Callable[[MomaRouter, torch.Tensor, torch.Tensor, RoutingContext], Selection]


def routing_rule(name: str, **properties: Any) -> Callable[[SelectionFunction], SelectionFunction]:
    """Enter a rule of routing with its function for experts.

    The function is called with the [`MomaRouter`], its tokens `[N, D]`, their scores `[N, E]` and the context, and
    gives a [`Selection`]. Configuration, costs and calibration read the record.
    """

    def enter(function: SelectionFunction) -> SelectionFunction:
        RULES[name] = RoutingRule(name, function, **properties)
        return function

    return enter


@routing_rule("expert_choice", is_causal=False, may_train=True, takes_noise=True)
def expert_choice(
    router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext
) -> Selection:
    """Select each expert's top `K` tokens of the batch (MoMa section 2.2). Not causal: for training."""
    weight_EK, token_EK = scores_NE.t().topk(router.capacity(scores_NE.shape[0]), dim=-1)
    return Selection.from_topk(token_EK, weight_EK)


@routing_rule("threshold", is_causal=True, may_train=True, reads_threshold=True)
def threshold(router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext) -> Selection:
    """Select a token iff its score reaches the running mean of the expert's thresholds.

    They part the expert's K best from the others, see [`batch_thresholds`].

    In the first `routing_warmup_steps` forwards of training an expert takes its K best tokens of the batch instead.
    """
    is_taken_NE = scores_NE >= context.router_state(router).threshold
    if context.track and router.warmup_steps and not router.is_frozen:
        num_updates = context.router_state(router).num_updates
        best = expert_choice(router, x_ND, scores_NE.detach(), context)
        is_best_EN = torch.zeros_like(is_taken_NE.t()).scatter_(1, best.token_EK, True)
        is_taken_NE = torch.where(num_updates < router.warmup_steps, is_best_EN.t(), is_taken_NE)
    return Selection.from_mask(is_taken_NE, scores_NE, context.has_fixed_shapes, context.allow_host_sync)


@routing_rule("token_choice", is_causal=True, may_train=True, takes_noise=True, moves_bias=True, counts_experts=True)
def token_choice(
    router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext
) -> Selection:
    """Select each token's best experts; the balance bias selects but does not weigh (arXiv 2408.15664)."""
    bias = context.router_state(router).balance_bias
    if bias.ndim == 2:
        # of each token's modality
        bias = bias.index_select(0, context.modality_N)
    expert_Nk = (scores_NE + bias).topk(router.num_experts_per_tok, dim=-1).indices
    if context.has_fixed_shapes:
        is_taken_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(1, expert_Nk, True)
        return Selection.from_mask(is_taken_NE, scores_NE, context.has_fixed_shapes, context.allow_host_sync)
    expert_P, order_P = expert_Nk.flatten().sort(stable=True)
    weight_P = scores_NE.gather(1, expert_Nk).flatten().index_select(0, order_P)
    return Selection(order_P // router.num_experts_per_tok, expert_P, weight_P, is_sorted=True)


@routing_rule("auxiliary", is_causal=True, may_train=False, needs_auxiliary=True)
def auxiliary(router: MomaRouter, x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext) -> Selection:
    """Select a token iff the auxiliary router predicts so, weighed by the main router (section 2.4)."""
    is_taken_NE = router.predicted_scores(x_ND) >= router.auxiliary.threshold
    return Selection.from_mask(is_taken_NE, scores_NE, context.has_fixed_shapes, context.allow_host_sync)


def update_routers(context: RoutingContext, bias_update_rate: float):
    """Move thresholds and balance biases after a training forward, averaged over all processes in one collective.

    A process without tokens of a group does not count in that group's average, and neither does one with scores that
    are no numbers: the step that had them may be skipped, and a threshold would stay what it has become.
    """
    kinds: dict[Any, list[tuple[MomaRouterBase, RouterStatistics]]] = {}
    for router, step in context.steps.items():
        if step.statistics is not None and not router.is_frozen:
            routing = context.routing if isinstance(router, MomaRouter) else context.depth_routing
            kind = RULES[routing].moves_bias, isinstance(router, MomaRouter), router.momentum, router.threshold.device
            kinds.setdefault(kind, []).append((router, step.statistics))
    # not as a decorator: a compiler leaves functions alone that name nothing of torch
    with torch.no_grad():
        stacks = [RouterStack.of(pairs, moves_bias=kind[0]) for kind, pairs in kinds.items()]
        if is_distributed() and stacks:
            _average_over_processes(stacks)
        for stack in stacks:
            stack.update(context.states, bias_update_rate)


@dataclass
class RouterStack:
    """The routers of one kind on one device, which move together: every operation is one launch for all of them.

    Attributes:
        routers (`list[MomaRouterBase]`):
            one after the other, with `S` thresholds in all.
        threshold_S (`torch.Tensor`):
            of this batch alone; of no meaning where the count is 0.
        load_deficit_S (`torch.Tensor`, *optional*):
            see [`RouterStatistics`], `[S]` or `[M, S]`.
        count_S (`torch.Tensor`):
            processes that had tokens to judge by, and finite scores.
    """

    routers: list[MomaRouterBase]
    threshold_S: torch.Tensor
    load_deficit_S: torch.Tensor | None
    count_S: torch.Tensor

    @classmethod
    def of(cls, pairs: list[tuple[MomaRouterBase, RouterStatistics]], moves_bias: bool) -> "RouterStack":
        """Stack what the routers saw; load deficits only where biases move. No count is left to what is no number."""
        kth_S = torch.cat([each.kth_C for _, each in pairs])
        lower_S = torch.cat([each.next_best_C for _, each in pairs])
        deficits: Any = [each.load_deficit_C for _, each in pairs]
        sizes = [each.kth_C.shape[0] for _, each in pairs]
        ones_C = kth_S.new_ones(max(sizes))
        counts = [ones_C[:size] if each.count_C is None else each.count_C for size, (_, each) in zip(sizes, pairs)]
        threshold_S = midpoints(kth_S, lower_S)
        return cls(
            [router for router, _ in pairs],
            threshold_S,
            torch.cat(deficits, dim=-1) if moves_bias else None,
            # only what is no number is not 0 or more, where there are tokens
            torch.cat(counts) * (threshold_S >= 0),
        )

    def update(self, states: dict[Any, RouterState], bias_update_rate: float) -> None:
        """Move the routers' buffers, and keep in `states` what they were."""
        routers = self.routers
        sizes = [router.threshold.shape[0] for router in routers]
        before_S = torch.cat([router.threshold for router in routers])
        bias_S = torch.cat([router.balance_bias for router in routers], dim=-1)
        updates_S = torch.cat([router.num_updates.expand(size) for router, size in zip(routers, sizes)])
        old = [part.split(sizes, dim=-1) for part in (before_S, bias_S)]
        states.update(zip(routers, map(RouterState, *old, self._counters(updates_S, sizes))))
        has_count_S = self.count_S > 0
        # the plain mean until it has seen enough steps, so that no start value lingers
        decay_S = (updates_S / (updates_S + 1)).clamp(max=routers[0].momentum)
        mean_S = decay_S * before_S + (1 - decay_S) * self.threshold_S
        threshold_S = torch.where(has_count_S, mean_S, before_S)
        torch._foreach_copy_([router.threshold for router in routers], list(threshold_S.split(sizes)))
        counters = self._counters(updates_S + has_count_S, sizes)
        torch._foreach_copy_([router.num_updates for router in routers], counters)
        if self.load_deficit_S is not None:
            step_S = bias_update_rate * torch.sign(self.load_deficit_S)
            bias_S = torch.where(has_count_S, bias_S + step_S, bias_S)
            torch._foreach_copy_([router.balance_bias for router in routers], list(bias_S.split(sizes, dim=-1)))

    def _counters(self, updates_S: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        """Return each router's own, of the shape of its `num_updates`."""
        parts = updates_S.split(sizes)
        return [part if router.num_updates.ndim else part[0] for router, part in zip(self.routers, parts)]


def _average_over_processes(stacks: list[RouterStack]) -> None:
    """Average in one collective, whatever devices the routers are on; each gets its own back where it is."""
    device = stacks[0].count_S.device
    rows = []
    for stack in stacks:
        figures = (stack.threshold_S, stack.load_deficit_S)
        # a product with 0 would keep what is no number
        parts = [torch.where(stack.count_S > 0, row_S * stack.count_S, 0.0) for row_S in figures if row_S is not None]
        rows += [*parts, stack.count_S]
    flat = torch.cat([row.to(device).flatten() for row in rows])
    dist.all_reduce(flat)
    pieces = (part.view_as(row) for part, row in zip(flat.split([row.numel() for row in rows]), rows))
    for stack in stacks:
        threshold_S = next(pieces)
        load_deficit_S = None if stack.load_deficit_S is None else next(pieces)
        count_S = next(pieces)
        divisor_S, here = count_S.clamp(min=1), stack.count_S.device
        stack.threshold_S = (threshold_S / divisor_S).to(here)
        stack.load_deficit_S = None if load_deficit_S is None else (load_deficit_S / divisor_S).to(here)
        stack.count_S = count_S.to(here)
