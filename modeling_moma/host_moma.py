# SPDX-License-Identifier: Apache-2.0
"""Where the host reads a tensor without waiting for a device."""

import torch


# types of devices whose memory is the host's
HOSTS = ("cpu",)


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether `tensor.tolist()` costs no wait for work that a device has not done yet."""
    return tensor.device.type in HOSTS


__all__ = ["is_on_host"]
