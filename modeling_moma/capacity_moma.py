# SPDX-License-Identifier: Apache-2.0
"""How many tokens a share of them is, without the errors of floating point."""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any, TypeVar


# shares are written by hand: 0.55 means 11 / 20, not the binary number next to it, whose ceiling may be higher
_LARGEST_DENOMINATOR = 10**6

Count = TypeVar("Count")


def exact_share(share: float, parts: int = 1) -> tuple[int, int]:
    """Numerator and denominator of `share / parts`, for [`ceil_share`]."""
    exact = Fraction(share).limit_denominator(_LARGEST_DENOMINATOR) / parts
    return exact.numerator, exact.denominator


def ceil_share(share: Iterable[Any], count: Count) -> Count:
    """`ceil(share * count)`, for integers or for integer tensors.

    Args:
        share (`tuple`): numerator and denominator.
        count (`int` or `torch.LongTensor`): of how many.
    """
    numerator, denominator = share
    return -(-numerator * count // denominator)
