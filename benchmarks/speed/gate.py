# SPDX-License-Identifier: Apache-2.0
"""What has to be right before anything of ours is timed."""

import copy

import torch
from transformers import DynamicCache

from benchmarks.speed.shapes import Shape, mixed_tokens
from modeling_moma import MomaForCausalLM


LENGTH = 96
PREFIX = 64


def check(model: MomaForCausalLM, shape: Shape) -> None:
    """
    Compares, in fp32, what is timed with the plain way: the default experts with one expert after the other, forward
    and backward, and a cached prompt with steps after it with the uncached forward.

    Raises:
        AssertionError: they differ.
    """
    ids_BT = mixed_tokens(shape, 2, LENGTH).to(model.device)
    fast = copy.deepcopy(model).float()
    plain = copy.deepcopy(fast)
    plain.set_experts_implementation("eager")
    gradients = []
    for each in (fast, plain):
        each.train()(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
    for name, gradient in gradients[0].items():
        expected = gradients[1][name]
        if gradient is not None and expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5, msg=name)
    plain.load_state_dict(fast.state_dict())
    with torch.no_grad():
        expected_BTV = plain.eval()(input_ids=ids_BT, use_cache=False).logits
        cache = DynamicCache(config=fast.config)
        parts = [fast.eval()(input_ids=ids_BT[:, :PREFIX], cache=cache, use_cache=True).logits]
        for place in range(PREFIX, LENGTH):
            parts.append(fast(input_ids=ids_BT[:, place : place + 1], cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BTV, rtol=1e-3, atol=1e-4)
