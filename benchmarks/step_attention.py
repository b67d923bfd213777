# SPDX-License-Identifier: Apache-2.0
"""Attention of one query in each row on a CPU: torch's kernel for bf16 against widening keys and values first.

python -m benchmarks.step_attention
"""

import statistics
from functools import partial

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.speed.clock import seconds, threads
from modeling_moma.step_attention_moma import wide_step


# rows and keys
SIZES = ((1, 128), (1, 1024), (8, 128), (8, 1024), (32, 128))
HEADS, HEAD_DIM = 8, 64
REPEATS = 30


class Layer(nn.Module):
    """What the library's function asks of a layer."""

    is_causal = True
    num_key_value_groups = 1


def ratio(rows: int, num_keys: int) -> float:
    """Time of torch's kernel over that of [`wide_step`], in turns."""
    query, *states = (torch.randn(rows, HEADS, length, HEAD_DIM).bfloat16() for length in (1, num_keys, num_keys))
    plain = partial(sdpa_attention_forward, Layer(), query, *states, None)
    wide = partial(wide_step, sdpa_attention_forward, Layer(), query, *states, None)
    ratios = [seconds(plain, "cpu") / seconds(wide, "cpu") for _ in range(REPEATS)]
    return statistics.median(ratios)


def main() -> None:
    print(f"{HEADS} heads of {HEAD_DIM}, bf16, one thread, medians of {REPEATS}.\n")
    print("| rows | keys | torch's kernel over widened keys |\n|---:|---:|---:|")
    with threads(1), torch.no_grad():
        for rows, num_keys in SIZES:
            print(f"| {rows} | {num_keys} | {ratio(rows, num_keys):.1f} |")


if __name__ == "__main__":
    main()
