# SPDX-License-Identifier: Apache-2.0
"""The rules by which experts, depth layers and tokens choose one another: what each is, apart from what it computes.

A rule is a record here and a function for experts ([`expert_forms_moma`], `@expert_form`), and where depth layers may
follow it another one ([`depth_moma`], `@depth_form`). Configuration, costs and calibration read the records.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors_moma import InputError


if TYPE_CHECKING:
    from .configuration_moma import MomaConfig


@dataclass(frozen=True)
class RoutingRule:
    """What a rule is.

    Attributes:
        name (`str`): by which `config.training_routing`, `forward(routing=...)` and the like ask for it.
        is_causal (`bool`): whether a token is decided on by itself, so that the rule may serve inference.
        may_train (`bool`): whether training may follow it.
        takes_noise (`bool`): whether noise may disturb the choice; other rules compare scores with cuts that were
            found without it.
        moves_bias (`bool`): whether training moves the balance bias.
        counts_experts (`bool`): whether a token meets `config.num_experts_per_tok` experts; else it meets
            `config.expert_capacity_factor` of them on average.
        reads_threshold (`bool`): whether it compares scores with the running mean of the batches' cuts.
        needs_auxiliary (`bool`): whether it asks auxiliary routers.
    """

    name: str
    is_causal: bool
    may_train: bool
    takes_noise: bool = False
    moves_bias: bool = False
    counts_experts: bool = False
    reads_threshold: bool = False
    needs_auxiliary: bool = False

    def experts_per_token(self, config: "MomaConfig", group: str) -> float:
        """Experts of a group that one of its tokens meets on average."""
        return config.num_experts_per_tok if self.counts_experts else config.group_capacity_factor(group)


RULES = {
    rule.name: rule
    for rule in (
        RoutingRule("expert_choice", is_causal=False, may_train=True, takes_noise=True),
        RoutingRule("threshold", is_causal=True, may_train=True, reads_threshold=True),
        RoutingRule(
            "token_choice", is_causal=True, may_train=True, takes_noise=True, moves_bias=True, counts_experts=True
        ),
        RoutingRule("auxiliary", is_causal=True, may_train=False, needs_auxiliary=True),
    )
}
TRAINING_ROUTINGS = tuple(name for name, rule in RULES.items() if rule.may_train)
CAUSAL_ROUTINGS = tuple(name for name, rule in RULES.items() if rule.is_causal)
NOISY_ROUTINGS = tuple(name for name, rule in RULES.items() if rule.takes_noise)


def rule_of(name: str, argument: str = "routing") -> RoutingRule:
    """The rule of a name.

    Args:
        name (`str`): the rule's.
        argument (`str`, *optional*, defaults to `"routing"`): who asks, for the message.

    Raises:
        ValueError: there is no such rule.
    """
    if name not in RULES:
        raise InputError(f"`{argument}` must be one of {sorted(RULES)}, got {name!r}.")
    return RULES[name]


__all__ = ["CAUSAL_ROUTINGS", "NOISY_ROUTINGS", "RULES", "TRAINING_ROUTINGS", "RoutingRule", "rule_of"]
