# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Check of weights before they are used."""

import torch
from torch import nn


def refuse_non_finite(model: nn.Module, source: str):
    """Refuse a model whose parameters or buffers hold NaN or infinity.

    Args:
        model (`nn.Module`):
            The loaded model.
        source (`str`):
            Where it came from, for the message.

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
