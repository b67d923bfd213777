# SPDX-License-Identifier: Apache-2.0
"""What a step of decoding is made of on a CPU, each part in two ways: attention, the cache, products of a few rows.

python -m benchmarks.decode_parts
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.speed.clock import seconds, threads
from modeling_moma.growing_cache_moma import MomaGrowingCacheLayer
from modeling_moma.step_attention_moma import wide_step


# rows and keys
SIZES = ((1, 128), (1, 1024), (8, 128), (8, 1024), (32, 128))
HEADS, HEAD_DIM = 8, 64
# of an expert's first product, and so many of them that no cache holds them
WIDTH, INNER, EXPERTS = 512, 2736, 100
ROWS = (1, 2, 8, 64, 256)
REPEATS = 30


class Layer(nn.Module):
    """What the library's function asks of a layer."""

    is_causal = True
    num_key_value_groups = 1


def ratio(one: Callable[[], object], other: Callable[[], object]) -> float:
    """Time of the one over that of the other, in turns."""
    return statistics.median(seconds(one, "cpu") / seconds(other, "cpu") for _ in range(REPEATS))


def attention(rows: int, num_keys: int) -> float:
    """torch's kernel for one query of bf16, over the same in fp32."""
    query, *states = (torch.randn(rows, HEADS, length, HEAD_DIM).bfloat16() for length in (1, num_keys, num_keys))
    plain = partial(sdpa_attention_forward, Layer(), query, *states, None)
    return ratio(plain, partial(wide_step, sdpa_attention_forward, Layer(), query, *states, None))


def cache(rows: int, num_keys: int) -> float:
    """A cache that copies all it holds for a token, over one that writes behind it."""
    updates = []
    for layer in (DynamicLayer(), MomaGrowingCacheLayer()):
        layer.update(*(torch.randn(2, rows, HEADS, num_keys, HEAD_DIM).bfloat16()))
        updates.append(partial(layer.update, *torch.randn(2, rows, HEADS, 1, HEAD_DIM).bfloat16()))
    # the first one makes room
    updates[1]()
    return ratio(*updates)


def products(num_rows: int, dtype: torch.dtype) -> list[str]:
    """
    GB/s at which products read weights beyond the caches: on the right as they are, stored transposed, after being
    read once, packed once in oneDNN's own order, and on the left.
    """
    x_ND = torch.randn(num_rows, WIDTH).to(dtype)
    weights = [torch.randn(INNER, WIDTH).to(dtype) for _ in range(EXPERTS)]
    transposed = [weight.t().contiguous().t() for weight in weights]

    def read_first(weight: torch.Tensor) -> torch.Tensor:
        weight.view(torch.float32).sum()
        return nn.functional.linear(x_ND, weight)

    # oneDNN has an order of its own for bf16
    is_half = dtype == torch.bfloat16
    pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    packed = [pack(weight, num_rows) for weight in weights] if is_half else []
    ways = [
        [partial(nn.functional.linear, x_ND, weight) for weight in weights],
        [partial(nn.functional.linear, x_ND, weight) for weight in transposed],
        [partial(read_first, weight) for weight in weights],
        [partial(multiply, x_ND, weight, None, "none", [], "") for weight in packed],
        [partial(torch.mm, weight, x_ND.t()) for weight in weights],
        [weight.sum for weight in weights],
    ]
    size = weights[0].nbytes / 1e9
    return [f"{size / statistics.median(seconds(work, 'cpu') for work in way):.1f}" if way else "" for way in ways]


def main() -> None:
    print(f"{HEADS} heads of {HEAD_DIM}, bf16, one thread, medians of {REPEATS}.\n")
    print("| rows | keys | attention: bf16 over fp32 | cache: copied over grown |\n|---:|---:|---:|---:|")
    with threads(1), torch.no_grad():
        for rows, num_keys in SIZES:
            print(f"| {rows} | {num_keys} | {attention(rows, num_keys):.1f} | {cache(rows, num_keys):.1f} |")
        print(f"\nGB/s of products of {INNER} x {WIDTH}, {EXPERTS} of them in turn.\n")
        print(
            "| rows | type | as they are | transposed | read once before | packed once | on the left | a sum alone |"
        )
        print("|---:|---|---:|---:|---:|---:|---:|---:|")
        for dtype in (torch.bfloat16, torch.float32):
            for num_rows in ROWS:
                print("| " + " | ".join([str(num_rows), str(dtype)[6:], *products(num_rows, dtype)]) + " |")


if __name__ == "__main__":
    main()
