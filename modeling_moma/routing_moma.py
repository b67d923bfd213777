# SPDX-License-Identifier: Apache-2.0
"""The router of a group of experts: scores, noise, a selection by the rule of the forward, and its statistics.

Shape suffixes:
    D hidden size, N tokens of one group in the batch, E experts of the group, K tokens that one expert takes,
    P (token, expert) pairs.
"""

import torch

from .capacity_moma import ceil_share, exact_share
from .configuration_moma import MomaConfig
from .expert_forms_moma import EXPERT_FORMS
from .router_base_moma import MomaRouterBase
from .routing_context_moma import RoutingContext
from .routing_rules_moma import rule_of
from .selection_moma import Selection
from .thresholds_moma import batch_thresholds


class MomaRouter(MomaRouterBase):
    """Scores of a group's tokens for its experts (MoMa equation 1), and the choice between them.

    State dict:
        weight           [E, D]  fp32
        threshold        [E]     fp32, running mean of each expert's cut, see [`batch_thresholds`]
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
        self.taken_share = exact_share(self.capacity_factor, num_experts)
        self.gumbel_noise, self.gumbel_noise_steps = config.gumbel_noise, config.gumbel_noise_steps

    def forward(self, x_ND: torch.Tensor, context: RoutingContext) -> tuple[torch.Tensor, Selection]:
        """Score the tokens and select.

        Args:
            x_ND (`torch.Tensor`): the group's tokens, `[N, D]`, padding excluded: it must not compete.
            context (`RoutingContext`): the routing of this forward.

        Returns:
            `tuple`: router logits `[N, E]` in fp32, without noise, and the selection.
        """
        logits_NE = self.logits(x_ND)
        noisy_NE = logits_NE
        rule = rule_of(context.routing)
        is_noisy = self.training and not self.is_frozen and self.gumbel_noise > 0 and rule.takes_noise
        if is_noisy:
            noisy_NE = logits_NE + self._noise_scale(context) * context.router_noise(self, logits_NE)
        selection = EXPERT_FORMS[rule.name](self, x_ND, torch.sigmoid(noisy_NE), context)
        if context.track:
            context.record(self, *self._statistics(logits_NE.detach(), selection, is_noisy))
        return logits_NE, selection

    def capacity(self, num_tokens: int) -> int:
        """Tokens `K = ceil(c * N / E)` that one expert takes from `num_tokens`."""
        return min(num_tokens, ceil_share(self.taken_share, num_tokens))

    def _noise_scale(self, context: RoutingContext) -> float | torch.Tensor:
        if self.gumbel_noise_steps is None:
            return self.gumbel_noise
        steps_left = self.gumbel_noise_steps - context.router_state(self).num_updates
        return self.gumbel_noise * (steps_left / self.gumbel_noise_steps).clamp(min=0)

    def _statistics(
        self, logits_NE: torch.Tensor, selection: Selection, is_noisy: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_tokens = logits_NE.shape[0]
        if num_tokens == 0:
            zeros_E = logits_NE.new_zeros(self.num_experts)
            return zeros_E, zeros_E, zeros_E
        # inference cuts scores without noise
        scores_EN = torch.sigmoid(logits_NE).t()
        if selection.shape_EK is not None and not is_noisy:
            kth_E = selection.weight_EK[:, -1].detach()
        else:
            kth_E = scores_EN.topk(self.capacity(num_tokens), dim=-1).values[:, -1]
        if selection.shape_EK is not None:
            load_E = torch.full_like(kth_E, selection.shape_EK[1])
        else:
            load_E = torch.zeros_like(kth_E).index_add(0, selection.expert_P, torch.ones_like(selection.weight_P))
        threshold_E = batch_thresholds(scores_EN, kth_E)
        return threshold_E, (load_E.mean() - load_E) / num_tokens, torch.ones_like(kth_E)


__all__ = ["MomaRouter"]
