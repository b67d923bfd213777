# SPDX-License-Identifier: Apache-2.0
"""Check of weights before they are used."""

import torch
from torch import nn


def refuse_non_finite(model: nn.Module, source: str):
    """Refuse a model whose parameters or buffers hold NaN or infinity.

    Args:
        model: The loaded model.
        source: Where it came from, for the message.

    Raises:
        ValueError: names the first such tensor.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{source}: the tensor {name!r} holds NaN or infinite values ({count} of {tensor.numel()}). The "
                "training run has diverged, or the file is damaged."
            )


__all__ = ["refuse_non_finite"]
