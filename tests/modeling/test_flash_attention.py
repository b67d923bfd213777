# SPDX-License-Identifier: Apache-2.0
"""Flash attention, by a stand-in for its kernels: documents of packed rows stay apart, or the model says why not."""

import copy

import pytest
import torch

from helpers.flash import HALF, stand_in_flash
from helpers.packed_rows import (
    LENGTH,
    ROWS,
    batch_with_lengths,
    largest_difference,
    logits_and_gradients,
    model_of,
    refused,
    second_documents,
)
from helpers.tiny import mixed_ids


@pytest.fixture
def kernels():
    with stand_in_flash() as kernels:
        yield kernels


@pytest.mark.parametrize(
    ("name", "layout", "num_rows", "given", "checkpointing"),
    [
        ("full", "full rows", 1, True, True),
        ("full", "padded", 3, False, False),
        ("depth", "padded", 3, True, True),
        ("depth", "full rows", 1, False, False),
        ("rare depth", "padded", 3, True, False),
    ],
)
def test_the_second_document_does_not_see_the_first(kernels, name, num_rows, layout, given, checkpointing):
    layout = ROWS[layout][:num_rows]
    # what differs is no rounding then
    model = model_of(name).double()
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    is_second = second_documents(layout)
    batches = [batch_with_lengths(layout, seed) for seed in (0, 1)]
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    if not given:
        batches = [{key: batch[key] for key in ("input_ids", "position_ids")} for batch in batches]
    expected = logits_and_gradients(model, batches[0], is_second)
    model.set_attn_implementation("flash_attention_2")
    kernels.calls.clear()
    logits, grads, weights = logits_and_gradients(model, batches[0], is_second)
    calls = dict(kernels.calls)
    moved, moved_grads, moved_weights = logits_and_gradients(model, batches[1], is_second)
    assert (logits - moved)[is_second].abs().max() < 1e-5
    assert (grads - moved_grads)[is_second].abs().max() < 1e-5
    assert largest_difference(weights, moved_weights) < 1e-5
    assert not grads[~is_second].any()
    # padding is a document that nobody asks of
    is_token = torch.stack([torch.arange(LENGTH) < sum(lengths) for lengths in layout])
    assert (logits - expected[0])[is_token].abs().max() < 1e-5
    assert (grads - expected[1]).abs().max() < 1e-5
    assert largest_difference(weights, expected[2]) < 1e-5
    # in the forward, and again in the backward
    assert calls == {"varlen": model.config.num_hidden_layers * (2 if checkpointing else 1)}


def padding(*lengths, side):
    places = torch.arange(LENGTH)
    rows = [places < LENGTH - length if side == "right" else places >= length for length in lengths]
    return torch.stack(rows).long()


@pytest.mark.parametrize(
    ("name", "side", "use_cache"),
    [("full", "left", True), ("full", "right", False), ("depth", "left", False), ("depth", "right", True)],
)
def test_positions_of_padded_rows_are_not_taken_for_documents(kernels, name, side, use_cache):
    model = model_of(name)
    ids, mask = mixed_ids(3, LENGTH), padding(20, 0, 7, side=side)
    # as `generate` counts them
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": use_cache}
    with torch.no_grad():
        expected = model(ids, **inputs).logits
        model.set_attn_implementation("flash_attention_2")
        logits = model(ids, **inputs).logits
    assert (logits - expected)[mask.bool()].abs().max() < 1e-5


@pytest.mark.parametrize("name", ["full", "depth"])
def test_under_autocast_kernels_get_half_precision(name):
    batch = batch_with_lengths(ROWS["padded"])
    model = model_of(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), stand_in_flash(HALF):
        expected = model(**batch, use_cache=False).loss
        model.set_attn_implementation("flash_attention_2")
        assert model(**batch, use_cache=False).loss.item() == pytest.approx(expected.item(), rel=0.02)


def test_masks_of_pairs_are_refused(kernels):
    model = model_of()
    model.set_attn_implementation("flash_attention_2")
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    message = refused(model, mixed_ids(2, 8), attention_mask=mask, use_cache=False)
    assert "`attention_mask` has the shape (2, 1, 8, 8)" in message and "under 'flash_attention_2'" in message


def test_lengths_that_do_not_fit_are_refused(kernels):
    model = model_of()
    batch = batch_with_lengths(ROWS["full rows"][:4])
    model.set_attn_implementation("flash_attention_2")
    # what Accelerate does to batches that one process reads for all
    cut = {key: values[:2] if isinstance(values, torch.Tensor) else values for key, values in batch.items()}
    assert "`dispatch_batches`" in refused(model, **cut, use_cache=False)
    starts = batch["cu_seq_lens_q"]
    # of another number of positions, and with a row that begins no document
    for lengths in (starts - 24, starts[torch.arange(len(starts)) != 2]):
        inputs = {**batch, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
        assert "has to begin a document with each row" in refused(model, **inputs, use_cache=False)


def replica_of(model):
    """A copy as `DataParallel` makes it: tensors in place of parameters."""
    replica = copy.deepcopy(model)
    for module in replica.modules():
        tensors = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
        for name, tensor in tensors.items():
            delattr(module, name)
            setattr(module, name, tensor)
    return replica


def test_what_data_parallel_would_lose_is_refused():
    model = model_of()
    replica, ids = replica_of(model), mixed_ids(2, LENGTH)
    assert "`DataParallel` trains copies of routers" in refused(replica.train(), ids, use_cache=False)
    with torch.no_grad():
        assert torch.equal(replica.eval()(ids).logits, model.eval()(ids).logits)
