# SPDX-License-Identifier: Apache-2.0
"""How experts choose under each rule, and the table in which a rule's function is found.

Shape suffixes:
    D hidden size, N tokens of one group in the batch, E experts of the group, K tokens that one expert takes,
    k experts that one token takes, P (token, expert) pairs.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .routing_context_moma import RoutingContext
from .routing_rules_moma import rule_of
from .selection_moma import Selection


if TYPE_CHECKING:
    from .routing_moma import MomaRouter


ExpertForm = Callable[["MomaRouter", torch.Tensor, torch.Tensor, RoutingContext], Selection]
# True where an expert takes a token, `[N, E]`, of the same arguments
Members = Callable[["MomaRouter", torch.Tensor, torch.Tensor, RoutingContext], torch.Tensor]
# by the name of a rule of `RULES`
EXPERT_FORMS: dict[str, ExpertForm] = {}
# of the rules under which a step need not make a selection
STEP_MEMBERS: dict[str, Members] = {}


def expert_form(name: str, members: Members | None = None) -> Callable[[ExpertForm], ExpertForm]:
    """Let a function choose for experts under a rule of `RULES`.

    It is called with the [`MomaRouter`], its tokens `[N, D]`, their scores `[N, E]` and the context, and gives a
    [`Selection`].

    Args:
        name (`str`): of the rule.
        members (`Callable`, *optional*): of the same arguments, says in a step of decoding who is chosen, `[N, E]`;
            gates are the scores. Without it steps make a selection, too.
    """

    def keep(function: ExpertForm) -> ExpertForm:
        own_name = rule_of(name).name
        EXPERT_FORMS[own_name] = function
        STEP_MEMBERS.pop(own_name, None)
        if members is not None:
            STEP_MEMBERS[own_name] = members
        return function

    return keep


@expert_form("expert_choice")
def expert_choice(
    router: "MomaRouter", x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext
) -> Selection:
    """Each expert takes its top `K` tokens of the batch (MoMa section 2.2). Not causal: for training."""
    weight_EK, token_EK = scores_NE.t().topk(router.capacity(scores_NE.shape[0]), dim=-1)
    return Selection.of_equal_shares(token_EK, weight_EK)


def _above_thresholds(
    router: "MomaRouter", x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext
) -> torch.Tensor:
    return scores_NE >= context.router_state(router).threshold


def _best_of_token(
    router: "MomaRouter", x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext
) -> torch.Tensor:
    bias_E = context.router_state(router).balance_bias
    expert_Nk = (scores_NE + bias_E).topk(router.num_experts_per_tok, dim=-1).indices
    return torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(1, expert_Nk, True)


def _predicted(
    router: "MomaRouter", x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext
) -> torch.Tensor:
    return router.predicted_scores(x_ND) >= router.auxiliary.threshold


@expert_form("threshold", _above_thresholds)
def threshold(router: "MomaRouter", x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext) -> Selection:
    """An expert takes a token iff its score reaches the running mean of the cuts that part the expert's K best from
    the others, see [`batch_thresholds`].

    In the first `routing_warmup_steps` of training it takes its K best tokens of the batch instead.
    """
    is_taken_NE = _above_thresholds(router, x_ND, scores_NE, context)
    if context.track and router.warmup_steps and not router.is_frozen:
        num_updates = context.router_state(router).num_updates
        token_EK = expert_choice(router, x_ND, scores_NE.detach(), context).token_EK
        is_best_EN = torch.zeros_like(is_taken_NE.t()).scatter_(1, token_EK, True)
        is_taken_NE = torch.where(num_updates < router.warmup_steps, is_best_EN.t(), is_taken_NE)
    return Selection.of_members(is_taken_NE, scores_NE, context.has_fixed_shapes, context.may_wait)


@expert_form("token_choice", _best_of_token)
def token_choice(
    router: "MomaRouter", x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext
) -> Selection:
    """Each token takes its best experts; the balance bias selects but does not weigh (arXiv 2408.15664)."""
    if context.has_fixed_shapes:
        is_taken_NE = _best_of_token(router, x_ND, scores_NE, context)
        return Selection.of_members(is_taken_NE, scores_NE, has_fixed_shapes=True)
    bias_E = context.router_state(router).balance_bias
    expert_Nk = (scores_NE + bias_E).topk(router.num_experts_per_tok, dim=-1).indices
    expert_P, order_P = expert_Nk.flatten().sort(stable=True)
    weight_P = scores_NE.gather(1, expert_Nk).flatten().index_select(0, order_P)
    return Selection(order_P // router.num_experts_per_tok, expert_P, weight_P, is_sorted=True)


@expert_form("auxiliary", _predicted)
def auxiliary(router: "MomaRouter", x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext) -> Selection:
    """An expert takes a token iff the auxiliary router predicts so; the weight is the main router's (section 2.4)."""
    is_taken_NE = _predicted(router, x_ND, scores_NE, context)
    return Selection.of_members(is_taken_NE, scores_NE, context.has_fixed_shapes, context.may_wait)


__all__ = ["EXPERT_FORMS", "STEP_MEMBERS", "expert_form"]
