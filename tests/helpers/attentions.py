# SPDX-License-Identifier: Apache-2.0
"""All kinds of attention on a CPU: flash attention by a stand-in, flex attention without its compiler."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.attention.flex_attention as flex

from helpers.flash import FLASH, StandIn, stand_in_flash


ATTENTIONS = ("eager", "sdpa", *FLASH, "flex_attention")


@contextmanager
def every_attention(**arguments) -> Iterator[StandIn]:
    """Let models be set to any of `ATTENTIONS`; `arguments` are those of `stand_in_flash`."""
    with pytest.MonkeyPatch.context() as patch, stand_in_flash(**arguments) as kernels:
        # it refuses gradients on CPUs, which what it falls back to without a compiler has
        patch.setattr(flex, "_validate_device", lambda *args: None)
        with torch.compiler.set_stance("force_eager"):
            yield kernels


__all__ = ["ATTENTIONS", "every_attention"]
