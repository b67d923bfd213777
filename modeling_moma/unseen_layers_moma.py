# SPDX-License-Identifier: Apache-2.0
"""Inference mode for a `generate` on a CPU, as far as nobody sees what it makes.

Tensors of inference mode know no versions and take no part in gradients, so that small operations start sooner.
Whoever gets hold of one can neither train on it nor write to it: it stays between the layers and in the call's cache,
or, where nothing of the caller's runs in between, in the call.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from .host_moma import HOSTS
from .onlookers_moma import is_watched


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# caches that a call of `generate` makes for itself and leaves to nobody
_OWN_CACHES = (None, "dynamic")
# arguments that bring a cache in, let others than the stock loops call the model, or crop caches between its calls
_SHARED = ("cache", "past_key_values", "custom_generate", "assistant_model")
# the same, where configurations may name them
_OPTIONS = ("return_dict_in_generate", "prompt_lookup_num_tokens", "assistant_early_exit")

# arguments by which something of the caller's runs between two steps
_BETWEEN = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer")

_are_unseen: ContextVar[bool] = ContextVar("are_unseen", default=False)


@contextmanager
def unseen_layers(model: "PreTrainedModel", option: Callable[[str], Any], arguments: dict[str, Any]) -> Iterator[None]:
    """Say for a call of `generate` whether anybody sees what its layers make.

    Args:
        model (`PreTrainedModel`): whose `generate` it is.
        option (`Callable`): gives what the call's arguments, or else its configurations, say of a name.
        arguments (`dict`): the call's.
    """
    is_shared = any(arguments.get(name) is not None for name in _SHARED) or any(map(option, _OPTIONS))
    are_unseen = not is_shared and option("cache_implementation") in _OWN_CACHES and not is_watched(model, arguments)
    token = _are_unseen.set(are_unseen and model.device.type in HOSTS)
    try:
        yield
    finally:
        _are_unseen.reset(token)


def call_mode(model: "PreTrainedModel", arguments: dict[str, Any]) -> AbstractContextManager:
    """Inference mode for a whole `generate` whose layers nobody sees, and whose steps nobody comes between.

    Args:
        model (`PreTrainedModel`): whose `generate` it is.
        arguments (`dict`): the caller's, without what was added to them.
    """
    # lists may be there and empty
    is_seen = any(arguments.get(name) not in (None, []) for name in _BETWEEN)
    # scaled rotary embeddings may keep what they compute in a forward
    keeps = model.config.rope_parameters["rope_type"] != "default"
    return nullcontext() if is_seen or keeps or not _are_unseen.get() else torch.inference_mode()


def layer_mode() -> AbstractContextManager:
    """Inference mode inside of a `generate` whose layers nobody sees, else nothing."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _are_unseen.get():
        return nullcontext()
    return torch.inference_mode()


__all__ = ["call_mode", "layer_mode", "unseen_layers"]
