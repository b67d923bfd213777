# SPDX-License-Identifier: Apache-2.0
"""Packed rows: their documents stay apart, and numbers are those of the CPU, under sdpa and flash attention."""

import pytest
import torch

from helpers.cuda.compare import assert_near, assert_same_state, both, on_device
from helpers.flash import stand_in_flash
from helpers.reference import GROUPS
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.data.packing import PackedCollator


LENGTH = 24
# each token by itself: among the many equal ones of padding a top K may take any
BY_TOKEN = {**GROUPS["4t4i"], "training_routing": "threshold", "routing_warmup_steps": 0}
MODELS = {
    "full": BY_TOKEN,
    "depth": {
        **BY_TOKEN,
        "num_hidden_layers": 3,
        "depth_layers": [0, 2],
        "depth_capacity": 0.5,
    },
}


def threshold_model(name):
    model = tiny_model(**MODELS[name])
    for module, buffer in model.named_buffers():
        if module.endswith("router.threshold"):
            buffer.fill_(0.5)
    return model


def packed_batch(rows, num_padding, seed):
    """Rows of two documents; another seed gives other first ones."""
    ids, others = mixed_ids(rows, LENGTH), mixed_ids(rows, LENGTH, seed)
    examples = []
    for index in range(rows):
        first, last = 8 + index, LENGTH - num_padding
        row = torch.cat([others[index, :first], ids[index, first:]])
        row[last:] = 0
        positions = torch.cat([torch.arange(end) for end in (first, last - first, num_padding)])
        labels = torch.where(positions > 0, row, -100)
        labels[last:] = -100
        examples.append({"input_ids": row, "position_ids": positions, "labels": labels})
    return PackedCollator(None)(examples)


@pytest.mark.parametrize("num_padding", [0, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("name", MODELS)
def test_documents_stay_apart(device, name, attention, rows, num_padding):
    expected, model = both(threshold_model(name))
    batches = [packed_batch(rows, num_padding, seed) for seed in (0, 1)]
    with stand_in_flash():
        model.set_attn_implementation(attention)
        loss = model(**on_device(batches[0]), use_cache=False).loss
        loss.backward()
        assert_same_loss(loss, expected, model, batches[0])
        model.eval()
        with torch.no_grad():
            logits, moved = (model(**on_device(batch), use_cache=False).logits.cpu() for batch in batches)
    for index in range(rows):
        first, last = 8 + index, LENGTH - num_padding
        assert (logits - moved)[index, :first].abs().max() > 1e-3
        assert (logits - moved)[index, first:last].abs().max() < 1e-5


def assert_same_loss(loss, expected, model, batch):
    on_cpu = expected(**batch, use_cache=False).loss
    on_cpu.backward()
    assert_near(loss, on_cpu, name="loss")
    assert_same_state(model, expected)
