# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers whose weights were quantised: their matmuls take all rows of a matrix, and a row at least.

Quantised matmuls know `linear` alone, and torchao and bitsandbytes fail on inputs without rows. A MoMa meets these in
every step: a modality that the batch lacks, an expert that no token chose.
"""

from typing import Any

from torch import nn

from .experts_implementations_moma import takes_quantized


def use_quantized_layers(model: nn.Module):
    """Let the feed-forward layers of a quantised model run as quantised matmuls need it, in place.

    Packed experts then run one after the other (`"eager"`), unless the model was set to another implementation than
    the one that it starts with, and layers without a token run on a row of zeros, so that every rank touches every
    weight, and its adapter's. A second call changes nothing. [`MomaPreTrainedModel.from_pretrained`] calls this
    itself.
    """
    for module in model.modules():
        if not hasattr(type(module), "pad_empty_input"):
            continue
        module.pad_empty_input = True  # pyright: ignore[reportArgumentType]
        config: Any = getattr(module, "config", None)
        if config is not None and not takes_quantized(config):
            # the layers share one configuration, so this sets it for all of them
            config._experts_implementation = "eager"
