# SPDX-License-Identifier: Apache-2.0
"""Where one batch alone would cut scores so that a token's own score tells whether it is among the K best.

A cut lies midway between the K-th best score and the next lower one. Were it the K-th best score itself, the rounding
of another kernel, or of another batch, could move that token to the other side.

Shape suffixes:
    C cuts, N scores that are compared with each.
"""

import torch


# scores that differ by less, relatively, are taken for one score that was rounded in two ways
_ROUNDING = 2.0**-18
# by how much, relatively, a cut lies below the lowest score where all are taken and none is left to lie midway to
_MARGIN = 2.0**-10


def batch_thresholds(scores_CN: torch.Tensor, kth_C: torch.Tensor) -> torch.Tensor:
    """The cuts of one batch.

    Args:
        scores_CN (`torch.Tensor`): between 0 and 1, in any order, `[C, N]` with at least one each.
        kth_C (`torch.Tensor`): the K-th best of each line, `[C]`.

    Returns:
        `torch.Tensor`: `[C]`, see [`thresholds_between`].
    """
    return thresholds_between(kth_C, lower_scores(scores_CN, kth_C.unsqueeze(-1)).amax(-1))


def lower_scores(scores: torch.Tensor, kth: torch.Tensor) -> torch.Tensor:
    """The scores that are lower than the K-th best by more than rounding, and -1 in the place of all others."""
    return torch.where(scores < kth * (1 - _ROUNDING), scores, -1.0)


def thresholds_between(kth_C: torch.Tensor, lower_C: torch.Tensor) -> torch.Tensor:
    """Midway between the K-th best scores and the next lower ones.

    Args:
        kth_C (`torch.Tensor`): the K-th best scores, `[C]`.
        lower_C (`torch.Tensor`): the next lower ones, -1 where there is none, `[C]`.

    Returns:
        `torch.Tensor`: `[C]`; just below the K-th best where it is the lowest.
    """
    return torch.where(lower_C < 0, kth_C * (1 - _MARGIN), (kth_C + lower_C) / 2)


__all__ = ["batch_thresholds", "lower_scores", "thresholds_between"]
