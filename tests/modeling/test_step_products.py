# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from helpers.closeness import assert_as_near_as_plain
from helpers.tiny import tiny_model
from modeling_moma import cpu_moma
from modeling_moma.cpu_moma import has_instructions, multiplies_with, use_cpu_layers


ROWS = [(1,), (1, 1), (2, 1), (3, 5), (8, 8), (65,), (0, 4)]
CPUS = {"matrix units": ("amx_bf16", "avx512_bf16"), "bf16": ("avx512_bf16",), "neither": ()}


@pytest.fixture(params=CPUS)
def cpu(request, monkeypatch):
    """Every kind of CPU, whichever this is."""
    monkeypatch.setattr(cpu_moma, "multiplies_with", lambda name: name in CPUS[request.param])
    return request.param


def cpu_layer(layer):
    """In bf16, with the form for CPUs."""
    use_cpu_layers(layer)
    return layer.bfloat16().eval()


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return cpu_layer(nn.Linear(12, 7, bias=False))


@pytest.fixture
def called(layer):
    """What the layer itself was called with."""
    inputs = []
    linear = nn.functional.linear

    def spy(x, *args):
        inputs.append(x)
        return linear(x, *args)

    patch = pytest.MonkeyPatch()
    patch.setattr(nn.functional, "linear", spy)
    yield inputs
    patch.undo()


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS)
def test_a_product_is_that_of_the_layer(cpu, layer, called, rows):
    x = torch.randn(*rows, 12).bfloat16()
    y = layer(x)
    expected = x.float() @ layer.weight.float().T
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=1e-3)
    assert y.shape == (*rows, 7) and y.dtype == torch.bfloat16
    fewest = {"matrix units": 1, "bf16": 16, "neither": 100}[cpu]
    is_left = fewest <= x.shape[:-1].numel() < 65
    assert len(called) == (0 if is_left else 1)


def test_what_is_more_than_a_product_is_called(layer, called, monkeypatch):
    monkeypatch.setattr(cpu_moma, "multiplies_with", lambda name: True)
    x = torch.randn(3, 12).bfloat16()
    # in training and where gradients are wanted
    layer(x)
    with torch.no_grad():
        layer.train()
        layer(x)
        layer.eval()
        copy.deepcopy(layer).float()(x.float())
        cpu_layer(nn.Linear(12, 7))(x)
        cpu_layer(type("Other", (nn.Linear,), {})(12, 7, bias=False))(x)
        assert len(called) == 5
        layer(x)
        assert len(called) == 5


def keep_under_another_name(layer):
    """As whoever computes weights by a property."""
    layer.original = layer.weight
    del layer._parameters["weight"]
    vars(layer)["weight"] = layer.original


def compute(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())


def compute_by_hook(layer):
    nn.utils.parametrizations.weight_norm(layer)


def bias_as_a_plain_tensor(layer):
    del layer._parameters["bias"]
    layer.bias = torch.ones(7).bfloat16()


@torch.no_grad()
@pytest.mark.parametrize(
    ("place", "rows"),
    [(keep_under_another_name, 1), (compute, 16), (compute_by_hook, 1), (bias_as_a_plain_tensor, 16)],
)
def test_a_weight_that_is_no_parameter_of_its_layer_multiplies_there(place, rows, layer, monkeypatch):
    monkeypatch.setattr(cpu_moma, "multiplies_with", lambda name: True)
    x = torch.randn(rows, 12).bfloat16()
    weight = layer.weight.detach().float()
    place(layer)
    y = layer(x)
    expected = x.float() @ weight.T + (1 if place is bias_as_a_plain_tensor else 0)
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


@torch.no_grad()
@pytest.mark.parametrize(("depth_layers", "num_rows"), [(None, 1), ([0], 3), (None, 16)])
def test_steps_of_a_model_equal_those_of_plain_layers(cpu, depth_layers, num_rows):
    model = tiny_model(vocab_size=64, depth_layers=depth_layers, shared_intermediate_size=8).bfloat16().eval()
    ids = torch.randint(5, 60, (num_rows, 9), generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).float()
    found = []
    for each, has_forms in ((model, True), (model, False), (exact, False)):
        use_cpu_layers(each, has_forms)
        cache = DynamicCache(config=model.config)
        each(ids[:, :5], cache=cache)
        found.append(torch.cat([each(ids[:, i : i + 1], cache=cache).logits for i in range(5, 9)], dim=1))
    assert_as_near_as_plain(*found, tolerance=0.02)


def test_matrix_units_that_onednn_may_not_use_are_none(monkeypatch):
    monkeypatch.setattr(cpu_moma.torch.cpu, "get_capabilities", lambda: {"amx_bf16": True, "avx512_bf16": True})
    has_instructions.cache_clear()
    found = {}
    for value in (None, "DEFAULT", "AVX512_CORE_AMX", "avx512_core_bf16"):
        multiplies_with.cache_clear()
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        if value is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", value)
        found[value] = multiplies_with("amx_bf16"), multiplies_with("avx512_bf16")
        # attention has kernels of torch's own
        assert has_instructions("amx_bf16")
    has_instructions.cache_clear()
    multiplies_with.cache_clear()
    assert list(found.values()) == [(True, True), (True, True), (True, True), (False, True)]
