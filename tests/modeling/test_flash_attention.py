# SPDX-License-Identifier: Apache-2.0
"""Flash attention, by a stand-in for its kernels: documents of packed rows stay apart, or the model says why not."""

import copy

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from transformers import Trainer, TrainingArguments

from helpers.flash import HALF, stand_in_flash
from helpers.packed_rows import (
    LENGTH,
    ROWS,
    batch_with_lengths,
    largest_difference,
    logits_and_gradients,
    model_of,
    packed_rows,
    refused,
    second_documents,
)
from helpers.tiny import mixed_ids
from modeling_moma.data.packing import PackedCollator


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
@pytest.mark.parametrize("use_cache", [False, True])
def test_generation_is_that_of_sdpa(kernels, name, use_cache):
    model = model_of(name)
    ids, mask = mixed_ids(3, 20), padding(20, 0, 7, side="left")[:, :20].clone()
    mask[0, 12:] = 1
    arguments = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache, "eos_token_id": None}
    for prompts in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}):
        model.set_attn_implementation("sdpa")
        expected = model.generate(**prompts, **arguments)
        model.set_attn_implementation("flash_attention_2")
        assert torch.equal(model.generate(**prompts, **arguments), expected)


@pytest.mark.parametrize(("num_rows", "use_cache"), [(1, True), (2, False)])
def test_rows_of_one_document_take_the_plain_kernel_without_a_look_in_every_layer(
    kernels, monkeypatch, num_rows, use_cache
):
    seen, is_packed = [], flash_utils._is_packed_sequence
    monkeypatch.setattr(
        flash_utils, "_is_packed_sequence", lambda *arguments: seen.append(arguments[0]) or is_packed(*arguments)
    )
    model = model_of("full")
    ids = mixed_ids(num_rows, LENGTH)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model.set_attn_implementation("flash_attention_2")
        for positions in (None, torch.arange(LENGTH)[None]):
            assert (model(ids, position_ids=positions, use_cache=use_cache).logits - expected).abs().max() < 1e-5
    assert kernels.calls == {"dense": 4}
    # it looks at positions where it gets them
    assert seen == [None] * 4


@pytest.mark.parametrize("name", ["full", "depth"])
def test_under_autocast_kernels_get_half_precision(name):
    batch = batch_with_lengths(ROWS["padded"])
    model = model_of(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), stand_in_flash(HALF):
        expected = model(**batch, use_cache=False).loss
        model.set_attn_implementation("flash_attention_2")
        assert model(**batch, use_cache=False).loss.item() == pytest.approx(expected.item(), rel=0.02)


def trained(model, attention, tmp_path, **arguments):
    model = copy.deepcopy(model).train()
    model.set_attn_implementation(attention)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / attention),
        max_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=1.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        **arguments,
    )
    rows = packed_rows(ROWS["padded"] + ROWS["full rows"][:1])
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=PackedCollator(None))
    loss = trainer.train().training_loss
    return loss, dict(model.named_parameters())


@pytest.mark.parametrize("name, checkpointing", [("full", False), ("depth", True)])
def test_a_step_of_trainer_is_that_of_sdpa(kernels, name, checkpointing, tmp_path):
    model = model_of(name)
    loss, expected = trained(model, "sdpa", tmp_path)
    kernels.calls.clear()
    flash_loss, weights = trained(model, "flash_attention_2", tmp_path, gradient_checkpointing=checkpointing)
    assert kernels.calls["varlen"] and not kernels.calls["dense"]
    assert flash_loss == pytest.approx(loss, abs=1e-5)
    for key, value in weights.items():
        assert (value - expected[key]).abs().max() < 1e-5, key
    assert any((value - start).abs().max() > 1e-3 for value, start in zip(weights.values(), model.parameters()))


def test_what_flash_attention_refuses_the_stand_in_refuses():
    model = model_of()
    with torch.no_grad(), stand_in_flash(HALF) as kernels:
        model.set_attn_implementation("flash_attention_2")
        with pytest.raises(RuntimeError, match="only support fp16 and bf16"):
            model(mixed_ids(2, 8), use_cache=False)
        states = torch.zeros(8, 2, 4, dtype=torch.float16)
        wrong = {
            "int32": (torch.tensor([0, 8]), 8),
            "not of 8 tokens": (torch.tensor([0, 3], dtype=torch.int32), 8),
            "the longest 4": (torch.tensor([0, 8], dtype=torch.int32), 4),
        }
        for message, (starts, longest) in wrong.items():
            with pytest.raises(RuntimeError, match=message):
                kernels.second()[1](states, states, states, starts, starts, longest, longest)


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
