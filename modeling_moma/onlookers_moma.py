# SPDX-License-Identifier: Apache-2.0
"""Code of the caller's that sees what a module is given and makes: hooks, modes, classes and functions of its own."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as of_all_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# packages whose modules and functions keep no tensor of a step: torch, the library, and this one by the name that it
# is loaded under
_KNOWN = {"torch", "transformers", __name__.partition(".")[0]}
_PLAIN = (torch.Tensor, nn.Parameter)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module does more than the forward of its class.

    Args:
        module (`nn.Module`): any.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or of_all_modules._global_forward_hooks
        or of_all_modules._global_forward_pre_hooks
        or "forward" in vars(module)
    )


def is_watched(model: "PreTrainedModel", arguments: dict[str, Any]) -> bool:
    """Whether code of the caller's sees what layers make, or weights are such as come into being in a forward.

    Args:
        model (`PreTrainedModel`): whose layers.
        arguments (`dict`): what it is called with.
    """
    return (
        getattr(model, "is_quantized", False)
        # who stands in for a method of the model
        or any(callable(getattr(type(model), name, None)) for name in vars(model))
        or any(isinstance(value, torch.Tensor) and type(value) not in _PLAIN for value in arguments.values())
        or _is_traced()
        or any(map(_is_foreign, _interfaces(model)))
        or any(map(_shows, model.modules()))
    )


def _is_traced() -> bool:
    """Whether a mode sees every operation; that of a default device minds only those that make tensors."""
    modes = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
    return bool(modes or _get_current_dispatch_mode_stack())


def _interfaces(model: "PreTrainedModel") -> list[Any]:
    """The functions by which attention and experts run, where they are not those of the classes."""
    attention, experts = model.config._attn_implementation, model.config._experts_implementation
    found = [registry.get(attention) for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
    return [function for function in (*found, ALL_EXPERTS_FUNCTIONS.get(experts)) if function is not None]


def _is_foreign(thing: Any) -> bool:
    """Whether a class or a function is the caller's."""
    return str(getattr(thing, "__module__", None)).partition(".")[0] not in _KNOWN


def _shows(module: nn.Module) -> bool:
    """Whether somebody sees what one module makes, or its weights come into being in a forward."""
    kind = type(module)
    return (
        is_hooked(module)
        # Accelerate's
        or hasattr(module, "_hf_hook")
        or _is_foreign(kind)
        or _is_foreign(kind.forward)
        or "parametrizations" in module._modules
        or any(x is not None and type(x) not in _PLAIN for x in module._parameters.values())
        or any(x is not None and type(x) not in _PLAIN for x in module._buffers.values())
    )


__all__ = ["is_hooked", "is_watched"]
