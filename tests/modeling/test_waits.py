# SPDX-License-Identifier: Apache-2.0
"""How often a forward makes the host wait for a device: counted on a CPU that is taken for one."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import flash_attention_mask

from helpers.reference import GROUPS, fields_of
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma import cpu_moma
from modeling_moma.configuration_moma import rule_names
from modeling_moma.data.packing import PackedCollator


# what reads numbers of a tensor, or makes a tensor whose size only its numbers tell
METHODS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")
OPERATIONS = ("nonzero", "masked_select", "_local_scalar_dense", "unique", "equal")


class Waits(TorchFunctionMode):
    """Names of the calls that wait."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in METHODS:
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class WaitingOperations(TorchDispatchMode):
    """The same below Python, where operations call one another."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in OPERATIONS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(cpu_moma, "_CPU", ())


def waits_of(forward):
    waits = Waits()
    with WaitingOperations(waits.names), waits:
        forward()
    return waits.names


@torch.no_grad()
@pytest.mark.parametrize("groups", ["dense", "1t1i", "8x", "4t4i"])
@pytest.mark.parametrize("routing", rule_names(is_causal=True))
def test_inference_waits_once_a_forward_for_the_sizes_of_its_groups(device, groups, routing):
    fields = {} if groups in ("dense", "1t1i") else fields_of(routing)
    model = tiny_model(
        **GROUPS[groups], **fields, inference_routing=routing if fields or "aux" not in routing else "threshold"
    ).eval()
    ids = mixed_ids()
    cache = DynamicCache(config=model.config)
    assert waits_of(lambda: model(ids[:, :8], cache=cache)) == ["tolist"]
    assert waits_of(lambda: model(ids[:, 8:9], cache=cache)) == ["tolist"]


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_a_training_step_waits_once(device, routing):
    model = tiny_model(**GROUPS["4t4i"], training_routing=routing).train()
    ids = mixed_ids()
    assert waits_of(lambda: model(ids, labels=ids, use_cache=False).loss.backward()) == ["tolist"]


def values_alone(module, query, key, value, attention_mask, **kwargs):
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None


@pytest.mark.parametrize("fields", [{}, {"depth_layers": [0, 1]}], ids=["full", "depth"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_documents_told_by_lengths_wait_where_nobody_gives_them(device, monkeypatch, num_rows, fields):
    for interface, function in ((AttentionInterface, values_alone), (AttentionMaskInterface, flash_attention_mask)):
        monkeypatch.setitem(interface._global_mapping, "by lengths", function)
    model = tiny_model(**GROUPS["4t4i"], training_routing="expert_choice", **fields).train()
    model.config._attn_implementation = "by lengths"
    ids = mixed_ids(num_rows)
    rows = [{"input_ids": row, "labels": row, "position_ids": torch.arange(12) % 5} for row in ids]
    batch = PackedCollator(None)(rows)
    by_hand = {name: batch[name] for name in rows[0]}
    plain = {"input_ids": ids, "labels": ids}

    def waits(inputs):
        return waits_of(lambda: model(**inputs, use_cache=False).loss.backward())

    assert waits(batch) == waits(plain)
    assert waits(by_hand) == waits(plain) + ["tolist"]


@torch.no_grad()
@pytest.mark.parametrize("normalize_gates", [True, False])
@pytest.mark.parametrize("routing", rule_names(is_causal=True))
def test_without_waiting_the_outputs_are_the_same(monkeypatch, routing, normalize_gates):
    model = tiny_model(**GROUPS["4t4i"], **fields_of(routing), normalize_gates=normalize_gates).eval()
    ids, mask = mixed_ids(), torch.ones_like(mixed_ids())
    mask[0, :3] = 0
    expected = model(ids, attention_mask=mask, routing=routing).logits
    monkeypatch.setattr(cpu_moma, "_CPU", ())
    cache = DynamicCache(config=model.config)
    parts = [model(ids[:, :7], attention_mask=mask[:, :7], cache=cache, routing=routing).logits]
    for place in range(7, ids.shape[1]):
        step = ids[:, place : place + 1]
        parts.append(model(step, attention_mask=mask[:, : place + 1], cache=cache, routing=routing).logits)
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)
