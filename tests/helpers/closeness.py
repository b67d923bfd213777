# SPDX-License-Identifier: Apache-2.0
"""Outputs in bf16 that two kernels round differently."""

import torch

from modeling_moma.cpu_moma import has_instructions


# of a token whose router's score lies beside its threshold, which a rounding takes to the other side
FLIPPED = 0.2


def assert_as_near_as_plain(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Compare outputs `[B, T, V]` of layers for CPUs with those of plain layers, both in bf16, and with fp32.

    With AMX both are equal to `tolerance`. Elsewhere plain layers themselves are farther than that from fp32, and the
    others may not be farther by half: in the median over tokens, and in tokens that go to another expert.
    """
    if has_instructions("amx_bf16"):
        torch.testing.assert_close(found, plain, rtol=tolerance, atol=tolerance)
    errors = [(values.float() - exact).abs().amax(dim=-1) for values in (found, plain)]
    medians = [values.quantile(0.5).item() for values in errors]
    assert medians[0] <= 1.5 * medians[1], f"half of the tokens are {medians[0]} from fp32, plain layers' {medians[1]}"
    flips = [int((values > FLIPPED).sum()) for values in errors]
    assert flips[0] <= flips[1] + 0.05 * errors[0].numel(), f"{flips[0]} tokens are flipped, plain layers' {flips[1]}"
