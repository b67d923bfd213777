# SPDX-License-Identifier: Apache-2.0
"""One computation on the CPU and on the device, and how near their numbers are."""

import copy

import torch
from torch import nn
from torch.utils._pytree import tree_map_only


def on_device(inputs):
    """Inputs of any structure, on the device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to("cuda"), inputs)


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model, and a copy of it on the device."""
    return model, copy.deepcopy(model).to("cuda")


def assert_near(found, expected, rtol: float = 1e-4, atol: float = 1e-5, name: str = ""):
    """A tensor of the device is near one of the CPU."""
    assert found.device.type == "cuda", f"{name} is not on the device"
    torch.testing.assert_close(
        found.detach().cpu().float(),
        expected.detach().float(),
        rtol=rtol,
        atol=atol,
        msg=lambda text: f"{name}: {text}",
    )


def assert_same_state(found: nn.Module, expected: nn.Module, **tolerances):
    """Gradients and buffers of a model on the device are near those of one on the CPU."""
    gradients = {name: parameter.grad for name, parameter in expected.named_parameters()}
    for name, parameter in found.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), f"one of two has a gradient: {name}"
        if parameter.grad is not None:
            assert_near(parameter.grad, gradients[name], name=name, **tolerances)
    buffers = dict(expected.named_buffers())
    for name, buffer in found.named_buffers():
        if buffer.numel():
            assert_near(buffer, buffers[name], name=name, **tolerances)
