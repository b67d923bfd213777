# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the kernels of flash attention, slow and for any device, where Transformers looks for them.

Everything of Transformers above the kernels is the real thing. The kernels take the arguments of `flash_attn` 2.8, and
refuse what these refuse; lengths that these would follow beyond their tensors, or that would leave a token out, are
refused, too.
"""

import importlib.machinery
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from transformers.modeling_utils import PreTrainedModel


HALF = (torch.float16, torch.bfloat16)


def attend(query_QHd, key_KHd, value_KHd, scale, causal):
    """One sequence; the last query sees the last key."""
    num_queries, num_heads, size = query_QHd.shape
    num_keys = key_KHd.shape[0]
    key_KHd, value_KHd = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in (key_KHd, value_KHd))
    scores_HQK = torch.einsum("qhd,khd->hqk", query_QHd, key_KHd) * (size**-0.5 if scale is None else scale)
    if query_QHd.dtype in HALF:
        scores_HQK = scores_HQK.float()
    if causal:
        is_seen_QK = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        scores_HQK = scores_HQK.masked_fill(~is_seen_QK.to(scores_HQK.device), -torch.inf)
    # a query without a key gets zeros
    weights_HQK = scores_HQK.softmax(-1).nan_to_num()
    return torch.einsum("hqk,khd->qhd", weights_HQK.to(value_KHd.dtype), value_KHd)


class StandIn:
    """The kernels, and how often each was called, and waited for a length.

    Args:
        dtypes: types that they take.
    """

    def __init__(self, dtypes):
        self.dtypes, self.calls = dtypes, Counter()

    def _check(self, num_dimensions, *tensors):
        for tensor in tensors:
            if tensor.dtype not in self.dtypes or tensor.dtype != tensors[0].dtype:
                raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
            if tensor.ndim != num_dimensions or tensor.stride(-1) != 1:
                raise RuntimeError("Input tensor must have contiguous last dimension")

    def _check_lengths(self, states, starts, longest):
        if starts.dtype != torch.int32 or starts.device != states.device or not starts.is_contiguous():
            raise RuntimeError("cu_seqlens must have dtype int32, on the device of the states")
        # the kernel waits for it
        if isinstance(longest, torch.Tensor):
            self.calls["waits"] += 1
        lengths, num_tokens = starts.diff(), states.shape[0]
        if starts[0] != 0 or starts[-1] != num_tokens or (lengths < 0).any() or lengths.max() > longest:
            raise RuntimeError(f"{starts.tolist()}, the longest {int(longest)}, are not of {num_tokens} tokens")

    def functions(self) -> list:
        """Those of `flash_attn` that Transformers takes; what it passes beside these arguments is at its default."""

        def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
            assert dropout_p == 0
            self.calls["dense"] += 1
            self._check(4, q, k, v)
            return torch.stack([attend(*row, softmax_scale, causal) for row in zip(q, k, v)])

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False,
        ):  # fmt: skip
            assert dropout_p == 0
            self.calls["varlen"] += 1
            self._check(3, q, k, v)
            self._check_lengths(q, cu_seqlens_q, max_seqlen_q)
            self._check_lengths(k, cu_seqlens_k, max_seqlen_k)
            parts_q = q.split(cu_seqlens_q.diff().tolist())
            parts_k, parts_v = (x.split(cu_seqlens_k.diff().tolist()) for x in (k, v))
            parts = zip(parts_q, parts_k, parts_v, strict=True)
            return torch.cat([attend(*part, softmax_scale, causal) for part in parts])

        def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, **kwargs):
            raise NotImplementedError

        return [flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache]


def _module(name, functions):
    module = ModuleType(name)
    # libraries ask of what is installed
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for function in functions:
        setattr(module, function.__name__, function)
    return module


@contextmanager
def stand_in_flash(dtypes=(*HALF, torch.float32, torch.float64)) -> Iterator[StandIn]:
    """Let models be set to `flash_attention_2`; real kernels take `HALF` alone."""
    kernels = StandIn(dtypes)
    padding = _module("flash_attn.bert_padding", [])
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", _module("flash_attn", kernels.functions()))
        patch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        # what is found on a machine with a GPU
        patch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
        matrix = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
        patch.setitem(matrix, "general_availability_check", lambda: True)
        patch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
        patch.setattr(flash_utils, "_loaded_implementation", None)
        for name in ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
            patch.setattr(flash_utils, name, None)
        for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
            patch.setattr(flash_utils, name, None)
        yield kernels
