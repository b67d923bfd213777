# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers whose weights were quantised: their products take whole matrices, and a row at least.

Quantised products know `linear` alone, and torchao and bitsandbytes fail on inputs without rows. A MoMa meets these in
every step: a modality that the batch lacks, an expert that no token chose.
"""

from torch import nn

from .dispatch_moma import DEFAULT_IMPLEMENTATION
from .experts_moma import MomaExperts, MomaMLP


def use_quantized_layers(model: nn.Module):
    """Let the feed-forward layers of a quantised model run as quantised products need it, in place.

    Packed experts then run one after the other (`"eager"`), unless the model was set to another implementation than
    the one that it starts with, and layers without a token run on a row of zeros, so that every rank touches every
    weight, and its adapter's. A second call changes nothing. [`MomaPreTrainedModel.from_pretrained`] calls this
    itself.

    Args:
        model (`nn.Module`): a MoMa that torchao or bitsandbytes has quantised.
    """
    for module in model.modules():
        if isinstance(module, MomaExperts | MomaMLP):
            module.needs_rows = True
        if isinstance(module, MomaExperts) and module.config._experts_implementation == DEFAULT_IMPLEMENTATION:
            # one config serves all layers, and the check of the public setter would refuse nothing here
            module.config._experts_implementation_internal = "eager"


__all__ = ["use_quantized_layers"]
