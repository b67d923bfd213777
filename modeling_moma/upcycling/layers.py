# SPDX-License-Identifier: Apache-2.0
"""A trained model grows layers: copies of some of its own that add nothing at first (LLaMA Pro, arXiv 2401.02415)."""

import re
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy

import torch
from transformers import AutoModelForCausalLM

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError
from ..modeling_moma import MomaForCausalLM


_LAYER = re.compile(r"(?P<before>.*\blayers\.)(?P<index>\d+)(?P<after>\..*)")
# the last modules of a layer's residual update, which are zeroed: its post-norms, or else its output projections
# (auxiliary routers have a projection of the same name, which is left alone)
_LAST = {
    "post": re.compile(r".*\.(attention|ffn)_norm\..*"),
    "pre": re.compile(r"(?!.*\.auxiliary\.).*\.(o_proj\.(weight|bias)|down_proj(\.weight)?)"),
}


def _layer_sources(num_layers: int, after: Sequence[int]) -> list[tuple[int, bool]]:
    """Return of which layer each layer of the result is made, and whether it is a copy that begins with nothing."""
    is_list = isinstance(after, Sequence) and len(after) > 0
    if not is_list or not all(type(layer) is int and 0 <= layer < num_layers for layer in after):
        raise InputError(
            f"`after` = {after!r}: give indices of layers, counted from 0, of which the model has {num_layers}."
        )
    copies = Counter(after)
    return [(layer, number > 0) for layer in range(num_layers) for number in range(1 + copies[layer])]


@torch.no_grad()
def add_layers(model: MomaForCausalLM, after: Sequence[int]) -> MomaForCausalLM:
    """Make a deeper model that computes what the given one does: behind some layers stands a copy of theirs.

    A copy adds nothing to the residual stream at first: with `norm_placement="pre"` the projections that lead out of
    its attention and of its networks are zero, with `"post"` its norms. The first step of training moves these alone,
    all else of the copy moves from the second on. Routers, their thresholds and their balance are copied, and the copy
    of a layer with mixture of depths is one, too.

    Args:
        model (`MomaForCausalLM`):
            the source; not changed.
        after (`Sequence[int]`):
            indices of the layers, counted from 0, behind which a copy is put; an index that stands twice gives two.

    Returns:
        `MomaForCausalLM`: with `len(after)` layers more, in the source's dtype, on its device and in its mode.

    Raises:
        ValueError: `after` is empty or names a layer that there is not, or the model is quantised.
    """
    if getattr(model, "is_quantized", False):
        raise InputError("`model` is quantised: give layers to what it was before, and quantise the result.")
    config = model.config
    layers = _layer_sources(config.num_hidden_layers, after)
    fields: dict = {"num_hidden_layers": len(layers)}
    if config.depth_layers is not None:
        fields["depth_layers"] = [layer for layer, (source, _) in enumerate(layers) if source in config.depth_layers]
    deeper_config = MomaConfig.from_dict({**config.to_dict(), **fields})
    attention = config._attn_implementation
    deeper = AutoModelForCausalLM.from_config(deeper_config, dtype=model.dtype, attn_implementation=attention)
    deeper.to(model.device)
    state = model.state_dict()
    for name, tensor in deeper.state_dict().items():
        found = _LAYER.fullmatch(name)
        if found is None:
            tensor.copy_(state[name])
            continue
        source, is_copy = layers[int(found["index"])]
        if is_copy and _LAST[config.norm_placement].fullmatch(name):
            tensor.zero_()
        else:
            tensor.copy_(state[f"{found['before']}{source}{found['after']}"])
    deeper.generation_config = deepcopy(model.generation_config)
    return deeper.train(model.training)
