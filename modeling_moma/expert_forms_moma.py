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
# by the name of a rule of `RULES`
EXPERT_FORMS: dict[str, ExpertForm] = {}


def expert_form(name: str) -> Callable[[ExpertForm], ExpertForm]:
    """Let a function choose for experts under a rule of `RULES`.

    It is called with the [`MomaRouter`], its tokens `[N, D]`, their scores `[N, E]` and the context, and gives a
    [`Selection`].
    """

    def keep(function: ExpertForm) -> ExpertForm:
        EXPERT_FORMS[rule_of(name).name] = function
        return function

    return keep


@expert_form("expert_choice")
def expert_choice(
    router: "MomaRouter", x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext
) -> Selection:
    """Each expert takes its top `K` tokens of the batch (MoMa section 2.2). Not causal: for training."""
    weight_EK, token_EK = scores_NE.t().topk(router.capacity(scores_NE.shape[0]), dim=-1)
    return Selection.of_equal_shares(token_EK, weight_EK)


@expert_form("threshold")
def threshold(router: "MomaRouter", x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext) -> Selection:
    """An expert takes a token iff its score reaches the running mean of the expert's K-th best score.

    In the first `routing_warmup_steps` of training it takes its K best tokens of the batch instead.
    """
    state = context.router_state(router)
    is_taken_NE = scores_NE >= state.threshold
    if context.track and router.warmup_steps and not router.is_frozen:
        token_EK = expert_choice(router, x_ND, scores_NE.detach(), context).token_EK
        is_best_EN = torch.zeros_like(is_taken_NE.t()).scatter_(1, token_EK, True)
        is_taken_NE = torch.where(state.num_updates < router.warmup_steps, is_best_EN.t(), is_taken_NE)
    return Selection.of_members(is_taken_NE, scores_NE, context.has_fixed_shapes, context.may_wait)


@expert_form("token_choice")
def token_choice(
    router: "MomaRouter", x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext
) -> Selection:
    """Each token takes its best experts; the balance bias selects but does not weigh (arXiv 2408.15664)."""
    bias_E = context.router_state(router).balance_bias
    expert_Nk = (scores_NE + bias_E).topk(router.num_experts_per_tok, dim=-1).indices
    if context.has_fixed_shapes:
        is_taken_NE = torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(1, expert_Nk, True)
        return Selection.of_members(is_taken_NE, scores_NE, has_fixed_shapes=True)
    expert_P, order_P = expert_Nk.flatten().sort(stable=True)
    weight_P = scores_NE.gather(1, expert_Nk).flatten().index_select(0, order_P)
    return Selection(order_P // router.num_experts_per_tok, expert_P, weight_P, is_sorted=True)


@expert_form("auxiliary")
def auxiliary(router: "MomaRouter", x_ND: torch.Tensor, scores_NE: torch.Tensor, context: RoutingContext) -> Selection:
    """An expert takes a token iff the auxiliary router predicts so; the weight is the main router's (section 2.4)."""
    is_taken_NE = router.predicted_scores(x_ND) >= router.auxiliary.threshold
    return Selection.of_members(is_taken_NE, scores_NE, context.has_fixed_shapes, context.may_wait)


__all__ = ["EXPERT_FORMS", "expert_form"]
