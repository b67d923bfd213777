# SPDX-License-Identifier: Apache-2.0
"""What the host can do: read a tensor without waiting for a device, multiply by matrix units; and in which type."""

import os
from functools import cache

import torch


# types of devices whose memory is the host's
HOSTS = ("cpu",)
# the best instructions that oneDNN, which multiplies in half precision, may use
_MAX_ISA = "ONEDNN_MAX_CPU_ISA"


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether `tensor.tolist()` costs no wait for work that a device has not done yet."""
    return tensor.device.type in HOSTS


@cache
def has_instructions(name: str) -> bool:
    """Whether the CPU has instructions that torch knows by a name, as `"amx_bf16"`, of matrix units."""
    return bool(torch.cpu.get_capabilities().get(name))


@cache
def multiplies_with(name: str) -> bool:
    """Whether products in half precision use such instructions: matrix units may be kept from oneDNN."""
    max_isa = os.environ.get(_MAX_ISA, "AMX").upper()
    is_kept = name.startswith("amx") and max_isa != "DEFAULT" and "AMX" not in max_isa
    return has_instructions(name) and not is_kept


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The type in which a product with a weight is computed, autocast or not."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype


__all__ = ["has_instructions", "is_on_host", "multiplies_with", "product_dtype"]
