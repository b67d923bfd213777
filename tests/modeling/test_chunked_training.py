# SPDX-License-Identifier: Apache-2.0
"""What a CPU does in training a few rows at a time, against the plain way, forward and backward."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers.tiny import mixed_ids, tiny_model
from modeling_moma import cpu_moma, loss_moma
from modeling_moma.cpu_moma import use_cpu_layers
from modeling_moma.loss_moma import causal_lm_loss
from modeling_moma.modeling_moma import MomaRMSNorm


def gradients_of(output, inputs, seed=0):
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.dtype)
    return torch.autograd.grad(output, inputs, upstream)


def assert_near(found, expected, bound):
    for one, other in zip(found, expected):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one.double() - other.double()).norm() <= bound * other.double().norm()


@pytest.mark.parametrize(
    ("elements", "shape", "dtype", "weight_dtype", "autocast"),
    [
        (1, (0, 8), torch.float32, torch.float32, False),
        (1, (5, 3, 96), torch.float32, torch.bfloat16, True),
        (100, (3, 7, 4, 32), torch.bfloat16, torch.float32, True),
        (100, (5, 3, 96), torch.float32, torch.float32, False),
        (2**16, (3, 7, 4, 32), torch.bfloat16, torch.bfloat16, False),
    ],
)
def test_a_norm_is_to_the_last_bit_the_plain_one(monkeypatch, elements, shape, dtype, weight_dtype, autocast):
    monkeypatch.setattr(cpu_moma, "_NORM_ELEMENTS", elements)
    torch.manual_seed(0)
    plain = MomaRMSNorm(shape[-1]).to(weight_dtype).train()
    nn.init.uniform_(plain.weight, 0.5, 2)
    ours = copy.deepcopy(plain)
    use_cpu_layers(ours)
    x = torch.randn(shape).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = ours(x), plain(x)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    found, expected = gradients_of(found, (x, ours.weight)), gradients_of(expected, (x, plain.weight))
    assert_near(found, expected, 2e-2 if torch.bfloat16 in (dtype, weight_dtype) else 1e-6)


@pytest.mark.parametrize(
    ("has_form", "shape", "dtype", "scale"),
    [
        (True, (1, 2048, 64), torch.float32, 1e-4),
        (True, (3, 5, 8), torch.bfloat16, 1e3),
        (True, (16, 1, 4, 32), torch.float16, 1.0),
        (True, (0, 8), torch.float32, 1.0),
        (False, (3, 5, 8), torch.bfloat16, 1e-4),
    ],
)
def test_norms_are_those_of_llama_with_gradients_and_without(has_form, shape, dtype, scale):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * scale).to(dtype)
    before = x.clone()
    mine, theirs = MomaRMSNorm(shape[-1], eps=1e-5).to(dtype).eval(), LlamaRMSNorm(shape[-1], eps=1e-5).to(dtype)
    use_cpu_layers(mine, has_form)
    with torch.no_grad():
        mine.weight.uniform_(0.5, 2, generator=generator)
        theirs.weight.copy_(mine.weight)
        without = mine(x)
    assert without.dtype == dtype and torch.equal(x, before)
    for output in (without, mine(x)):
        # one step of a half-precision number may lie between them
        rtol = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(output, theirs(x), rtol=rtol, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(mine(x), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_norms_alike_with_gradients_and_without(dtype):
    """Activation checkpointing computes layers in both ways, and has to select the same tokens."""
    norm = MomaRMSNorm(64).to(dtype).train()
    use_cpu_layers(norm)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        without = norm(x)
    assert torch.equal(without, norm(x))


@pytest.mark.parametrize(
    ("positions", "z_loss_coef", "weights", "dtype"),
    [
        (1, 0.0, None, torch.float32),
        (7, 1e-2, {"text": 5.0}, torch.bfloat16),
        (7, 1e-2, None, torch.float32),
        (32, 0.0, {"text": 5.0}, torch.float32),
    ],
)
def test_a_loss_is_the_plain_one(monkeypatch, positions, z_loss_coef, weights, dtype):
    monkeypatch.setattr(loss_moma, "_TERMS_CHUNK", positions)
    config = tiny_model(modality_loss_weights=weights, z_loss_coef=z_loss_coef).config
    ids = mixed_ids(2, 19)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3, -100)
    logits = (4 * torch.randn(2, 19, config.vocab_size, generator=torch.Generator().manual_seed(1))).to(dtype)
    logits.requires_grad_()
    found = causal_lm_loss(config, logits, labels, training=True)
    with monkeypatch.context() as patch:
        patch.setattr("modeling_moma.loss_moma._may_chunk", lambda logits: False)
        expected = causal_lm_loss(config, logits, labels, training=True)
    for name, loss in expected.modality_losses.items():
        assert torch.equal(found.modality_losses[name], loss)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    found, expected = (torch.autograd.grad(each.loss, logits) for each in (found, expected))
    assert_near(found, expected, 1e-6 if dtype == torch.float32 else 1e-2)
    assert not found[0].view(-1, config.vocab_size)[:-1][labels.flatten()[1:] < 0].any()


def test_a_loss_is_finite_where_what_has_no_target_is_not():
    config, labels = tiny_model().config, mixed_ids(1, 8)
    labels[0, 5:] = -100
    logits = torch.randn(1, 8, config.vocab_size)
    logits[0, 5:] = torch.inf
    assert causal_lm_loss(config, logits.requires_grad_(), labels, training=True).loss.isfinite()


def loss_of(model, parameters, ids):
    return torch.func.functional_call(model, parameters, (), {"input_ids": ids, "labels": ids}).loss


@pytest.mark.parametrize(
    ("fields", "is_training"),
    [
        ({"num_experts": 1}, False),
        ({"z_loss_coef": 1e-2, "modality_loss_weights": {"text": 5.0}}, True),
        ({"training_routing": "token_choice"}, True),
        ({"num_experts": {"text": 2, "image": 4}}, False),
    ],
)
def test_gradients_of_gradients_and_those_of_torch_func_are_those_of_plain_layers(fields, is_training):
    model = tiny_model(qk_norm="rmsnorm", norm_placement="pre", initializer_range=0.2, **fields).train(is_training)
    # torch's own attention has no second derivative on a CPU
    model.set_attn_implementation("eager")
    plain, ids = copy.deepcopy(model), mixed_ids(2, 12)
    use_cpu_layers(plain, False)
    plain.set_experts_implementation("eager")
    second = []
    for each in (model, plain):
        trained = [p for p in each.parameters() if p.requires_grad]
        first = torch.autograd.grad(
            each(input_ids=ids, labels=ids).loss, trained, create_graph=True, allow_unused=True
        )
        sum(grad.square().sum() for grad in first if grad is not None).backward()
        second.append([p.grad for p in trained if p.grad is not None])
    assert len(second[0]) == len(second[1])
    assert_near(*second, 1e-4)
    found = torch.func.grad(lambda parameters: loss_of(model, parameters, ids))(dict(model.named_parameters()))
    expected = {name: p for name, p in plain.named_parameters()}
    grads = torch.autograd.grad(loss_of(plain, expected, ids), list(expected.values()), allow_unused=True)
    for (name, one), other in zip(found.items(), grads):
        assert other is None and not one.any() or (one - other).norm() <= 1e-4 * other.norm() + 1e-7, name
