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
"""Thresholds computed from a few batches, and how well causal rules hit the top K that they stand for.

Shape suffixes:
    N tokens that compete for a router (one group's, or a depth layer's), padding excluded, D hidden size,
    S scores of a token (one for each expert; one of a depth router),
    C cuts of a router (one for each expert, or for each pool of a depth router).
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.utils import logging

from .depth_moma import MomaDepthRouter
from .routing_context_moma import RoutingContext, is_distributed
from .routing_moma import MomaRouter, MomaRouterBase
from .routing_rules_moma import RULES


logger = logging.get_logger(__name__)


@dataclass
class RouterRecord:
    """What one router saw in one forward, and whom its top K would hold.

    Attributes:
        name (`str`): of the router among the model's modules.
        router (`MomaRouterBase`): itself.
        hidden_ND (`torch.Tensor`): its input, detached, `[N, D]`.
        scores_NS (`torch.Tensor`): noise-free scores, fp32, `[N, S]`.
        is_member_NS (`torch.BoolTensor`): membership in the top K, `[N, S]`.
        cut_NS (`torch.LongTensor`): which of the `C` cuts decides, `[N, S]`.
        kth_C (`torch.Tensor`): K-th best score as training would record it, `[C]`.
        votes_C (`torch.Tensor`): 1, or 0 where there was no token to judge by, `[C]`.
    """

    name: str
    router: MomaRouterBase
    hidden_ND: torch.Tensor
    scores_NS: torch.Tensor
    is_member_NS: torch.Tensor
    cut_NS: torch.Tensor
    kth_C: torch.Tensor
    votes_C: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, name: str, router: MomaRouterBase, hidden: torch.Tensor, context: RoutingContext) -> "RouterRecord":
        """Let a router in eval mode choose its top K of the tokens it was called with, whatever the routing was."""
        # a context of its own, so that the model does not learn of the statistics
        oracle = context.with_routing("expert_choice", track=True)
        logits, selection = router.forward(hidden, oracle)
        kth_C, _, votes_C = oracle.statistics[router]
        scores, hidden = torch.sigmoid(logits), hidden.detach()
        if isinstance(router, MomaRouter):
            is_member_NS = torch.zeros_like(scores.t(), dtype=torch.bool).scatter_(1, selection.token_EK, True).t()
            cut_NS = torch.arange(router.num_experts, device=scores.device).expand_as(scores)
            return cls(name, router, hidden, scores, is_member_NS, cut_NS, kth_C, votes_C)
        is_token_BT = torch.ones_like(selection.chosen_BT)
        if context.padding_BT is not None:
            is_token_BT = ~context.padding_BT
        has_pools = len(router.capacities) > 1
        pool_BT = context.modality_BT if has_pools else torch.zeros_like(is_token_BT, dtype=torch.long)
        per_token = (scores, selection.chosen_BT, pool_BT)
        columns = [values_BT[is_token_BT].unsqueeze(-1) for values_BT in per_token]
        return cls(name, router, hidden[is_token_BT], *columns, kth_C, votes_C)

    @cached_property
    def predicted_NS(self) -> torch.Tensor:
        """Probabilities of membership by the auxiliary router, `[N, S]`."""
        return self.router.predicted_scores(self.hidden_ND)

    @property
    def kth_predicted_C(self) -> torch.Tensor:
        """The least of as many best probabilities as the top K has members, `[C]`; 0 where there is no token."""
        kth_C = torch.zeros_like(self.kth_C)
        for cut in range(kth_C.shape[0]):
            is_mine_NS = self.cut_NS == cut
            members = int(self.is_member_NS[is_mine_NS].sum())
            if members:
                kth_C[cut] = self.predicted_NS[is_mine_NS].topk(members).values[-1]
        return kth_C


# tells which (token, expert) pairs a rule takes, [N, S]; a function of the router's input alone
Rule = Callable[[RouterRecord], torch.Tensor]


def threshold_rule(record: RouterRecord) -> torch.Tensor:
    """Whom the routing `threshold` takes."""
    return record.scores_NS >= record.router.threshold[record.cut_NS]


def auxiliary_rule(record: RouterRecord) -> torch.Tensor:
    """Whom the routing `auxiliary` takes."""
    return record.predicted_NS >= record.router.auxiliary.threshold[record.cut_NS]


def named_routers(model: torch.nn.Module) -> dict[str, MomaRouterBase]:
    """All routers of a model, of experts and of depth layers, by module name.

    Raises:
        ValueError: it has none.
    """
    routers = {name: module for name, module in model.named_modules() if isinstance(module, MomaRouterBase)}
    if not routers:
        raise ValueError(
            f"`model` is a {type(model).__name__} without routers: it has no group of several experts and no depth "
            "layer, so there is nothing to choose."
        )
    return routers


@contextmanager
def observed_routers(model: torch.nn.Module, observe: Callable[[RouterRecord], object]):
    """Within this context `observe` is called inside every forward, after each router.

    Args:
        model (`torch.nn.Module`): its routers have to be in eval mode: in training their scores may carry noise.
        observe (`Callable`): gets a [`RouterRecord`]; what it returns is ignored.

    Raises:
        ValueError: the model has no routers.
    """

    def hook(name):
        # must return nothing, else the result would replace the router's
        def on_route(router, args, output):
            observe(RouterRecord.of(name, router, *args))

        return on_route

    handles = [router.register_forward_hook(hook(name)) for name, router in named_routers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluation_mode(model: torch.nn.Module):
    """Within this context the model is in eval mode; then every module gets its own flag back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def run_observed(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    observe: Callable[[RouterRecord], object],
    routing: str = "expert_choice",
):
    """Run batches through the decoder in eval mode, without the head, and show `observe` all routers.

    Args:
        model (`PreTrainedModel`): not changed.
        batches (`Iterable[dict[str, torch.Tensor]]`): its inputs; `labels` are left out.
        observe (`Callable`): gets a [`RouterRecord`] of each router and batch.
        routing (`str`, *optional*, defaults to `"expert_choice"`): the routing under which the hidden states arise.

    Raises:
        ValueError: there is no batch, or the model has no routers.
    """
    is_empty = True
    with evaluation_mode(model), observed_routers(model, observe):
        for batch in batches:
            is_empty = False
            inputs = {name: values.to(model.device) for name, values in batch.items() if name != "labels"}
            model.base_model(**inputs, use_cache=False, routing=routing)
    if is_empty:
        raise ValueError("`batches` is empty: at least one batch has to tell the scores apart.")


class SelectionCounts:
    """Exact counts of what rules take of a router's tokens, cut by cut, over any number of batches.

    Args:
        rules (`dict[str, Rule]`): by name.
    """

    def __init__(self, rules: dict[str, Rule]):
        self.rules = rules
        # rows of a router's table: tokens, members, then (taken, members taken) of each rule
        self.tables: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, record: RouterRecord):
        """Count one router's forward."""
        takes = [rule(record) for rule in self.rules.values()]
        columns = [torch.ones_like(record.is_member_NS), record.is_member_NS]
        for take_NS in takes:
            columns += [take_NS, take_NS & record.is_member_NS]
        flags = torch.stack([column.flatten() for column in columns]).long()
        num_cuts = record.router.threshold.shape[0]
        table = torch.zeros(flags.shape[0], num_cuts, dtype=torch.long, device=flags.device)
        table.index_add_(1, record.cut_NS.flatten(), flags)
        self.tables[record.name] = self.tables.get(record.name, 0) + table.cpu()

    def reduce(self, device: torch.device):
        """Add up the counts of all processes, on a device where they can meet."""
        self.tables = _sum_over_ranks(self.tables, device)

    def rows(self) -> list[dict]:
        """One row for each router, for JSON: see [`auxiliary_report`]."""
        return [{**_place(name), **self._ratios(table)} for name, table in self.tables.items()]

    def totals(self, rule: str) -> dict[str, float | None]:
        """A rule's `accuracy`, `precision`, `recall` and `load` over all routers together, and the `true_load`."""
        summed = self._ratios(sum(table.sum(1, keepdim=True) for table in self.tables.values()))
        quality = {name: value for name, value in summed["rules"][rule].items() if name != "loads"}
        return {**quality, "true_load": summed["true_load"]}

    def _ratios(self, table):
        tokens_C, members_C, *taken = table.tolist()
        tokens, members = sum(tokens_C), sum(members_C)
        result = {
            "tokens": tokens_C,
            "true_load": _ratio(members, tokens),
            "true_loads": [_ratio(*pair) for pair in zip(members_C, tokens_C)],
            "rules": {},
        }
        for rule, taken_C, hits_C in zip(self.rules, taken[::2], taken[1::2]):
            takes, hits = sum(taken_C), sum(hits_C)
            result["rules"][rule] = {
                "accuracy": _ratio(tokens - members - takes + 2 * hits, tokens),
                "precision": _ratio(hits, takes),
                "recall": _ratio(hits, members),
                "load": _ratio(takes, tokens),
                "loads": [_ratio(*pair) for pair in zip(taken_C, tokens_C)],
            }
        return result


def _ratio(part, whole):
    return part / whole if whole else None


def _place(name):
    """Layer and group of a router, read from `"model.layers.0.mlp.groups.text.router"`."""
    parts = name.split(".")
    group = parts[parts.index("groups") + 1] if "groups" in parts else "depth"
    return {"router": name, "layer": int(parts[parts.index("layers") + 1]), "group": group}


def _sum_over_ranks(tensors, device):
    """Sums of tensors by name, all in one collective."""
    if not is_distributed():
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).to(device)
    dist.all_reduce(flat)
    parts = flat.cpu().split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view_as(tensors[name]) for name, part in zip(tensors, parts)}


def calibrate_thresholds(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], routing: str = "expert_choice"
) -> list[dict]:
    """Compute the `threshold` of all routers anew, for a model that was trained elsewhere or under other rules.

    A threshold becomes the plain mean of the K-th best scores of the batches, with `K` as in training. `num_updates`
    becomes the number of batches that had tokens to judge by where it was less, and never falls: it is the clock of
    `gumbel_noise_steps` and `routing_warmup_steps`, too, and what has run out in training must not begin anew. Nothing
    else of the model changes, and nothing at all when a batch raises. With several processes each brings its own
    batches, and all get the same result.

    An expert or pool without tokens in a batch has no vote there. Without any vote it keeps its threshold, and a
    warning names it. Another one tells where no inference routing of the config would read the thresholds.

    Args:
        model (`PreTrainedModel`): a `MomaForCausalLM` or `MomaModel`; changed in place.
        batches (`Iterable[dict[str, torch.Tensor]]`): inputs of the model, of the batch size of the training where
            possible. `labels` are left out. They are run twice.
        routing (`str`, *optional*, defaults to `"expert_choice"`): the routing under which the hidden states arise.

    Returns:
        `list[dict]`: see [`auxiliary_report`], with the rule `"threshold"` alone, on the same batches.

    Raises:
        ValueError: there is no batch, or the model has no routers.
    """
    batches = list(batches)
    routers = named_routers(model)
    _warn_if_unread(model.config)
    cuts = _mean_cuts(model, batches, lambda record: record.kth_C, routing)
    report = _calibrated_report(model, batches, "threshold", "scores_NS", cuts, routing)
    with torch.no_grad():
        for name, (mean_C, votes_C) in cuts.items():
            router = routers[name]
            router.threshold.copy_(torch.where(votes_C > 0, mean_C, router.threshold))
            votes = votes_C if router.num_updates.ndim else votes_C[0]
            router.num_updates.copy_(torch.maximum(router.num_updates, votes))
    return report


def _warn_if_unread(config):
    routings = {"inference_routing": config.inference_routing}
    if config.depth_layers:
        routings["depth_inference_routing"] = config.depth_inference_routing or config.inference_routing
    if not any(RULES[routing].reads_threshold for routing in routings.values()):
        fields = " and ".join(f"config.{name}={value!r}" for name, value in routings.items())
        logger.warning(
            "The thresholds that are calibrated here are read under the routing 'threshold' alone, and the model has "
            f"{fields}: set config.inference_routing='threshold', or pass routing='threshold', to use them."
        )


def calibrate_auxiliary_thresholds(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], routing: str = "expert_choice"
) -> list[dict]:
    """Set the `threshold` of all auxiliary routers so that they take as many tokens as the top K holds.

    A classifier that is cut at one half need not take the right number of tokens. Here each expert, and each pool of a
    depth layer, gets the mean over the batches of its K-th best predicted probability. All else is as in
    [`calibrate_thresholds`].

    Probabilities of logits above about 17 are all 1 in fp32. When more than K tokens tie so at the cut, all of them
    are taken; the report's `load` counts them.

    Args:
        model (`PreTrainedModel`): with `config.auxiliary_routers`, trained; changed in place.
        batches (`Iterable[dict[str, torch.Tensor]]`): held-out inputs, see [`calibrate_thresholds`].
        routing (`str`, *optional*, defaults to `"expert_choice"`): the routing under which the hidden states arise.

    Returns:
        `list[dict]`: see [`auxiliary_report`], with the rule `"auxiliary"` alone, on the same batches.

    Raises:
        ValueError: there is no batch, or the model has no auxiliary routers.
    """
    batches = list(batches)
    routers = named_routers(model)
    require_auxiliary_routers(model)
    cuts = _mean_cuts(model, batches, lambda record: record.kth_predicted_C, routing)
    report = _calibrated_report(model, batches, "auxiliary", "predicted_NS", cuts, routing)
    with torch.no_grad():
        for name, (mean_C, votes_C) in cuts.items():
            threshold = routers[name].auxiliary.threshold
            threshold.copy_(torch.where(votes_C > 0, mean_C, threshold))
    return report


def require_auxiliary_routers(model: PreTrainedModel):
    """Check that a model has auxiliary routers.

    Args:
        model (`PreTrainedModel`): its config tells.

    Raises:
        ValueError: it has none.
    """
    if not model.config.auxiliary_routers:
        raise ValueError(
            "`model` has config.auxiliary_routers=False: give it some with add_auxiliary_routers(model), or load what "
            "scripts/train_auxiliary_routers.py wrote."
        )


def _mean_cuts(model, batches, kth, routing):
    """Mean over the batches of all processes, and the number of batches that voted, by router."""
    routers = named_routers(model)
    sums = {name: torch.zeros(2, *router.threshold.shape, dtype=torch.float64) for name, router in routers.items()}

    def observe(record):
        votes_C = record.votes_C.cpu().double()
        sums[record.name] += torch.stack([kth(record).cpu().double() * votes_C, votes_C])

    run_observed(model, batches, observe, routing)
    cuts = {}
    for name, (kth_C, votes_C) in _sum_over_ranks(sums, model.device).items():
        if not votes_C.all():
            pools = model.config.depth_pools if isinstance(routers[name], MomaDepthRouter) else []
            silent = [pool for pool, votes in zip(pools, votes_C) if not votes] if len(pools) > 1 else ""
            logger.warning(f"No batch had tokens for {name} {silent or ''}: what had no vote keeps its threshold.")
        pair = (kth_C / votes_C.clamp(min=1), votes_C)
        cuts[name] = tuple(part.to(routers[name].threshold) for part in pair)
    return cuts


def _calibrated_report(model, batches, rule, values, cuts, routing):
    def take(record):
        mean_C, votes_C = cuts[record.name]
        old_C = record.router.threshold if rule == "threshold" else record.router.auxiliary.threshold
        return getattr(record, values) >= torch.where(votes_C > 0, mean_C, old_C)[record.cut_NS]

    counts = SelectionCounts({rule: take})
    run_observed(model, batches, counts.add, routing)
    counts.reduce(model.device)
    return counts.rows()


__all__ = ["calibrate_auxiliary_thresholds", "calibrate_thresholds"]
