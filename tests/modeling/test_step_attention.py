# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from helpers.tiny import tiny_model
from modeling_moma import cpu_moma
from modeling_moma.cpu_moma import CPU_ATTENTION, cpu_attention_forward


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


@pytest.mark.parametrize(
    ("mask", "num_groups", "elements_at_once"),
    [("none", 1, 2 * 4 * 9 * 8), ("Boolean", 2, 2**19), ("added", 2, 1), ("of one row", 1, 1), ("added", 1, 2**19)],
)
def test_it_is_the_attention_of_fp32(monkeypatch, mask, num_groups, elements_at_once):
    monkeypatch.setattr(cpu_moma, "has_instructions", lambda name: False)
    monkeypatch.setattr(cpu_moma, "_CHUNK_ELEMENTS", elements_at_once)
    torch.manual_seed(0)
    query = torch.randn(5, 4, 1, 8).bfloat16()
    key, value = (torch.randn(5, 4 // num_groups, 9, 8).bfloat16() for _ in range(2))
    layer, attention_mask = Layer(num_groups), masks(5, 9)[mask]
    with torch.no_grad():
        output, weights = cpu_attention_forward(layer, query, key, value, attention_mask, scaling=0.3)
        wide_mask = attention_mask
        if wide_mask is not None and wide_mask.is_floating_point():
            wide_mask = wide_mask.float()
        expected = sdpa_attention_forward(layer, query.float(), key.float(), value.float(), wide_mask, scaling=0.3)[0]
    assert weights is None and output.dtype == torch.bfloat16 and output.shape == (5, 1, 4, 8)
    assert torch.equal(output, expected.bfloat16())


@pytest.fixture(params=[True, False], ids=["own instructions", "none"])
def has_instructions(request, monkeypatch):
    """Both kinds of CPU, whichever this is."""
    monkeypatch.setattr(cpu_moma, "has_instructions", lambda name: request.param)
    return request.param


def test_where_it_is_wanted(has_instructions, monkeypatch):
    types = []

    def attention(module, query, *args, **kwargs):
        types.append(query.dtype)
        return query.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attention)
    query, half = torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16), torch.bfloat16 if has_instructions else torch.float32
    others = (query.float(), query.expand(1, 2, 2, 8), query.to("meta"))
    cpu_attention_forward(Layer(1), query, query, query, None)
    with torch.no_grad():
        for x in (query, query.half(), *others):
            assert cpu_attention_forward(Layer(1), x, x, x, None)[0].dtype == x.dtype
    halves = [torch.bfloat16, torch.float16] if has_instructions else [half, half]
    assert types == [torch.bfloat16, *halves, torch.float32, torch.bfloat16, torch.bfloat16]


@torch.no_grad()
def test_it_may_be_asked_for_by_its_name_and_gets_a_mask():
    model = tiny_model().eval()
    ids, mask = torch.randint(5, 16, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(CPU_ATTENTION)
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
