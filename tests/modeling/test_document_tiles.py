# SPDX-License-Identifier: Apache-2.0
"""Attention by documents, which a CPU takes in training on packed rows, against attention with a mask."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import eager_attention_forward

from helpers.tiny import mixed_ids, tiny_model
from modeling_moma import cpu_moma
from modeling_moma.cpu_moma import DocumentTiles, cpu_attention_forward


class Layer(torch.nn.Module):
    is_causal = True

    def __init__(self, num_key_value_groups=1):
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


def rows_of(*rows):
    """The documents of rows of such lengths, and their padding, `[B, T]`; a negative length is padding."""
    documents = [[number for number, length in enumerate(row) for _ in range(abs(length))] for row in rows]
    padding = torch.tensor([[length < 0 for length in row for _ in range(abs(length))] for row in rows])
    return torch.tensor(documents), padding if padding.any() else None


def mask_of(documents, dtype):
    """The mask that keeps them apart; padding sees itself."""
    document_BT, padding_BT = documents
    length = document_BT.shape[1]
    is_seen = document_BT.unsqueeze(2) == document_BT.unsqueeze(1)
    if padding_BT is not None:
        is_seen &= ~padding_BT.unsqueeze(1)
    is_seen = is_seen.tril() | torch.eye(length, dtype=torch.bool)
    return torch.where(is_seen, 0.0, -torch.inf).to(dtype).unsqueeze(1)


def tiles_for(documents, num_heads, num_key_heads, size):
    return DocumentTiles.of(*documents, num_heads, num_key_heads, size)


def heads_of(documents, num_heads, num_key_heads, size, dtype, seed=0):
    torch.manual_seed(seed)
    shape = documents[0].shape
    # as projections give them, and some other way
    query = torch.randn(*shape, num_heads, size).transpose(1, 2)
    key, value = torch.randn(2, shape[0], num_key_heads, shape[1], size)
    return [x.to(dtype).requires_grad_() for x in (query, key, value)]


@pytest.fixture
def always(monkeypatch):
    """Whatever it costs."""
    for name in ("_SCORE_COST", "_PLACE_COST", "_GROUP_COST"):
        monkeypatch.setattr(cpu_moma, name, 0)
    monkeypatch.setattr(cpu_moma, "_MOST_KEPT", 10**6)


@pytest.fixture
def asked(monkeypatch):
    """How often attention ran by documents."""
    calls, apply = [], cpu_moma._ByDocument.apply
    monkeypatch.setattr(cpu_moma._ByDocument, "apply", lambda *args: calls.append(0) or apply(*args))
    return calls


@st.composite
def layouts(draw):
    length, rows = draw(st.integers(3, 70)), []
    for _ in range(draw(st.sampled_from([1, 2, 5]))):
        row, left = [], length
        while left:
            part = draw(st.integers(1, left))
            row.append(-part if draw(st.integers(0, 3)) == 0 and part < length else part)
            left -= part
        # no row is all padding
        rows.append(row if max(row) > 0 else [length])
    return rows_of(*rows)


BOUNDS = {torch.float64: (1e-12, 1e-11), torch.float32: (1e-5, 1e-4), torch.bfloat16: (3e-2, 2e-2)}


@settings(
    max_examples=30,
    phases=[Phase.generate],
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    documents=layouts(),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    size=st.sampled_from([4, 32, 33]),
    dtype=st.sampled_from(list(BOUNDS)),
    scaling=st.sampled_from([None, 0.3]),
    step=st.sampled_from([1, 16]),
    most=st.sampled_from([1, 2**9, 2**18]),
)
def test_it_is_attention_with_a_mask(always, asked, monkeypatch, documents, heads, size, dtype, scaling, step, most):
    monkeypatch.setattr(cpu_moma, "_TILE_STEP", step)
    monkeypatch.setattr(cpu_moma, "_GROUP_SCORES", most)
    asked.clear()
    layer = Layer(heads[0] // heads[1])
    inputs = heads_of(documents, *heads, size, dtype)
    mask, tiles = mask_of(documents, dtype), tiles_for(documents, *heads, size)
    found, weights = cpu_attention_forward(layer, *inputs, mask, tiles, scaling=scaling)
    assert len(asked) == 1 and weights is None and found.dtype == dtype
    # in the type that a result in bf16 is a rounding of
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    wide_inputs = [x.detach().to(wide).requires_grad_() for x in inputs]
    scale = size**-0.5 if scaling is None else scaling
    expected = reference(layer, *wide_inputs, mask.to(wide), scale)
    document_BT, padding_BT = documents
    is_token_BT = torch.ones_like(document_BT, dtype=torch.bool) if padding_BT is None else ~padding_BT
    assert torch.equal(found[~is_token_BT], torch.zeros_like(found[~is_token_BT]))
    bound, gradient_bound = BOUNDS[dtype]
    assert (found - expected)[is_token_BT].abs().max() < bound
    upstream = torch.randn(found.shape).to(dtype)
    gradients = torch.autograd.grad(found, inputs, upstream)
    # what padding gives is no matter
    upstream = upstream.to(wide) * is_token_BT[..., None, None]
    for x, gradient, wanted in zip(inputs, gradients, torch.autograd.grad(expected, wide_inputs, upstream)):
        assert gradient.dtype == x.dtype
        assert (gradient - wanted).norm() <= gradient_bound * wanted.norm() + gradient_bound


def reference(layer, query, key, value, mask, scaling):
    """Eager attention, whose softmax is one of fp32, in the type of what it is given."""
    if query.dtype != torch.float64:
        return eager_attention_forward(layer, query, key, value, mask, scaling=scaling)[0]
    key, value = (x.repeat_interleave(layer.num_key_value_groups, 1) for x in (key, value))
    weights = torch.softmax(query @ key.mT * scaling + mask, -1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("worst", [torch.inf, torch.nan])
def test_a_document_that_overflows_stays_alone(always, asked, worst):
    documents = rows_of([20, 7, 21], [17, 16, 15])
    inputs = heads_of(documents, 2, 1, 8, torch.float32)
    others = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        for x in others:
            x[0, :, 20:27] = worst
    tiles = tiles_for(documents, 2, 1, 8)
    outputs = [cpu_attention_forward(Layer(2), *each, None, tiles)[0] for each in (inputs, others)]
    assert len(asked) == 2
    is_other = documents[0] != 1
    is_other[1] = True
    assert torch.equal(outputs[0][is_other], outputs[1][is_other])
    assert not outputs[1][~is_other].isfinite().any()
    gradients = [torch.autograd.grad(out.sum(), each) for out, each in zip(outputs, (inputs, others))]
    for before, after in zip(*gradients):
        assert torch.equal(before.transpose(1, 2)[is_other], after.transpose(1, 2)[is_other])


# what stands in a row, and whether it is worth it
@pytest.mark.parametrize(
    ("row", "is_taken"),
    [
        ([75, 80, 66, 85, 30, 76, 81, 19], True),
        ([256, 256], True),
        # one document and a bit
        ([500, 12], False),
        # longer than what a head of this size may keep
        ([300, 212], False),
        ([1] * 64, False),
    ],
)
def test_it_is_chosen_by_the_lengths_of_documents(row, is_taken):
    assert (tiles_for(rows_of(*[row] * 4), 4, 4, 32) is not None) == is_taken


def test_other_heads_and_devices_take_the_mask(always, asked):
    documents = rows_of([30, 20, 14])
    mask, tiles = mask_of(documents, torch.float32), tiles_for(documents, 8, 4, 32)
    # a half of the heads, as under tensor parallelism
    inputs = heads_of(documents, 4, 2, 32, torch.float32)
    cpu_attention_forward(Layer(2), *inputs, mask, tiles)
    there = [x.detach().to("meta").requires_grad_() for x in heads_of(documents, 8, 4, 32, torch.float32)]
    cpu_attention_forward(Layer(2), *there, mask.to("meta"), tiles)
    assert not asked


def packed_batch(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    positions = []
    for _ in range(rows):
        # a row begins within a document
        parts, left = [torch.arange(3, 9)], length - 6
        while left:
            part = min(left, int(torch.randint(5, 30, (), generator=generator)))
            parts.append(torch.arange(part))
            left -= part
        positions.append(torch.cat(parts))
    ids = mixed_ids(rows, length, seed)
    return {"input_ids": ids, "labels": ids, "position_ids": torch.stack(positions), "use_cache": False}


def step(model, batch, autocast=False):
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


FIELDS = {
    "full": {},
    "shared keys": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "depth": {"num_hidden_layers": 4, "depth_layers": [1], "depth_capacity": 0.5},
}


@pytest.mark.parametrize(
    ("name", "checkpointing", "autocast"),
    [("full", None, True), ("shared keys", True, False), ("depth", False, False), ("depth", None, True)],
)
def test_a_training_step_is_that_of_eager_attention(always, asked, monkeypatch, name, checkpointing, autocast):
    laid_out, lay_out = [], DocumentTiles.of
    monkeypatch.setattr(DocumentTiles, "of", lambda *args: laid_out.append(0) or lay_out(*args))
    batch = packed_batch(3, 96)
    fields = {"initializer_range": 0.2, "training_routing": "token_choice", "norm_placement": "pre", **FIELDS[name]}
    eager = tiny_model(attn_implementation="eager", **fields)
    loss, gradients = step(eager, batch)
    assert not asked
    model = tiny_model(**fields)
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    found, found_gradients = step(model, batch, autocast)
    num_full = model.config.num_hidden_layers - len(model.config.depth_layers or ())
    assert len(asked) == num_full * (1 if checkpointing is None else 2) and len(laid_out) == 1
    if autocast:
        # experts may choose otherwise
        assert abs(found - loss) < 0.1
    else:
        assert abs(found - loss) < 1e-5
        assert (found_gradients - gradients).norm() < 1e-4 * gradients.norm()


@pytest.mark.parametrize(("dropout", "dtype"), [(0.1, torch.float32), (0.0, torch.float16)])
def test_training_with_dropout_or_in_fp16_takes_the_mask(always, asked, dropout, dtype):
    tiny_model(attention_dropout=dropout).to(dtype).train()(**packed_batch(2, 32))
    assert not asked
