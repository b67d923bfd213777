# SPDX-License-Identifier: Apache-2.0
"""What a model's routers see and whom their top K would hold, in eval mode.

Shape suffixes:
    N tokens that compete for a router (one group's, or a depth layer's), padding excluded, D hidden size,
    S scores of a token (one for each expert; one of a depth router),
    C thresholds of a router (one for each expert, or for each pool of a depth router).
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from ..configuration_moma import MomaConfig
from ..depth_moma import DepthSelection, MomaDepthRouter
from ..errors_moma import InputError
from ..modeling_moma import MomaFeedForward
from ..routing_moma import MomaRouter, MomaRouterBase, Selection, batch_thresholds, midpoints
from ..token_groups_moma import RoutingContext


@dataclass
class RouterRecord:
    """What one router saw in one forward, and whom its top K would hold.

    Attributes:
        name (`str`):
            of the router among the model's modules.
        router (`MomaRouterBase`):
            itself.
        hidden_ND (`torch.Tensor`):
            its input, detached, `[N, D]`.
        scores_NS (`torch.Tensor`):
            noise-free scores, fp32, `[N, S]`.
        is_member_NS (`torch.Tensor`):
            membership in the top K, `[N, S]`.
        is_taken_NS (`torch.Tensor`):
            whom the forward itself took, under the routing that it ran, `[N, S]`.
        threshold_index_NS (`torch.Tensor`):
            which of the `C` thresholds decides, `[N, S]`.
        threshold_C (`torch.Tensor`):
            thresholds of this forward alone as training would record them, `[C]`.
        count_C (`torch.Tensor`):
            1, or 0 where there was no token to judge by, `[C]`.
    """

    name: str
    router: MomaRouterBase
    hidden_ND: torch.Tensor
    scores_NS: torch.Tensor
    is_member_NS: torch.Tensor
    is_taken_NS: torch.Tensor
    threshold_index_NS: torch.Tensor
    threshold_C: torch.Tensor
    count_C: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        name: str,
        router: MomaRouterBase,
        taken: Selection | DepthSelection,
        hidden: torch.Tensor,
        context: RoutingContext,
    ) -> "RouterRecord":
        """Let a router in eval mode choose its top K of the tokens it was called with, whatever the routing was."""
        # a context of its own, so that the model does not learn of the statistics
        oracle = context.with_routing("expert_choice", track=True)
        logits, selection = router.forward(hidden, oracle)
        statistics: Any = oracle.steps[router].statistics
        threshold_C = midpoints(statistics.kth_C, statistics.next_best_C)
        count_C = torch.ones_like(threshold_C) if statistics.count_C is None else statistics.count_C
        scores, hidden = torch.sigmoid(logits), hidden.detach()
        if isinstance(router, MomaRouter):
            is_member_NS = torch.zeros_like(scores.t(), dtype=torch.bool).scatter_(1, selection.token_EK, True).t()
            threshold_index_NS = torch.arange(router.num_experts, device=scores.device).expand_as(scores)
            # pairs of weight 0 are padding: no expert took the token
            is_taken_NS = torch.zeros_like(is_member_NS)
            is_taken_NS[taken.token_P, taken.expert_P] = taken.weight_P > 0  # pyright: ignore[reportAttributeAccessIssue]
            return cls(
                name, router, hidden, scores, is_member_NS, is_taken_NS, threshold_index_NS, threshold_C, count_C
            )
        is_token_BT = torch.ones_like(selection.chosen_BT)
        if context.rows.padding_BT is not None:
            is_token_BT = ~context.rows.padding_BT
        has_pools = isinstance(router, MomaDepthRouter) and len(router.capacities) > 1
        pool_BT = context.modality_BT if has_pools else torch.zeros_like(is_token_BT, dtype=torch.long)
        per_token = (scores, selection.chosen_BT, taken.chosen_BT, pool_BT)  # pyright: ignore[reportAttributeAccessIssue]
        scores_NS, is_member_NS, is_taken_NS, threshold_index_NS = (
            values_BT[is_token_BT].unsqueeze(-1) for values_BT in per_token
        )
        hidden_ND = hidden[is_token_BT]
        return cls(
            name, router, hidden_ND, scores_NS, is_member_NS, is_taken_NS, threshold_index_NS, threshold_C, count_C
        )

    @cached_property
    def predicted_NS(self) -> torch.Tensor:
        """Probabilities of membership by the auxiliary router, `[N, S]`."""
        return self.router.predicted_scores(self.hidden_ND)

    @property
    def predicted_threshold_C(self) -> torch.Tensor:
        """Thresholds that as many probabilities pass as the top K has members, `[C]`; 0 where there is no token."""
        threshold_C = torch.zeros_like(self.threshold_C)
        for index in range(threshold_C.shape[0]):
            is_mine_NS = self.threshold_index_NS == index
            members = int(self.is_member_NS[is_mine_NS].sum())
            if members:
                scores_1N = self.predicted_NS[is_mine_NS].unsqueeze(0)
                threshold_C[index] = batch_thresholds(scores_1N, scores_1N.topk(members).values[:, -1])[0]
        return threshold_C


# tells which (token, expert) pairs a rule takes, [N, S]; a function of the router's input alone
Rule = Callable[[RouterRecord], torch.Tensor]


def threshold_rule(record: RouterRecord) -> torch.Tensor:
    """Return which tokens the routing `threshold` takes."""
    return record.scores_NS >= record.router.threshold[record.threshold_index_NS]


def auxiliary_rule(record: RouterRecord) -> torch.Tensor:
    """Return which tokens the routing `auxiliary` takes."""
    return record.predicted_NS >= record.router.auxiliary.threshold[record.threshold_index_NS]


def named_routers(model: torch.nn.Module) -> dict[str, MomaRouterBase]:
    """Return all routers of a model, of experts and of depth layers, by module name."""
    routers = {name: module for name, module in model.named_modules() if isinstance(module, MomaRouterBase)}
    if not routers:
        raise InputError(
            f"`model` is a {type(model).__name__} without routers: it has no group of several experts and no depth "
            "layer, so there is nothing to choose."
        )
    return routers


def has_routers(config: MomaConfig) -> bool:
    """Return whether a model has routers, of groups of several experts or of depth layers."""
    return bool(config.depth_layers) or any(config.group_num_experts(group) > 1 for group in config.expert_groups)


def router_place(name: str) -> tuple[int, str | None]:
    """Return the layer of a router and its group of experts, `None` for the router of a depth layer."""
    parts = name.split(".")
    group = parts[parts.index("groups") + 1] if "groups" in parts else None
    return int(parts[parts.index("layers") + 1]), group


@contextmanager
def observed_routers(model: torch.nn.Module, observe: Callable[[RouterRecord], object]):
    """Call `observe` inside every forward of this context, after each router, also of groups without tokens."""
    # imported late: it takes time, and most models are whole
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    if any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()):
        raise InputError(
            "`model` is split by FSDP, and its weights are there only while their own layer runs: observe a whole one."
        )

    def hook(name: str) -> Callable:
        # a hook must return nothing, or its result replaces the router's
        def on_route(router: MomaRouterBase, args: tuple, output: tuple):
            observe(RouterRecord.of(name, router, output[1], *args))

        return on_route

    handles = [router.register_forward_hook(hook(name)) for name, router in named_routers(model).items()]
    layers = [module for module in model.modules() if isinstance(module, MomaFeedForward)]
    for layer in layers:
        layer.keep_empty_groups = True
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            del layer.keep_empty_groups


@contextmanager
def evaluation_mode(model: torch.nn.Module):
    """Put the model in eval mode within this context; then every module gets its own flag back."""
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
    """Run batches through the decoder in eval mode, without the head, and show `observe` all routers."""
    is_empty = True
    with evaluation_mode(model), observed_routers(model, observe):
        for batch in batches:
            is_empty = False
            if not isinstance(batch, Mapping):
                raise InputError(
                    f"`batches` has a {type(batch).__name__} where the model's inputs by name are needed: give a list "
                    "of dicts, as [{'input_ids': ids}]."
                )
            # lengths of packed documents are numbers, too
            inputs = {
                name: values.to(model.device) if isinstance(values, torch.Tensor) else values
                for name, values in batch.items()
                if name not in ("labels", "source_ids")
            }
            model.base_model(**inputs, use_cache=False, routing=routing)
    if is_empty:
        raise InputError("`batches` is empty: at least one batch has to tell the scores apart.")
