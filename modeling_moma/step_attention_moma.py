# SPDX-License-Identifier: Apache-2.0
"""Attention of one query in each row on those CPUs on which torch's kernel for half precision is slow.

Shape suffixes:
    B rows, H heads, G key heads, S keys, d head size.
"""

from collections.abc import Callable

import torch
from torch import nn

from .host_moma import has_instructions, is_on_host


# and what torch calls the instructions of a CPU with which its own kernel is the faster one
_HALVES = {torch.bfloat16: "amx_bf16", torch.float16: "avx512_fp16"}
# elements of keys that are widened at a time: their copy should stay in the caches
_CHUNK_ELEMENTS = 2**19


def wants_wide_step(implementation: str, query_BHTd: torch.Tensor) -> bool:
    """Whether [`wide_step`] is the faster way: torch's product of one query with half-precision keys takes 1.6 to 3.4
    times as long as widening them first on a CPU that has no instructions for it, and a fifth to a half of that on one
    that has (`python -m benchmarks.decode_parts`).

    Args:
        implementation (`str`): of the model's attention.
        query_BHTd (`torch.Tensor`): `[B, H, T, d]`.
    """
    return (
        query_BHTd.shape[2] == 1
        and implementation == "sdpa"
        and query_BHTd.dtype in _HALVES
        and not has_instructions(_HALVES[query_BHTd.dtype])
        and is_on_host(query_BHTd)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def wide_step(
    attention: Callable,
    module: nn.Module,
    query_BH1d: torch.Tensor,
    key_BGSd: torch.Tensor,
    value_BGSd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of one query in each row, in fp32, a few rows at a time.

    Args:
        attention (`Callable`): the library's function for `"sdpa"`.
        module (`nn.Module`): the attention layer, as that function wants it.
        query_BH1d (`torch.Tensor`): `[B, H, 1, d]`.
        key_BGSd (`torch.Tensor`): `[B, G, S, d]`.
        value_BGSd (`torch.Tensor`): `[B, G, S, d]`.
        attention_mask (`torch.Tensor`, *optional*): `[B or 1, 1 or H, 1, S]`, of Booleans or added to the scores.

    Returns:
        `tuple`: outputs `[B, 1, H, d]` in the type of the query, and no weights.
    """
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    num_rows, dtype = query_BH1d.shape[0], query_BH1d.dtype
    query_BH1d = query_BH1d.float()
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(key_BGSd.numel() // num_rows, 1))
    if rows_at_once >= num_rows:
        output_B1Hd = attention(module, query_BH1d, key_BGSd.float(), value_BGSd.float(), attention_mask, **kwargs)[0]
        return output_B1Hd.to(dtype), None
    parts = []
    for first in range(0, num_rows, rows_at_once):
        rows = slice(first, first + rows_at_once)
        mask = attention_mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[rows]
        keys, values = key_BGSd[rows].float(), value_BGSd[rows].float()
        parts.append(attention(module, query_BH1d[rows], keys, values, mask, **kwargs)[0])
    return torch.cat(parts).to(dtype), None


__all__ = ["wants_wide_step", "wide_step"]
