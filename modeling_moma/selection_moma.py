# SPDX-License-Identifier: Apache-2.0
"""Which (token, expert) pairs of a group run, and by what they weigh: what routers answer with.

Shape suffixes:
    N tokens of one group in the batch, D hidden size, E experts of the group, K tokens that one expert takes,
    P (token, expert) pairs.
"""

from dataclasses import dataclass, replace

import torch


@dataclass
class Selection:
    """(Token, expert) pairs.

    Attributes:
        token_P (`torch.LongTensor`): positions in the group's tokens, `[P]`. A token may come several times or never.
        expert_P (`torch.LongTensor`): the expert of each pair, `[P]`.
        weight_P (`torch.Tensor`): gates, fp32, `[P]`.
        shape_EK (`tuple[int, int]`, *optional*): where every expert takes as many tokens as the others; the pairs then
            come expert by expert.
        has_holes (`bool`): whether pairs of weight 0 stand for tokens that their expert does not take, so that no
            shape depends on who chose whom.
        is_sorted (`bool`): whether the pairs come expert by expert.
        ends_E (`torch.IntTensor`, *optional*): where each expert's pairs end where that is known to the device alone,
            `[E]`; later pairs are holes.
    """

    token_P: torch.Tensor
    expert_P: torch.Tensor
    weight_P: torch.Tensor
    shape_EK: tuple[int, int] | None = None
    has_holes: bool = False
    is_sorted: bool = False
    ends_E: torch.Tensor | None = None

    @classmethod
    def of_equal_shares(cls, token_EK: torch.Tensor, weight_EK: torch.Tensor, has_holes: bool = False) -> "Selection":
        """Every expert takes the same number of tokens.

        Args:
            token_EK (`torch.LongTensor`): the tokens of each expert, `[E, K]`.
            weight_EK (`torch.Tensor`): their gates, `[E, K]`.
            has_holes (`bool`, *optional*, defaults to `False`): see [`Selection`].
        """
        num_experts, num_taken = token_EK.shape
        expert_P = torch.arange(num_experts, device=token_EK.device).repeat_interleave(num_taken)
        return cls(token_EK.flatten(), expert_P, weight_EK.flatten(), (num_experts, num_taken), has_holes, True)

    @classmethod
    def of_members(
        cls, is_taken_NE: torch.Tensor, scores_NE: torch.Tensor, has_fixed_shapes: bool, may_wait: bool = True
    ) -> "Selection":
        """The pairs that a mask names, weighed by their scores.

        Args:
            is_taken_NE (`torch.BoolTensor`): True where the expert takes the token, `[N, E]`.
            scores_NE (`torch.Tensor`): `[N, E]`.
            has_fixed_shapes (`bool`): whether all pairs have to be there, with weights of 0 at the others.
            may_wait (`bool`, *optional*, defaults to `True`): whether the host may ask the device for their number;
                else all pairs are there, those that are taken before the others.
        """
        if has_fixed_shapes:
            token_EN = torch.arange(scores_NE.shape[0], device=scores_NE.device).expand(scores_NE.shape[1], -1)
            return cls.of_equal_shares(token_EN, torch.where(is_taken_NE, scores_NE, 0.0).t(), has_holes=True)
        if not may_wait:
            return cls._of_all_pairs(is_taken_NE, scores_NE)
        if scores_NE.shape[0] == 1:
            expert_P = is_taken_NE.flatten().nonzero().flatten()
            weight_P = scores_NE.flatten().index_select(0, expert_P)
            return cls(torch.zeros_like(expert_P), expert_P, weight_P, is_sorted=True)
        # expert by expert, as products want them
        expert_P, token_P = is_taken_NE.t().nonzero(as_tuple=True)
        # by one number each, whose gradient is cheaper than that of two on CPU
        weight_P = scores_NE.flatten().index_select(0, token_P * scores_NE.shape[1] + expert_P)
        return cls(token_P, expert_P, weight_P, is_sorted=True)

    @classmethod
    def _of_all_pairs(cls, is_taken_NE: torch.Tensor, scores_NE: torch.Tensor) -> "Selection":
        num_tokens = scores_NE.shape[0]
        is_taken_P = is_taken_NE.t().flatten()
        order_P = (~is_taken_P).byte().argsort(stable=True)
        weight_P = torch.where(is_taken_P, scores_NE.t().flatten(), 0.0).index_select(0, order_P)
        ends_E = is_taken_NE.sum(0).cumsum(0).int()
        # a group without a token has no places
        size = max(num_tokens, 1)
        return cls(order_P % size, order_P // size, weight_P, has_holes=True, is_sorted=True, ends_E=ends_E)

    def normalized(self, num_tokens: int) -> "Selection":
        """Gates over the detached sum of their token's, for `config.normalize_gates`."""
        weight_P = self.weight_P.detach()
        total_N = weight_P.new_zeros(num_tokens).index_add(0, self.token_P, weight_P)
        total_P = total_N.clamp(min=torch.finfo(total_N.dtype).tiny).index_select(0, self.token_P)
        return replace(self, weight_P=self.weight_P / total_P)

    def dispatch(self, x_ND: torch.Tensor) -> torch.Tensor:
        """A row for each pair, `[N, D]` to `[P, D]`."""
        if x_ND.shape[0] == 1:
            return x_ND.expand(self.token_P.shape[0], -1)
        return x_ND.index_select(0, self.token_P)

    def combine(self, y_PD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Add the weighted outputs of each token's pairs.

        Args:
            y_PD (`torch.Tensor`): `[P, D]`.
            num_tokens (`int`): `N`.

        Returns:
            `torch.Tensor`: sums `[N, D]`.
        """
        if self.has_holes:
            # an expert that nobody chose may overflow in half precision, and infinity times 0 is no number
            y_PD = torch.where(self.weight_P.unsqueeze(-1) > 0, y_PD, 0.0)
        if num_tokens == 1:
            return y_PD if y_PD.shape[0] == 1 else y_PD.sum(0, keepdim=True)
        return y_PD.new_zeros(num_tokens, y_PD.shape[1]).index_add(0, self.token_P, y_PD)

    def gates(self, num_tokens: int) -> torch.Tensor:
        """The sum of each token's gates, `[N]`."""
        return self.weight_P.new_zeros(num_tokens).index_add(0, self.token_P, self.weight_P)

    @property
    def token_EK(self) -> torch.Tensor:
        """The tokens of each expert where all take `K`, `[E, K]`."""
        return self.token_P.view(self.shape_EK)  # pyright: ignore[reportArgumentType, reportCallIssue]

    @property
    def weight_EK(self) -> torch.Tensor:
        """The gates of each expert where all take `K` tokens, `[E, K]`."""
        return self.weight_P.view(self.shape_EK)  # pyright: ignore[reportArgumentType, reportCallIssue]


__all__ = ["Selection"]
