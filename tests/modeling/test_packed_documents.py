# SPDX-License-Identifier: Apache-2.0
"""Documents of packed rows stay apart under every attention, or the model says why it cannot keep them apart."""

import copy
from functools import cache

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache

from helpers.flash import stand_in_flash
from helpers.packed_rows import (
    ROWS,
    batch_with_lengths,
    largest_difference,
    lengths_of,
    model_of,
    refused,
)
from helpers.tiny import mixed_ids, tiny_model


PADDING = "padding"


ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")


@pytest.fixture(scope="module", autouse=True)
def every_attention():
    """On a CPU: flash attention by a stand-in, flex attention without its compiler."""
    with pytest.MonkeyPatch.context() as patch, stand_in_flash():
        # it refuses gradients on CPUs, which what it falls back to without a compiler has
        patch.setattr(flex, "_validate_device", lambda *args: None)
        with torch.compiler.set_stance("force_eager"):
            yield


# what differs is little rounding in double precision: norms and positions stay in fp32
@cache
def double_model(name):
    return model_of(name).double()


@st.composite
def layouts(draw):
    """Rows of one length: the lengths of their documents, and of the padding between them."""
    length = draw(st.integers(6, 36))
    rows = []
    for _ in range(draw(st.sampled_from([1, 2, 5]))):
        row, left = [], length
        while left:
            part = draw(st.integers(1, left))
            # no row is all padding
            is_padding = draw(st.booleans()) and not (part == left and all(kind == PADDING for kind, _ in row))
            row.append((PADDING if is_padding else "document", part))
            left -= part
        rows.append(row)
    return rows


def batch_of(layout, positions_of_padding):
    """A batch by hand, and where its documents lie: `(row, begin, end)`."""
    length = sum(part for _, part in layout[0])
    ids, places = mixed_ids(len(layout), length), []
    positions, mask = torch.zeros_like(ids), torch.ones_like(ids)
    for row, parts in enumerate(layout):
        begin = 0
        for kind, part in parts:
            end = begin + part
            positions[row, begin:end] = torch.arange(part)
            if kind == PADDING:
                mask[row, begin:end] = ids[row, begin:end] = 0
                if positions_of_padding is not None:
                    positions[row, begin:end] = positions_of_padding
            else:
                places.append((row, begin, end))
            begin = end
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}, places


def losses_and_logits(logits, ids):
    """The sum over one document's tokens, or 0 for a document of one."""
    return cross_entropy(logits[:-1], ids[1:], reduction="sum") if len(ids) > 1 else logits.sum() * 0


def alone(model, batch, places):
    """Logits of each document by itself, and gradients of their losses' sum."""
    logits, loss = [], 0
    for row, begin, end in places:
        ids = batch["input_ids"][row, begin:end]
        logits.append(model(ids[None], use_cache=False).logits[0])
        loss = loss + losses_and_logits(logits[-1], ids)
    return [part.detach() for part in logits], gradients(model, loss)


def together(model, batch, places, **arguments):
    logits = model(**batch, **arguments).logits
    parts = [logits[row, begin:end] for row, begin, end in places]
    ids = [batch["input_ids"][row, begin:end] for row, begin, end in places]
    loss = sum(losses_and_logits(part, tokens) for part, tokens in zip(parts, ids))
    return [part.detach() for part in parts], gradients(model, loss)


def gradients(model, loss):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(parameters, found)]


@settings(
    max_examples=2, phases=[Phase.generate], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    layout=layouts(),
    hides=st.booleans(),
    has_lengths=st.booleans(),
    use_cache=st.booleans(),
    checkpointing=st.booleans(),
    positions_of_padding=st.sampled_from([None, 0, 1]),
)
@pytest.mark.parametrize("name", ["full", "depth", "rare depth"])
def test_documents_are_what_they_are_alone(
    name, layout, hides, has_lengths, use_cache, checkpointing, positions_of_padding
):
    model = double_model(name)
    batch, places = batch_of(layout, positions_of_padding if hides else None)
    expected_logits, expected = alone(model, batch, places)
    if has_lengths:
        batch |= lengths_of(batch["position_ids"])
    if not hides:
        # padding is a document, too
        del batch["attention_mask"]
    for attention in ATTENTIONS:
        # a training step moves the buffers of routers
        model = copy.deepcopy(double_model(name))
        model.set_attn_implementation(attention)
        # its softmax is one of fp32, for which the mask of padding in double precision is infinite
        is_single = attention == "eager"
        model = model.float() if is_single else model
        if checkpointing:
            model.train().activation_checkpointing_enable()
        logits, found = together(model, batch, places, use_cache=use_cache)
        assert largest_difference(logits, expected_logits) < 1e-5, attention
        assert largest_difference(found, expected) < (1e-4 if is_single else 1e-5), attention


@pytest.mark.parametrize(
    ("name", "arguments", "has_positions"),
    [
        ("full", {}, True),
        ("depth", {"return_flash_attn_kwargs": True}, False),
        ("full", {"return_seq_idx": True}, False),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", "flex_attention"])
def test_flattened_batches_of_transformers_stay_apart(attention, name, arguments, has_positions):
    model = model_of(name)
    model.set_attn_implementation(attention)
    documents = [ids[:length].tolist() for ids, length in zip(mixed_ids(3, 20), (20, 3, 11))]
    batch = DataCollatorWithFlattening(**arguments)([{"input_ids": ids, "labels": ids} for ids in documents])
    if arguments and not has_positions:
        del batch["position_ids"]
    with torch.no_grad():
        output = model(**batch)
        separate = torch.cat([model(torch.tensor([ids])).logits[0] for ids in documents])
    assert (output.logits[0] - separate).abs().max() < 1e-5
    # it would take the row for one document
    assert output.cache is None


@pytest.mark.parametrize(("attention", "name"), [("sdpa", "full"), ("flash_attention_2", "depth")])
def test_documents_are_refused_where_a_cache_takes_a_row_for_one(attention, name):
    model = model_of(name)
    model.set_attn_implementation(attention)
    batch = batch_with_lengths(ROWS["full rows"])
    by_hand = {key: batch[key] for key in ("input_ids", "position_ids")}
    caches = [lambda: DynamicCache(config=model.config), lambda: StaticCache(model.config, 128)]
    for make in caches:
        for inputs in (batch, by_hand, {**by_hand, "attention_mask": torch.ones_like(batch["input_ids"])}):
            assert "`use_cache=False`, and no cache" in refused(model, **inputs, cache=make())
        held = make()
        with torch.no_grad():
            model(mixed_ids(5, 4), cache=held)
        # a document that begins with a chunk, or within it
        chunk = {"input_ids": mixed_ids(5, 6), "position_ids": torch.arange(6)[None]}
        assert "behind what the cache holds" in refused(model, **chunk, cache=held)
        chunk["position_ids"] = torch.tensor([[4, 5, 0, 1, 2, 3]])
        assert "begin again, within a row" in refused(model, **chunk, cache=held)


@pytest.mark.parametrize("name", ["full", "depth"])
@pytest.mark.parametrize("attention", ["eager", "flash_attention_2", "flex_attention"])
def test_chunks_of_a_prompt_are_what_the_prompt_is(attention, name):
    model = model_of(name)
    ids, mask = mixed_ids(3, 24), torch.ones(3, 24, dtype=torch.long)
    mask[0, :9] = mask[2, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = torch.arange(24)[None]
    with torch.no_grad():
        for inputs in ({"position_ids": plain}, {"attention_mask": mask, "position_ids": positions}):
            model.set_attn_implementation("sdpa")
            expected = model(ids, **inputs, use_cache=False).logits
            model.set_attn_implementation(attention)
            cache, parts = DynamicCache(config=model.config), []
            for begin, end in ((0, 7), (7, 12), (12, 13), (13, 24)):
                chunk = {"position_ids": inputs["position_ids"][:, begin:end]}
                if "attention_mask" in inputs:
                    chunk["attention_mask"] = mask[:, :end]
                parts.append(model(ids[:, begin:end], **chunk, cache=cache).logits)
            is_token = mask.bool() if "attention_mask" in inputs else torch.ones_like(mask).bool()
            assert (torch.cat(parts, dim=1) - expected)[is_token].abs().max() < 1e-5


def kept_masks(model, length, **inputs):
    """Memory that autograd keeps for tensors of pairs of positions, `{address: shape}`."""
    kept, alive = {}, []

    def keep(tensor):
        if tensor.ndim > 2 and tensor.shape[-2] > length // 4 and tensor.shape[-1] >= tensor.shape[-2]:
            kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape[-2:])
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(mixed_ids(2, length), use_cache=False, **inputs)
    output.logits.sum().backward()
    return sorted(kept.values())


@pytest.mark.parametrize(
    ("precision", "rows"), [("fp32", "packed and padded"), ("bf16", "a mask of pairs"), ("autocast", "packed")]
)
def test_full_layers_share_one_mask(precision, rows):
    length = 160
    model = tiny_model(num_hidden_layers=4, max_position_embeddings=length).train()
    inputs = {}
    if "packed" in rows:
        inputs["position_ids"] = (torch.arange(length) % 50)[None]
    if "padded" in rows:
        inputs["attention_mask"] = (torch.arange(length) < torch.tensor([[length - 9], [length]])).long()
    if "pairs" in rows:
        inputs["attention_mask"] = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    model = model.bfloat16() if precision == "bf16" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        assert kept_masks(model, length, **inputs) == [(length, length)]
        # a causal mask is none
        assert kept_masks(model, length) == []
        assert kept_masks(model, length, attention_mask=torch.ones(2, length, dtype=torch.long)) == []
