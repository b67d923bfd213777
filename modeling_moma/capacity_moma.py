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
"""How many tokens a share of them is, without the errors of floating point."""

from fractions import Fraction


# shares are written by hand: 0.55 means 11 / 20, not the binary number next to it, whose ceiling may be higher
_LARGEST_DENOMINATOR = 10**6


def exact_share(share: float, parts: int = 1) -> tuple[int, int]:
    """Numerator and denominator of `share / parts`, for [`ceil_share`]."""
    exact = Fraction(share).limit_denominator(_LARGEST_DENOMINATOR) / parts
    return exact.numerator, exact.denominator


def ceil_share(share: tuple, count):
    """`ceil(share * count)`, for integers or for integer tensors.

    Args:
        share (`tuple`): numerator and denominator.
        count (`int` or `torch.LongTensor`): of how many.
    """
    numerator, denominator = share
    return -(-numerator * count // denominator)
