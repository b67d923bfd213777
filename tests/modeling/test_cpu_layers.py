# SPDX-License-Identifier: Apache-2.0
"""Layers in their forms for CPUs: they come and go without a trace, whatever is done to a model."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

from helpers.closeness import assert_as_near_as_plain
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma import MomaForCausalLM
from modeling_moma.cpu_moma import CpuAttention, CpuRMSNorm, MomaCpuLinear, cpu_form_of, use_cpu_layers


FIELDS = [{}, {"depth_layers": [0], "qk_norm": "rmsnorm", "attention_bias": True}, {"untied_attention": True}]


def classes_of(model):
    return {name: type(module) for name, module in model.named_modules()}


def steps(model, ids):
    """Logits of a prompt and of steps after it."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(ids[:, :6], cache=cache).logits]
        parts += [model(ids[:, i : i + 1], cache=cache).logits for i in range(6, ids.shape[1])]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", FIELDS)
def test_swapped_in_and_out_they_leave_the_classes_as_they_were_and_compute_the_same(fields, dtype):
    model, ids = tiny_model(shared_expert_intermediate_size=8, **fields).to(dtype).eval(), mixed_ids()
    built = classes_of(model)
    forms = (CpuAttention, CpuRMSNorm, MomaCpuLinear)
    assert all(any(issubclass(kind, form) for kind in built.values()) for form in forms)
    found = steps(model, ids)
    use_cpu_layers(model, False)
    plain = classes_of(model)
    assert not any(issubclass(kind, forms) for kind in plain.values())
    assert {name: cpu_form_of(kind) or kind for name, kind in plain.items()} == built
    expected = steps(model, ids)
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    else:
        exact = copy.deepcopy(model).float()
        use_cpu_layers(exact, False)
        assert_as_near_as_plain(found, expected, steps(exact, ids), tolerance=0.05)
    for _ in range(2):
        use_cpu_layers(model)
        assert classes_of(model) == built
    assert torch.equal(steps(model, ids), found)


def test_models_are_built_copied_pickled_saved_and_loaded_with_them(tmp_path):
    model, ids = tiny_model().eval(), mixed_ids()
    expected = steps(model, ids)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    model.save_pretrained(tmp_path)
    loaded = MomaForCausalLM.from_pretrained(tmp_path)
    for weight in loaded.parameters():
        # where they lie in a file is no multiple of 64 bytes, for which MKL sums in another order on some CPUs
        weight.data = weight.data.clone()
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        loaded,
    ):
        assert classes_of(other) == classes_of(model)
        assert torch.equal(steps(other, ids), expected)
    assert model.config.architectures == ["MomaForCausalLM"]


def test_training_moves_adapters_and_hooks_meet_the_layers_as_they_are():
    model, ids = tiny_model(), mixed_ids()
    plain = copy.deepcopy(model)
    use_cpu_layers(plain, False)
    for each in (model, plain):
        each.train()(ids, labels=ids, use_cache=False).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
    met = []
    handle = model.lm_head.register_forward_hook(lambda *args: met.append(0))
    steps(model.eval(), ids)
    handle.remove()
    assert len(met) == ids.shape[1] - 5
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    merged = steps(adapted, ids)
    torch.testing.assert_close(steps(adapted.merge_and_unload(), ids), merged, rtol=1e-4, atol=1e-5)
    moved = model.to("meta", torch.bfloat16)
    hidden_states = torch.empty(2, 1, model.config.hidden_size, device="meta", dtype=torch.bfloat16)
    with torch.no_grad():
        assert moved.lm_head(moved.model.norm(hidden_states)).device.type == "meta"


def test_subclasses_and_layers_of_others_stay_as_they_are():
    class Own(nn.Linear):
        pass

    layers = nn.ModuleList([nn.Linear(2, 2), Own(2, 2), nn.LayerNorm(2)])
    use_cpu_layers(layers)
    assert [type(layer) for layer in layers] == [MomaCpuLinear, Own, nn.LayerNorm]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_gradients_do_not_depend_on_the_default_type_of_the_process(default):
    model, ids, gradients = tiny_model().train(), mixed_ids(), []
    for dtype in (torch.float32, default):
        model.zero_grad()
        torch.set_default_dtype(dtype)
        try:
            model(ids, labels=ids).loss.backward()
        finally:
            torch.set_default_dtype(torch.float32)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)
