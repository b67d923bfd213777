# SPDX-License-Identifier: Apache-2.0
"""What runs faster on a CPU than the classes of the model as they are written, and gives what they give.

Layers are exchanged by [`use_cpu_layers`], which every model calls when it is built: a layer gets a class of the same
mathematics, whose forward falls back to that of the plain class wherever something is not as it wants it (another
device, another type, gradients, a compiler), so that models may be moved, trained, wrapped and saved as before.
[`run_sequentially`] is what the experts implementation `"moma"` does on a CPU. What each gains stands in
`benchmarks/reports/2026-11-27-what-was-tried-cpu.md`.

Shape suffixes:
    B rows, H heads, G key heads, S stored tokens or keys, T new tokens, d head size; N rows, I inputs, O outputs of a
    linear layer; P (token, expert) pairs, expert by expert, K pairs of one expert, D hidden size, E experts of the
    group, F inner width of one expert, W = 2 * F; R positions and heads of packed documents, M places of all their
    tiles, Z tiles of a group, P places of a tile.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_moma import MomaConfig
from .devices_moma import are_plain, gradients_again, is_on_cpu, is_transformed, matmul_dtype


# environment variable that limits the instructions of oneDNN, which does matmuls in half precision
_MAX_ISA = "ONEDNN_MAX_CPU_ISA"
_HALVES = (torch.bfloat16, torch.float16)


@cache
def has_instructions(name: str) -> bool:
    """Return whether the CPU has instructions that torch knows by a name, as `"amx_bf16"`, of matrix units."""
    return bool(torch.cpu.get_capabilities().get(name))


@cache
def multiplies_with(name: str) -> bool:
    """Return whether matmuls in half precision use such instructions: matrix units may be kept from oneDNN."""
    max_isa = os.environ.get(_MAX_ISA, "AMX").upper()
    is_kept = name.startswith("amx") and max_isa != "DEFAULT" and "AMX" not in max_isa
    return has_instructions(name) and not is_kept


def _is_inference() -> bool:
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


# from so many rows on, transposing the output costs more than the faster matmul saves
_MANY_ROWS = 65
# below so many rows, a CPU without matrix units is faster with the weight on the right
_FEW_ROWS = 16


def wants_weights_left(num_rows: int) -> bool:
    """Return whether bf16 matmuls of so many rows are faster on this CPU with a layer's weights on their left."""
    if multiplies_with("amx_bf16"):
        return True
    return _FEW_ROWS <= num_rows < _MANY_ROWS and multiplies_with("avx512_bf16")


class MomaCpuLinear(nn.Linear):
    """`nn.Linear` with the weights on the left, for the few rows of a step of decoding.

    oneDNN wants the right operand of a bf16 matmul in an order of its own: to bring a few rows into it costs less than
    a layer's weights (`benchmarks/reports/2026-11-27-what-was-tried-cpu.md`).
    """

    plain = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `[..., I]` to `[..., O]`, perhaps a view of `[O, N]`."""
        # cheapest tests first, as a step has dozens of calls; the number of rows last, as compilers specialise on it
        if input.dtype != torch.bfloat16 or self.training or not _is_inference() or not is_on_cpu(input):
            return super().forward(input)
        num_rows = math.prod(input.shape[:-1])
        if not 0 < num_rows < _MANY_ROWS or not wants_weights_left(num_rows):
            return super().forward(input)
        # sharded and parametrised layers have no plain `weight`
        weight_OI: Any = getattr(self, "weight", None)
        is_plain = type(weight_OI) is nn.Parameter and weight_OI.dtype == torch.bfloat16 and self.bias is None
        # autocast to another dtype does not cast the inputs of `mv`
        if not is_plain or matmul_dtype(weight_OI) != weight_OI.dtype:
            return super().forward(input)
        return _from_left(input.reshape(num_rows, -1), weight_OI).view(*input.shape[:-1], -1)


def _from_left(x_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """Return `[N, O]`, a view of `[O, N]`."""
    # `mv` reads weights faster than `mm` with one column, and autocast does not cast its inputs
    if x_NI.shape[0] == 1 and x_NI.dtype == weight_OI.dtype:
        return torch.mv(weight_OI, x_NI.flatten()).unsqueeze(0)
    return torch.mm(weight_OI, x_NI.t()).t()


# elements of a chunk of a norm in training: small enough to stay in the CPU's caches through all operations
_NORM_ELEMENTS = 2**16
_TRAINED = (torch.float32, torch.bfloat16)


class CpuRMSNorm(nn.Module):
    """An RMSNorm with `weight` and `variance_epsilon` that goes through memory once in training, and its gradient."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `[..., D]` to `[..., D]`."""
        values = hidden_states, self.weight
        may_chunk = all(x.dtype in _TRAINED and is_on_cpu(x) for x in values) and are_plain(*values)
        if not self.training or not may_chunk or is_transformed():
            return super().forward(hidden_states)
        return _ChunkedNorm.apply(hidden_states, self.weight, self.variance_epsilon, super().forward)


class _ChunkedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight_D: torch.Tensor, eps: float, plain: Callable):
        size = x.shape[-1]
        x_ND = x.reshape(-1, size)
        scale_N1 = x_ND.new_empty(x_ND.shape[0], 1, dtype=torch.float32)
        y_ND = x_ND.new_empty(x_ND.shape, dtype=torch.promote_types(x.dtype, weight_D.dtype))
        rows = max(1, _NORM_ELEMENTS // size)
        # n rows at a time
        for x_nD, scale_n1, y_nD in zip(*(each.split(rows) for each in (x_ND, scale_N1, y_ND))):
            wide_nD = x_nD.float()
            torch.mean(wide_nD.square(), -1, keepdim=True, out=scale_n1)
            scale_n1.add_(eps).rsqrt_()
            torch.mul((wide_nD * scale_n1).to(x.dtype), weight_D, out=y_nD)
        ctx.save_for_backward(x, weight_D, scale_N1)
        ctx.plain = plain
        return y_ND.view(x.shape)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight_D, scale_N1 = ctx.saved_tensors
        size = x.shape[-1]
        # with `create_graph`
        if torch.is_grad_enabled():
            return *gradients_again(lambda x, weight_D: ctx.plain(x), (x, weight_D), grad), None, None
        x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dtype, weight_D, weight_grad_D = weight_D.dtype, weight_D.float(), x.new_zeros(size, dtype=torch.float32)
        rows = max(1, _NORM_ELEMENTS // size)
        values = x.reshape(-1, size), grad.reshape(-1, size), scale_N1, x_grad.view(-1, size)
        for x_nD, grad_nD, scale_n1, x_grad_nD in zip(*(each.split(rows) for each in values)):
            normed_nD, grad_nD = x_nD * scale_n1, grad_nD.float()
            products_nD = grad_nD * normed_nD
            weight_grad_D += products_nD.sum(0)
            share_n1 = torch.mv(products_nD, weight_D / size).unsqueeze(1)
            x_grad_nD.copy_((grad_nD * weight_D).addcmul_(normed_nD, share_n1, value=-1).mul_(scale_n1))
        return x_grad, weight_grad_D.to(dtype), None, None


# on CPUs with these instructions torch's own attention kernel is faster
_ATTENTION_INSTRUCTIONS = {torch.bfloat16: "amx_bf16", torch.float16: "avx512_fp16"}
# name under which the attention is registered, for `model.set_attn_implementation("moma_cpu")`
CPU_ATTENTION = "moma_cpu"
# elements of keys that are cast to fp32 at a time, so that the copy stays in the CPU's caches
_CHUNK_ELEMENTS = 2**19


class CpuAttention(nn.Module):
    """An attention layer with documents and steps by themselves."""

    config: Any

    def attention_implementation(self) -> str:
        """Return the implementation of the plain class, with [`cpu_attention_forward`] in place of `"sdpa"`."""
        name = super().attention_implementation()  # pyright: ignore[reportAttributeAccessIssue]
        is_wanted = name == "sdpa" and not torch.compiler.is_compiling() and (self.training or _lacks_instructions())
        return CPU_ATTENTION if is_wanted else name


def _lacks_instructions() -> bool:
    return not all(map(has_instructions, _ATTENTION_INSTRUCTIONS.values()))


def cpu_attention_forward(
    module: nn.Module,
    query_BHTd: torch.Tensor,
    key_BGSd: torch.Tensor,
    value_BGSd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    tiles: "DocumentTiles | None" = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the library's `"sdpa"`, or what is faster: documents by themselves, or one query of each row in fp32.

    In training on packed rows of short documents most scores are those between documents, which no output needs: see
    [`DocumentTiles`].

    Steps of one query in each row are computed in fp32, a few rows at a time: torch's matmul of one query with
    half-precision keys takes 1.6 to 3.4 times as long as widening them first on a CPU that has no instructions for
    it, and a fifth to a half of that on one that has (`benchmarks/reports/2026-11-27-what-was-tried-cpu.md`).
    """
    attention: Callable = ALL_ATTENTION_FUNCTIONS["sdpa"]
    dtype = query_BHTd.dtype
    # tiles were made for all heads; tensor parallelism leaves fewer on a process
    is_whole = tiles is not None and tiles.place_R.shape[0] == query_BHTd.shape[:3].numel()
    if tiles is not None and is_whole and is_on_cpu(query_BHTd):
        scaling = kwargs.get("scaling")
        scaling = query_BHTd.shape[-1] ** -0.5 if scaling is None else scaling
        # autocast does not cast float64
        dtype = dtype if dtype == torch.float64 else matmul_dtype(query_BHTd)
        with torch.autocast("cpu", enabled=False):
            return _ByDocument.apply(query_BHTd, key_BGSd, value_BGSd, tiles, scaling, dtype), None
    is_step = query_BHTd.shape[2] == 1 and dtype in _HALVES and is_on_cpu(query_BHTd) and _is_inference()
    if not is_step or has_instructions(_ATTENTION_INSTRUCTIONS[dtype]):
        return attention(module, query_BHTd, key_BGSd, value_BGSd, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    num_rows, parts = query_BHTd.shape[0], []
    rows_at_once = max(1, _CHUNK_ELEMENTS // max(key_BGSd.numel() // num_rows, 1))
    for first in range(0, num_rows, rows_at_once):
        rows = slice(first, first + rows_at_once)
        mask = attention_mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[rows]
        query, key, value = (x[rows].float() for x in (query_BHTd, key_BGSd, value_BGSd))
        parts.append(attention(module, query, key, value, mask, **kwargs)[0])
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype), None


ALL_ATTENTION_FUNCTIONS.register(CPU_ATTENTION, cpu_attention_forward)
# an attention without an entry among mask functions gets no mask at all
ALL_MASK_ATTENTION_FUNCTIONS.register(CPU_ATTENTION, sdpa_mask)


# a tile has a multiple of so many positions
_TILE_STEP = 16
# attention scores of a group of tiles: few enough to stay in the CPU's caches from the matmul to the softmax
_GROUP_SCORES = 2**18
# cost of a score in a tile, of a position in a tile, and of a group, in units of one score of masked attention
_SCORE_COST, _PLACE_COST, _GROUP_COST = 1.4, 40, 2**14
# attention weights per position kept for the backward, at most so many times the head size
_MOST_KEPT = 8


def groups_of_like_length(lengths: Sequence[int], num_heads: int) -> list[tuple[int, int]]:
    """Return how many documents each group has, and the places of its tiles."""
    groups, begin = [], 0
    while begin < len(lengths):
        longest = lengths[begin]
        places = -(-longest // _TILE_STEP) * _TILE_STEP
        # a group ends when it is full, or when the next document would leave more than an eighth of its tile empty
        last = begin + max(1, _GROUP_SCORES // (num_heads * places**2))
        end = begin + 1
        while end < min(last, len(lengths)) and longest - lengths[end] <= max(_TILE_STEP, longest // 8):
            end += 1
        groups.append((end - begin, places))
        begin = end
    return groups


@dataclass
class DocumentTiles:
    """Where the tokens of packed documents lie for attention: one tile for each document and head, in groups.

    The tiles of a group have places for its longest document. What lies behind a document's end, where none of its
    queries sees it, repeats its last token: nothing of one document enters what is computed for another, be it
    infinite.
    """

    groups: list[tuple[int, int]]
    query_M: torch.Tensor
    key_M: torch.Tensor
    behind: torch.Tensor
    place_R: torch.Tensor
    padding: torch.Tensor | None

    @classmethod
    def of(
        cls, document_BT: torch.Tensor, padding_BT: torch.Tensor | None, num_heads: int, num_key_heads: int, size: int
    ) -> "DocumentTiles | None":
        """Lay documents out, unless attention with a mask takes no longer, or what is to be kept is much.

        So it is with long documents, with few in a row, and with those that fill a small part of their tiles.
        """
        num_rows, length = document_BT.shape
        # the number of a document is lower than that of positions
        document_N = (document_BT + torch.arange(num_rows).unsqueeze(1) * length).flatten()
        token_N = torch.arange(document_N.shape[0])
        if padding_BT is not None:
            token_N = (~padding_BT).flatten().nonzero().squeeze(1)
        count_E = document_N.index_select(0, token_N).unique_consecutive(return_counts=True)[1]
        begin_E = count_E.cumsum(0) - count_E
        count_E, order_E = count_E.sort(descending=True, stable=True)
        groups = groups_of_like_length(count_E.tolist(), num_heads)
        num_places = sum(number * places for number, places in groups)
        num_scores = sum(number * places**2 for number, places in groups)
        cost = num_heads * (_SCORE_COST * num_scores + _PLACE_COST * num_places) + _GROUP_COST * len(groups)
        if cost >= num_heads * num_rows * length**2 or num_scores > _MOST_KEPT * size * num_places or not groups:
            return None
        head_H1 = torch.arange(num_heads).unsqueeze(1)
        key_head_H1 = head_H1 // (num_heads // num_key_heads)
        numbers = [number for number, _ in groups]
        query, key, behind = [], [], []
        for (number, places), begin_n, count_n in zip(groups, begin_E[order_E].split(numbers), count_E.split(numbers)):
            place_P, last_n1 = torch.arange(places), count_n.unsqueeze(1) - 1
            token_n1P = token_N[begin_n.unsqueeze(1) + torch.minimum(place_P, last_n1)].unsqueeze(1)
            query.append((token_n1P * num_heads + head_H1).flatten())
            key.append((token_n1P * num_key_heads + key_head_H1).flatten())
            behind.append((place_P > last_n1).unsqueeze(1).expand(number, num_heads, places).flatten())
        query_M, behind_M = torch.cat(query), torch.cat(behind)
        place = (~behind_M).nonzero().squeeze(1)
        num_outputs = document_BT.numel() * num_heads
        place_R = place.new_zeros(num_outputs).index_copy_(0, query_M.index_select(0, place), place)
        padding = None
        if place.shape[0] < num_outputs:
            is_padding_R = torch.ones(num_outputs, dtype=torch.bool).index_fill_(0, query_M, False)
            padding = is_padding_R.nonzero().squeeze(1)
        tiles = [(number * num_heads, places) for number, places in groups]
        return cls(tiles, query_M, torch.cat(key), behind_M.nonzero().squeeze(1), place_R, padding)

    def parts(self, *values: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Give of values at all places, `[M, d]`, those of each group, `[Z, P, d]`."""
        begin = 0
        for number, places in self.groups:
            rows = slice(begin, begin + number * places)
            yield tuple(x_Md[rows].view(number, places, -1) for x_Md in values)
            begin = rows.stop

    def scores(self, scores_flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Give of the scores in all tiles those of each group, `[Z, P, P]`."""
        sizes = [number * places**2 for number, places in self.groups]
        for (number, places), part in zip(self.groups, scores_flat.split(sizes)):
            yield part.view(number, places, places)

    def take_back(self, x_Md: torch.Tensor) -> torch.Tensor:
        """Return the values of each position and head, `[R, d]`."""
        x_Rd = x_Md.index_select(0, self.place_R)
        return x_Rd if self.padding is None else x_Rd.index_fill_(0, self.padding, 0.0)


def tiles_of(
    config: MomaConfig, inputs_BTD: torch.Tensor, document_BT: torch.Tensor, padding_BT: torch.Tensor | None
) -> DocumentTiles | None:
    """Lay packed documents out for all layers of a training step, `None` where the library's attention is as good."""
    is_wanted = config._attn_implementation == "sdpa" and not config.attention_dropout and is_on_cpu(inputs_BTD)
    if not is_wanted or is_transformed() or matmul_dtype(inputs_BTD) == torch.float16:
        return None
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return DocumentTiles.of(document_BT, padding_BT, *heads)


class _ByDocument(torch.autograd.Function):
    """Causal attention of each document by itself, as batched matmuls with a softmax."""

    @staticmethod
    def forward(
        ctx,
        query_BHTd: torch.Tensor,
        key_BGTd: torch.Tensor,
        value_BGTd: torch.Tensor,
        tiles: DocumentTiles,
        scaling: float,
        dtype: torch.dtype,
    ):
        rows = (_rows(query_BHTd) * scaling, _rows(key_BGTd), _rows(value_BGTd))
        of_rows = (tiles.query_M, tiles.key_M, tiles.key_M)
        query_Md, key_Md, value_Md = (x_Rd.to(dtype).index_select(0, row_M) for x_Rd, row_M in zip(rows, of_rows))
        output_Md = torch.empty_like(query_Md)
        num_scores = sum(number * places**2 for number, places in tiles.groups)
        weights_flat = query_Md.new_empty(num_scores)
        parts = tiles.parts(query_Md, key_Md, value_Md, output_Md)
        for weights_ZPP, (query_ZPd, key_ZPd, value_ZPd, output_ZPd) in zip(tiles.scores(weights_flat), parts):
            scores_ZPP = torch.bmm(query_ZPd, key_ZPd.mT)
            # causal: scores of later positions become -inf
            scores_ZPP += torch.full_like(scores_ZPP[0], -torch.inf).triu_(1)
            torch.softmax(scores_ZPP, -1, out=weights_ZPP)
            torch.bmm(weights_ZPP, value_ZPd, out=output_ZPd)
        ctx.tiles, ctx.scaling = tiles, scaling
        ctx.dtypes = [x.dtype for x in (query_BHTd, key_BGTd, value_BGTd)]
        ctx.num_key_heads = key_BGTd.shape[1]
        ctx.save_for_backward(query_Md, key_Md, value_Md, weights_flat)
        num_rows, num_heads, length, size = query_BHTd.shape
        return tiles.take_back(output_Md).view(num_rows, length, num_heads, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BTHd: torch.Tensor):
        query_Md, key_Md, value_Md, weights_flat = ctx.saved_tensors
        tiles: DocumentTiles = ctx.tiles
        grad_Md = grad_BTHd.reshape(-1, grad_BTHd.shape[-1]).to(query_Md.dtype).index_select(0, tiles.query_M)
        grad_Md.index_fill_(0, tiles.behind, 0.0)
        grads = [torch.empty_like(query_Md) for _ in range(3)]
        parts = tiles.parts(query_Md, key_Md, value_Md, grad_Md, *grads)
        for weights_ZPP, (query_ZPd, key_ZPd, value_ZPd, grad_ZPd, *grads_ZPd) in zip(
            tiles.scores(weights_flat), parts
        ):
            weights_grad_ZPP = torch.bmm(grad_ZPd, value_ZPd.mT)
            # backward of the softmax
            scores_grad_ZPP = weights_grad_ZPP.mul_(weights_ZPP)
            scores_grad_ZPP -= weights_ZPP * scores_grad_ZPP.sum(-1, keepdim=True)
            torch.bmm(scores_grad_ZPP, key_ZPd, out=grads_ZPd[0])
            torch.bmm(scores_grad_ZPP.mT, query_ZPd, out=grads_ZPd[1])
            torch.bmm(weights_ZPP.mT, grad_ZPd, out=grads_ZPd[2])
        query_grad, key_grad, value_grad = (
            tiles.take_back(grad_Md).view_as(grad_BTHd).to(dtype) for grad_Md, dtype in zip(grads, ctx.dtypes)
        )
        if ctx.num_key_heads < grad_BTHd.shape[2]:
            key_grad, value_grad = (x.unflatten(2, (ctx.num_key_heads, -1)).sum(3) for x in (key_grad, value_grad))
        query_grad *= ctx.scaling
        return query_grad.transpose(1, 2), key_grad.transpose(1, 2), value_grad.transpose(1, 2), None, None, None


def _rows(x_BHTd: torch.Tensor) -> torch.Tensor:
    """Return one row for each position and head, `[R, d]`."""
    return x_BHTd.transpose(1, 2).reshape(-1, x_BHTd.shape[-1])


def run_sequentially(experts: Any, rows_PD: torch.Tensor, expert_P: torch.Tensor, has_backward: bool) -> torch.Tensor:
    """Run SwiGLU experts one by one: each one's weights are read once, and what it computes stays in the caches.

    With a backward every expert runs, with zero rows if need be, and what autocast casts is cast for one expert at a
    time.
    """
    counts = _rows_of_experts(expert_P, experts.num_experts)
    gate_up_EWD, down_EDF, act_fn = experts.gate_up_proj, experts.down_proj, experts.act_fn
    is_plain_half = matmul_dtype(down_EDF) == torch.bfloat16 and are_plain(gate_up_EWD, down_EDF)
    if has_backward:
        rows_PD = rows_PD.to(matmul_dtype(gate_up_EWD))
        # `unbind` gives one gradient for all experts, where slicing would give a full-size one for each
        gate_up_EWD, down_EDF = gate_up_EWD.unbind(), down_EDF.unbind()
    parts = []
    for expert, rows_KD in enumerate(rows_PD.split(counts)):
        if expert >= experts.num_experts:
            parts.append(torch.zeros_like(rows_KD))
        elif has_backward:
            parts.append(_swiglu(_CastLinear.apply, rows_KD, gate_up_EWD[expert], down_EDF[expert], act_fn))
        elif rows_KD.shape[0] and is_plain_half and wants_weights_left(rows_KD.shape[0]):
            parts.append(_swiglu(_from_left, rows_KD, gate_up_EWD[expert], down_EDF[expert], act_fn))
        elif rows_KD.shape[0]:
            parts.append(experts.run_expert(expert, rows_KD))
    return torch.cat(parts) if parts else torch.zeros_like(rows_PD)


def _rows_of_experts(expert_P: torch.Tensor, num_experts: int) -> list[int]:
    """Return how many rows each expert has, and as one more count those of experts elsewhere."""
    # one device sync; `bincount` has three
    experts_E = torch.arange(num_experts, device=expert_P.device)
    ends = [0, *torch.searchsorted(expert_P, experts_E, right=True).tolist(), expert_P.numel()]
    return [end - begin for begin, end in zip(ends, ends[1:])]


def _swiglu(
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x_KD: torch.Tensor,
    gate_up_WD: torch.Tensor,
    down_DF: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    gate_KF, up_KF = multiply(x_KD, gate_up_WD).chunk(2, dim=-1)
    return multiply(act_fn(gate_KF) * up_KF, down_DF)


class _CastLinear(torch.autograd.Function):
    """A linear layer that casts its weight again in the backward: no copy of it is kept in between."""

    # makes the function usable within `torch.func`
    generate_vmap_rule = True

    @staticmethod
    def forward(x_KI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
        return torch.mm(weight_OI.to(x_KI.dtype), x_KI.t()).t()

    @staticmethod
    def setup_context(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_KO: torch.Tensor):
        x_KI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        x_grad_KI = grad_KO @ weight_OI.to(grad_KO.dtype) if needs_x else None
        return x_grad_KI, (grad_KO.t() @ x_KI).to(weight_OI.dtype) if needs_weight else None


# classes by name, since the model's file imports this one
_MIXINS = {"MomaRMSNorm": CpuRMSNorm, "MomaAttention": CpuAttention, "MomaUntiedAttention": CpuAttention}


@cache
def cpu_form_of(plain: type[nn.Module]) -> type[nn.Module] | None:
    """Return the subclass with the same state that [`use_cpu_layers`] puts in a class's place, if there is one."""
    if plain is nn.Linear:
        return MomaCpuLinear
    if plain.__name__ not in _MIXINS:
        return None
    fields = {"__module__": __name__, "__reduce__": _reduced, "plain": plain}
    return type(f"Cpu{plain.__name__}", (_MIXINS[plain.__name__], plain), fields)


def _reduced(layer: Any) -> tuple:
    """Pickle by the plain class: the other one is made when it is needed."""
    return _restored, (layer.plain,), layer.__dict__


def _restored(plain: type[nn.Module]) -> nn.Module:
    form: Any = cpu_form_of(plain)
    return form.__new__(form)


def use_cpu_layers(model: nn.Module, enabled: bool = True):
    """Exchange the classes of a model's layers for their forms for CPUs, in place, or give them their own back.

    Layers of any other class, subclasses included, stay as they are. A second call changes nothing.
    """
    for module in model.modules():
        kind = type(module)
        form = cpu_form_of(kind) if enabled else getattr(kind, "plain", None)
        if form is not None:
            # `kernels` may have bound the old class's forward to the instance, which would hide the new one
            if getattr(vars(module).get("forward"), "__func__", None) is kind.forward:
                del module.forward
            module.__class__ = form
