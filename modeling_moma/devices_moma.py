# SPDX-License-Identifier: Apache-2.0
"""What the files of the model ask of tensors and of torch before they choose how to compute."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


_CPU = ("cpu",)


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """Return whether `tensor.tolist()` costs no device sync."""
    return tensor.device.type in _CPU


def matmul_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the type in which a matmul with a weight is computed, autocast or not."""
    device_type = weight.device.type
    # `is_autocast_enabled` raises for the meta device
    is_cast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if is_cast else weight.dtype


def are_plain(*weights: torch.Tensor) -> bool:
    """Return whether weights are plain tensors: neither quantised nor sharded over processes."""
    return all(type(weight) in (torch.Tensor, nn.Parameter) for weight in weights)


def is_transformed() -> bool:
    """Return whether operations are compiled, or stand within `torch.func`, which has no rule for our backwards."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def gradients_again(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor | None]:
    """Return gradients that can be differentiated themselves, by the plain operations."""
    wanted = [x for x in inputs if x.requires_grad]
    with torch.enable_grad():
        # experts that got no rows have no gradient
        found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


def moved(tensor: torch.Tensor | None, device: torch.device, non_blocking: bool) -> Any:
    """Return a tensor on another device, and nothing for nothing."""
    return None if tensor is None else tensor.to(device, non_blocking=non_blocking)
