# SPDX-License-Identifier: Apache-2.0
"""Outputs in bf16 that two kernels round differently."""

import torch


def assert_close_but_for_flips(found: torch.Tensor, expected: torch.Tensor, share: float = 0.1) -> None:
    """Compare outputs `(rows, tokens, width)`: all but a share of the tokens are close.

    Kernels of some CPUs round bf16 differently for other shapes, and a score beside its threshold then goes to the
    other side, which changes all of its token's output and a little of those after it.
    """
    is_close = torch.isclose(found, expected, rtol=0.1, atol=0.1).all(dim=-1)
    assert is_close.float().mean() >= 1 - share, f"{int((~is_close).sum())} of {is_close.numel()} tokens differ"
