# SPDX-License-Identifier: Apache-2.0
"""Products of the few rows of a step on a CPU, with the weights on their left.

oneDNN wants the right operand of a bf16 product in an order of its own: to bring a few rows into it costs less than a
layer's weights (`python -m benchmarks.decode_parts`).

Shape suffixes:
    N rows, I inputs, O outputs.
"""

import torch
from torch import nn

from .host_moma import is_on_host, multiplies_with, product_dtype
from .onlookers_moma import is_hooked


# rows from which on it costs more to bring their outputs back into order
_MANY_ROWS = 65
# rows below which a CPU without matrix units multiplies faster with weights on the right
_FEW_ROWS = 16


def project(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`linear(x)`, of the few rows of a step by the faster way.

    What is more than a product with a plain weight is called: modules of other classes or with hooks, quantised and
    distributed weights, whatever trains.

    Args:
        linear (`nn.Module`): most often an `nn.Linear`.
        x (`torch.Tensor`): `[..., I]`.

    Returns:
        `torch.Tensor`: `[..., O]`, perhaps a view of `[O, N]`.
    """
    # first what is decided soonest, as a step has dozens of these, and before a compiler sees a number of rows
    if x.dtype != torch.bfloat16 or torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_on_host(x):
        return linear(x)
    num_rows = x.shape[:-1].numel()
    if not 0 < num_rows < _MANY_ROWS or not wants_weights_left(num_rows):
        return linear(x)
    weight_OI = _plain_weight(linear)
    # autocast to another type knows nothing of `mv`
    if weight_OI is None or product_dtype(weight_OI) != weight_OI.dtype:
        return linear(x)
    x_NI = x.reshape(num_rows, x.shape[-1])
    if num_rows == 1:
        # products with a vector read weights faster than those with a matrix of one column
        y_NO = torch.mv(weight_OI, x_NI[0])
    else:
        y_NO = torch.mm(weight_OI, x_NI.t()).t()
    return y_NO.view(*x.shape[:-1], weight_OI.shape[0])


def wants_weights_left(num_rows: int) -> bool:
    """Whether bf16 products of so many rows are faster on this CPU with a layer's weights on their left.

    Args:
        num_rows (`int`): `N`.
    """
    if multiplies_with("amx_bf16"):
        return True
    return _FEW_ROWS <= num_rows < _MANY_ROWS and multiplies_with("avx512_bf16")


def _plain_weight(linear: nn.Module) -> torch.Tensor | None:
    """The weight `[O, I]` in bf16 of a module that, outside of training, does nothing but multiply with it."""
    if type(linear) is not nn.Linear or linear.training or is_hooked(linear):
        return None
    # a module looks its parameters up in three places when asked for them by name; what shards weights, or computes
    # them, keeps them elsewhere
    parameters = linear._parameters
    weight = parameters.get("weight")
    is_plain = type(weight) is nn.Parameter and weight.dtype == torch.bfloat16
    return weight if is_plain and "bias" in parameters and parameters["bias"] is None else None


__all__ = ["project", "wants_weights_left"]
