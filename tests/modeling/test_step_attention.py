# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.tiny import tiny_model
from modeling_moma import step_attention_moma
from modeling_moma.step_attention_moma import wants_wide_step, wide_step


class Layer(torch.nn.Module):
    is_causal = True

    def __init__(self, num_groups: int):
        super().__init__()
        self.num_key_value_groups = num_groups


def masks(rows: int, num_keys: int):
    is_seen = torch.ones(rows, 1, 1, num_keys, dtype=torch.bool)
    is_seen[0, ..., :3] = False
    added = torch.zeros(rows, 1, 1, num_keys, dtype=torch.bfloat16).masked_fill(
        ~is_seen, torch.finfo(torch.bfloat16).min
    )
    return {"none": None, "Boolean": is_seen, "added": added, "of one row": is_seen[:1]}


@pytest.mark.parametrize("mask", ["none", "Boolean", "added", "of one row"])
@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("elements_at_once", [1, 2 * 4 * 9 * 8, 2**19])
def test_it_is_the_attention_of_fp32(monkeypatch, mask, num_groups, elements_at_once):
    monkeypatch.setattr(step_attention_moma, "_CHUNK_ELEMENTS", elements_at_once)
    torch.manual_seed(0)
    query = torch.randn(5, 4, 1, 8).bfloat16()
    key, value = (torch.randn(5, 4 // num_groups, 9, 8).bfloat16() for _ in range(2))
    layer, attention_mask = Layer(num_groups), masks(5, 9)[mask]
    with torch.no_grad():
        output, weights = wide_step(sdpa_attention_forward, layer, query, key, value, attention_mask, scaling=0.3)
        wide_mask = attention_mask
        if wide_mask is not None and wide_mask.is_floating_point():
            wide_mask = wide_mask.float()
        expected = sdpa_attention_forward(layer, query.float(), key.float(), value.float(), wide_mask, scaling=0.3)[0]
    assert weights is None and output.dtype == torch.bfloat16 and output.shape == (5, 1, 4, 8)
    assert torch.equal(output, expected.bfloat16())


@pytest.fixture(params=[True, False], ids=["own instructions", "none"])
def has_instructions(request, monkeypatch):
    """Both kinds of CPU, whichever this is."""
    monkeypatch.setattr(step_attention_moma, "has_instructions", lambda name: request.param)
    return request.param


def test_where_it_is_wanted(has_instructions):
    query = torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)
    assert not wants_wide_step("sdpa", query)
    with torch.no_grad():
        assert wants_wide_step("sdpa", query) == wants_wide_step("sdpa", query.half()) == (not has_instructions)
        assert not wants_wide_step("eager", query)
        assert not wants_wide_step("sdpa", query.float())
        assert not wants_wide_step("sdpa", query.expand(1, 2, 2, 8))
        assert not wants_wide_step("sdpa", query.to("meta"))


@pytest.mark.parametrize("depth_layers", [None, [0]])
def test_steps_in_bf16_equal_the_whole_in_bf16(depth_layers, has_instructions):
    model = tiny_model(depth_layers=depth_layers).bfloat16().eval()
    # of which no score lies so near its threshold that the noise of bf16 decides
    ids = torch.randint(5, 16, (2, 12), generator=torch.Generator().manual_seed(13))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        steps = [model(ids[:, place : place + 1], cache=cache, use_cache=True).logits for place in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1).float(), expected.float(), rtol=0.05, atol=0.05)
