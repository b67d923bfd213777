# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the kernels of flash attention, slow and for any device, where Transformers looks for them.

Everything of Transformers above the kernels is the real thing. The kernels take the arguments of `flash_attn` 2.8 and
of version 3's `flash_attn_interface`, and refuse what these refuse; lengths that these would follow beyond their
tensors, or that would leave a token out, are refused, too.
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
from transformers.integrations import hub_kernels
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel


HALF = (torch.float16, torch.bfloat16)
KERNEL = "kernels-community/flash-attn2"
FLASH = ("flash_attention_2", "flash_attention_3", KERNEL)


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
        self.dtypes, self.calls, self.lengths = dtypes, Counter(), []

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

    def dense(self, q, k, v, scale, causal):
        """Rows of one length."""
        self.calls["dense"] += 1
        self._check(4, q, k, v)
        return torch.stack([attend(*row, scale, causal) for row in zip(q, k, v)])

    def varlen(self, q, k, v, starts_q, starts_k, longest_q, longest_k, scale, causal):
        """Documents in one row."""
        self.calls["varlen"] += 1
        self.lengths.append(starts_q.diff().tolist())
        self._check(3, q, k, v)
        self._check_lengths(q, starts_q, longest_q)
        self._check_lengths(k, starts_k, longest_k)
        parts_q = q.split(starts_q.diff().tolist())
        parts_k, parts_v = (x.split(starts_k.diff().tolist()) for x in (k, v))
        return torch.cat([attend(*part, scale, causal) for part in zip(parts_q, parts_k, parts_v, strict=True)])

    def second(self) -> list:
        """Functions of `flash_attn`."""

        def flash_attn_func(
            q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
            alibi_slopes=None, deterministic=False, return_attn_probs=False,
        ):  # fmt: skip
            assert (dropout_p, window_size, softcap, alibi_slopes, return_attn_probs) == (0, (-1, -1), 0, None, False)
            return self.dense(q, k, v, softmax_scale, causal)

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
            causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
            return_attn_probs=False, block_table=None,
        ):  # fmt: skip
            assert (dropout_p, window_size, softcap, alibi_slopes, block_table) == (0, (-1, -1), 0, None, None)
            return self.varlen(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
            )  # fmt: skip

        return [flash_attn_func, flash_attn_varlen_func, self._with_kvcache()]

    def third(self) -> list:
        """Functions of `flash_attn_interface`, which know of no dropout."""

        def flash_attn_func(
            q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0, return_attn_probs=False,
        ):  # fmt: skip
            assert (window_size, softcap) == ((-1, -1), 0)
            return self.dense(q, k, v, softmax_scale, causal)

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
            softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
            window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
            sm_margin=0, return_attn_probs=False,
        ):  # fmt: skip
            assert (window_size, softcap, seqused_q, seqused_k) == ((-1, -1), 0, None, None)
            return self.varlen(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
            )  # fmt: skip

        return [flash_attn_func, flash_attn_varlen_func, self._with_kvcache()]

    def _with_kvcache(self):
        def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, **kwargs):
            raise NotImplementedError

        return flash_attn_with_kvcache


def _module(name, functions):
    module = ModuleType(name)
    # libraries ask of what is installed
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for function in functions:
        setattr(module, function.__name__, function)
    return module


@contextmanager
def stand_in_flash(dtypes=(*HALF, torch.float32, torch.float64)) -> Iterator[StandIn]:
    """Let models be set to any of `FLASH`; real kernels take `HALF` alone."""
    kernels = StandIn(dtypes)
    padding = _module("flash_attn.bert_padding", [])
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    modules = {
        "flash_attn": _module("flash_attn", kernels.second()),
        "flash_attn.bert_padding": padding,
        "flash_attn_interface": _module("flash_attn_interface", kernels.third()),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        # what is found on a machine with a GPU
        patch.setattr(flash_utils, "is_flash_attn_2_available", lambda: True)
        patch.setattr(flash_utils, "is_flash_attn_3_available", lambda: True)
        for version in (2, 3):
            matrix = flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[version]
            patch.setitem(matrix, "general_availability_check", lambda: True)
        patch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *args, **kwargs: True)
        # the Hub
        patch.setattr(hub_kernels, "is_kernels_available", lambda: True)
        patch.setattr(hub_kernels, "get_kernel", lambda *args, **kwargs: _module("kernel", kernels.second()))
        patch.setattr(flash_utils, "_loaded_implementation", None)
        for name in ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
            patch.setattr(flash_utils, name, None)
        for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
            patch.setattr(flash_utils, name, None)
        try:
            yield kernels
        finally:
            for interface in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
                interface._global_mapping.pop(KERNEL, None)


__all__ = ["FLASH", "HALF", "KERNEL", "StandIn", "attend", "stand_in_flash"]
