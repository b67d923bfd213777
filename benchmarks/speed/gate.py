# SPDX-License-Identifier: Apache-2.0
"""What has to be right before anything of ours is timed."""

import copy
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.speed.shapes import PACKINGS, Shape, mixed_tokens
from modeling_moma import MomaForCausalLM


LENGTH = 96
PREFIX = 64


def check(model: MomaForCausalLM, shape: Shape) -> None:
    """
    Compares, in fp32, what is timed with the plain way: the default experts with one expert after the other, forward
    and backward, packed documents with eager attention, and a cached prompt with steps after it with the uncached
    forward.

    Raises:
        AssertionError: they differ.
    """
    ids_BT = mixed_tokens(shape, 2, LENGTH).to(model.device)
    fast = copy.deepcopy(model).float()
    plain = copy.deepcopy(fast)
    plain.set_experts_implementation("eager")
    batch = {"input_ids": ids_BT, "labels": ids_BT, "use_cache": False}
    compare_gradients(fast, plain, **batch)
    attention = plain.config._attn_implementation
    # flash attention takes no fp32, and its lengths come with the data
    if "flash" not in attention:
        position_ids = PACKINGS["quarters"](*ids_BT.shape).to(model.device)
        plain.set_attn_implementation("eager")
        compare_gradients(fast, plain, position_ids=position_ids, **batch)
        plain.set_attn_implementation(attention)
    plain.load_state_dict(fast.state_dict())
    with torch.no_grad():
        expected_BTV = plain.eval()(input_ids=ids_BT, use_cache=False).logits
        cache = DynamicCache(config=fast.config)
        parts = [fast.eval()(input_ids=ids_BT[:, :PREFIX], cache=cache, use_cache=True).logits]
        for place in range(PREFIX, LENGTH):
            parts.append(fast(input_ids=ids_BT[:, place : place + 1], cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BTV, rtol=1e-3, atol=1e-4)


def compare_gradients(fast: MomaForCausalLM, plain: MomaForCausalLM, **batch: Any) -> None:
    """
    Compares the gradients of one training step of two models with the weights of the first.

    Raises:
        AssertionError: they differ.
    """
    gradients = []
    plain.load_state_dict(fast.state_dict())
    for model in (fast, plain):
        model.zero_grad()
        model.train()(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        expected = gradients[1][name]
        if (gradient is None) != (expected is None):
            raise AssertionError(f"{name}: one of the two ways has no gradient for it.")
        if gradient is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5, msg=name)
