# SPDX-License-Identifier: Apache-2.0
"""Flash attention, by a stand-in for its kernels: documents of packed rows stay apart, or the model says why not."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from helpers.flash import HALF, stand_in_flash
from helpers.packed_rows import (
    LENGTH,
    ROWS,
    batch_with_lengths,
    largest_difference,
    model_of,
    refused,
)
from helpers.tiny import mixed_ids


@pytest.fixture
def kernels():
    with stand_in_flash() as kernels:
        yield kernels


def second_documents(layout):
    """Where the rows' second documents lie, `[B, T]`."""
    is_second = torch.zeros(len(layout), LENGTH, dtype=torch.bool)
    for row, (first, second) in enumerate(layout):
        is_second[row, first : first + second] = True
    return is_second


def logits_and_gradients(model, batch, is_counted_BT):
    """Logits, and gradients of some tokens' loss: those of the embedded tokens, and those of the weights."""
    # a training step moves the buffers of routers
    model = copy.deepcopy(model)
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    # the mean of embeddings that stand in place of ids would be a mean over rows of another meaning
    kinds = ((batch["input_ids"] >= 8) & (batch["input_ids"] < 24)).long()
    inputs = {name: values for name, values in batch.items() if name not in ("input_ids", "labels")}
    logits = model(inputs_embeds=embeds, mm_token_type_ids=kinds, use_cache=False, **inputs).logits
    is_target_BT = is_counted_BT[:, 1:] & is_counted_BT[:, :-1]
    loss = cross_entropy(logits[:, :-1][is_target_BT], batch["input_ids"][:, 1:][is_target_BT], reduction="sum")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first, *others = torch.autograd.grad(loss, [embeds, *parameters], allow_unused=True)
    return logits.detach(), first, [grad for grad in others if grad is not None]


@pytest.mark.parametrize(
    ("name", "layout", "num_rows", "given", "checkpointing"),
    [
        ("full", "padded", 3, False, True),
        ("depth", "full rows", 1, True, True),
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
