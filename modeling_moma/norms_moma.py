# SPDX-License-Identifier: Apache-2.0
"""Norms: of the residual stream, and of queries and keys."""

import torch
from torch import nn
from transformers.integrations import use_kernel_forward_from_hub

from .configuration_moma import MomaConfig
from .host_moma import is_on_host, product_dtype


_HALVES = (torch.bfloat16, torch.float16)
# elements that norms take longer to begin with than to compute
_FEW_ELEMENTS = 2**16


@use_kernel_forward_from_hub("RMSNorm")
class MomaRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        if not self.training and _takes_longer_to_begin(hidden_states):
            return self.weight * _normed_by_layer_norm(hidden_states, self.variance_epsilon)
        normed = nn.functional.rms_norm(hidden_states.float(), self.weight.shape, eps=self.variance_epsilon)
        return self.weight * normed.to(dtype)


class MomaHeadLayerNorm(nn.Module):
    """LayerNorm over `head_dim`, with one affine for all heads or one for each (Chameleon's query-key norm)."""

    def __init__(self, shape: tuple[int, ...], eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.layer_norm(hidden_states, self.weight.shape[-1:], eps=self.eps)
        return (normed * self.weight + self.bias).to(hidden_states.dtype)


def _takes_longer_to_begin(hidden_states: torch.Tensor) -> bool:
    """Whether a norm is one of a step on a CPU, whose operations take longer to begin than to compute.

    In half precision alone, where the two ways of norming round alike but in the rarest cases.
    """
    is_step = hidden_states.dtype in _HALVES and hidden_states.numel() <= _FEW_ELEMENTS and is_on_host(hidden_states)
    if not is_step or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # autocast refuses to put tensors of another half precision together
    return product_dtype(hidden_states) == hidden_states.dtype


def _normed_by_layer_norm(hidden_states: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm without weights by torch's kernel of LayerNorm: on CPUs it has none of RMSNorm."""
    # `(x, -x)` has the mean 0, and as variance the mean square of `x`
    size = hidden_states.shape[-1]
    both = torch.cat((hidden_states, -hidden_states), dim=-1)
    return torch.layer_norm(both, (2 * size,), eps=eps).narrow(-1, 0, size)


def query_key_norm(config: MomaConfig, num_heads: int) -> nn.Module:
    """The norm of queries or keys that `config.qk_norm` names.

    Args:
        config (`MomaConfig`): the model's.
        num_heads (`int`): heads of queries, or of keys.
    """
    # CODEPATH: RMSNorm for models trained here, as moma-emoji
    if config.qk_norm == "rmsnorm":
        return MomaRMSNorm(config.head_dim, eps=config.rms_norm_eps)
    # CODEPATH: the presets, as in Chameleon's own code
    if config.qk_norm == "layernorm":
        return MomaHeadLayerNorm((config.head_dim,))
    # CODEPATH: Chameleon checkpoints that were converted to Transformers
    if config.qk_norm == "layernorm_per_head":
        return MomaHeadLayerNorm((num_heads, config.head_dim))
    return nn.Identity()


__all__ = ["MomaHeadLayerNorm", "MomaRMSNorm", "query_key_norm"]
