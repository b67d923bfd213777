# SPDX-License-Identifier: Apache-2.0
import functools
from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.nn.modules import module as of_all_modules
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    GenerationConfig,
    MaxTimeCriteria,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    TextIteratorStreamer,
)
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from helpers.tiny import tiny_model
from modeling_moma import MomaForCausalLM
from modeling_moma.modeling_moma import MomaDecoderLayer


PROMPT = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny_model(vocab_size=64).eval()


@pytest.fixture
def modes(monkeypatch):
    """Whether each layer ran in inference mode."""
    modes = []
    forward = MomaDecoderLayer.forward

    @functools.wraps(forward)
    def spy(*args, **kwargs):
        modes.append(torch.is_inference_mode_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(MomaDecoderLayer, "forward", spy)
    return modes


def draw(model, **kwargs):
    return model.generate(PROMPT, max_new_tokens=5, do_sample=False, **kwargs)


def test_layers_of_a_plain_generate_run_in_inference_mode_and_its_ids_can_be_trained_on(model, modes):
    ids = draw(model)
    assert modes and all(modes)
    assert not ids.is_inference()
    model.train()(ids, labels=ids, use_cache=False).loss.backward()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"guidance_scale": 2.0},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_every_strategy_gives_the_ids_that_it_gives_without(kwargs, model, modes):
    found = []
    # what a call leaves for the caller is seen
    for seen in (False, True):
        torch.manual_seed(0)
        ids = model.generate(PROMPT, **{"max_new_tokens": 5, "return_dict_in_generate": seen, **kwargs})
        found.append(ids.sequences if seen else ids)
        assert modes and all(mode != seen for mode in modes)
        modes.clear()
    assert torch.equal(*found)


@pytest.fixture
def step_modes(monkeypatch):
    """Whether each step of the stock loop ran in inference mode."""
    modes = []
    prepare = MomaForCausalLM.prepare_inputs_for_generation

    def spy(*args, **kwargs):
        modes.append(torch.is_inference_mode_enabled())
        return prepare(*args, **kwargs)

    monkeypatch.setattr(MomaForCausalLM, "prepare_inputs_for_generation", spy)
    return modes


class Words:
    """What a streamer of Transformers asks of a tokenizer."""

    def decode(self, ids, **kwargs):
        return " ".join(map(str, ids)) + "\n" if isinstance(ids, list) else str(ids)


class Streamer:
    def __init__(self):
        self.parts = []

    def put(self, ids):
        self.parts.append(ids)

    def end(self):
        pass


def test_steps_run_in_inference_mode_where_nothing_of_the_callers_comes_between(model, step_modes):
    ids = draw(model, stopping_criteria=[], logits_processor=None)
    assert step_modes and all(step_modes) and not ids.is_inference()
    ids += 0
    step_modes.clear()
    streamer = Streamer()
    met = []
    for kwargs in (
        {"logits_processor": [lambda ids, scores: (met.append(ids), scores)[1]]},
        {"stopping_criteria": [lambda ids, scores: (met.append(ids), torch.zeros(2, dtype=torch.bool))[1]]},
        {
            "logits_processor": [
                PrefixConstrainedLogitsProcessor(lambda row, ids: (met.append(ids), list(range(5, 60)))[1], 1)
            ]
        },
        {"prefix_allowed_tokens_fn": lambda row, ids: (met.append(ids), list(range(5, 60)))[1]},
    ):
        assert torch.equal(draw(model, **kwargs)[:, :6], PROMPT)
    model.generate(PROMPT[:1], max_new_tokens=5, do_sample=False, streamer=streamer)
    assert step_modes and not any(step_modes)
    assert met and streamer.parts and not any(each.is_inference() for each in met + streamer.parts)


def test_steps_run_in_inference_mode_beside_objects_of_the_librarys(model, step_modes):
    kwargs = {
        "logits_processor": [MinNewTokensLengthLogitsProcessor(6, 2, 2)],
        "stopping_criteria": [MaxTimeCriteria(60)],
    }
    draw(model, **kwargs)
    streamer = TextIteratorStreamer(Words())
    ids = model.generate(PROMPT[:1], max_new_tokens=5, do_sample=False, streamer=streamer)
    assert step_modes and all(step_modes)
    assert "".join(streamer).split() == [str(token) for token in ids[0].tolist()]


def test_scaled_rotary_embeddings_keep_nothing_of_inference_mode(step_modes):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model(vocab_size=64, rope_parameters=rope, max_position_embeddings=8).eval()
    ids = draw(model)
    assert step_modes and not any(step_modes)
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    assert not any(buffer.is_inference() for buffer in model.buffers())


def test_what_the_caller_sees_is_of_no_inference_mode(model, modes):
    cache = DynamicCache(config=model.config)
    draw(model, cache=cache)
    outputs = draw(model, generation_config=GenerationConfig(return_dict_in_generate=True, output_hidden_states=True))
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    draw(model)
    handle.remove()
    draw(model, cache_implementation="static")
    # drafted tokens are taken back out of the cache
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit"):
        model.generate(PROMPT[:1], max_new_tokens=5, do_sample=False, **{name: 1})
    assert modes and not any(modes)
    assert not cache.layers[0].keys.is_inference()
    assert not outputs.hidden_states[0][-1].is_inference()


def test_forwards_outside_of_generate_are_plain(model, modes):
    with torch.no_grad():
        model(PROMPT)
    draw(model)
    modes.clear()
    with torch.no_grad():
        logits = model(PROMPT).logits
    assert modes and not any(modes) and not logits.is_inference()


def test_a_call_that_fails_leaves_nothing_behind(model, modes):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, stopping_criteria=[stop])
    modes.clear()
    with torch.no_grad():
        model(PROMPT)
    assert modes and not any(modes)


def keep(seen, value):
    """Keep every tensor in a call's arguments or outcome."""
    if isinstance(value, torch.Tensor):
        seen.append(value)
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            keep(seen, part)


def a_hook_of_all_modules(model, seen, stack):
    handle = of_all_modules.register_module_forward_hook(lambda module, args, output: keep(seen, output))
    stack.callback(handle.remove)


def a_hook_before_all_modules(model, seen, stack):
    handle = of_all_modules.register_module_forward_pre_hook(lambda module, args: keep(seen, args))
    stack.callback(handle.remove)


def a_mode_of_functions(model, seen, stack):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            keep(seen, output)
            return output

    stack.enter_context(Mode())


def a_mode_of_operations(model, seen, stack):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            keep(seen, output)
            return output

    stack.enter_context(Mode())


def a_forward_of_its_own(model, seen, stack):
    forward = model.model.norm.forward

    def kept(x):
        seen.append(x)
        return forward(x)

    model.model.norm.forward = kept


def a_method_of_its_own(model, seen, stack):
    prepare = model.prepare_inputs_for_generation

    def kept(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        keep(seen, inputs)
        return inputs

    model.prepare_inputs_for_generation = kept


class Kept(nn.Module):
    def __init__(self, inner, seen):
        super().__init__()
        self.inner = inner
        self.seen = seen

    def forward(self, *args):
        keep(self.seen, args)
        return self.inner(*args)


def a_module_of_its_own(model, seen, stack):
    model.model.norm = Kept(model.model.norm, seen)


def a_forward_for_its_class(model, seen, stack):
    kind = type(model.model.norm)
    forward = kind.forward
    stack.callback(setattr, kind, "forward", forward)

    def kept(self, x):
        seen.append(x)
        return forward(self, x)

    kind.forward = kept


def attention_of_its_own(model, seen, stack):
    def kept(module, query, key, value, *args, **kwargs):
        keep(seen, (query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    for interface, function in ((AttentionInterface, kept), (AttentionMaskInterface, sdpa_mask)):
        interface.register("kept", function)
        stack.callback(interface._global_mapping.pop, "kept")
    model.set_attn_implementation("kept")


def experts_of_its_own(model, seen, stack):
    def kept(experts, x_ND, *args, **kwargs):
        seen.append(x_ND)
        return torch.zeros_like(x_ND)

    ExpertsInterface.register("kept", kept)
    stack.callback(ExpertsInterface._global_mapping.pop, "kept")
    model.set_experts_implementation("kept")


def a_computed_weight(model, seen, stack):
    class Computed(nn.Module):
        def forward(self, weight):
            weight = 2 * weight
            seen.append(weight)
            return weight

    nn.utils.parametrize.register_parametrization(model.model.layers[0].self_attn.q_proj, "weight", Computed())


class Seen(torch.Tensor):
    seen = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        output = super().__torch_function__(func, types, args, kwargs)
        if isinstance(output, torch.Tensor):
            cls.seen.append(output.as_subclass(torch.Tensor))
        return output


def a_weight_of_its_own_class(model, seen, stack):
    Seen.seen = seen
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Seen), requires_grad=False)


@pytest.mark.parametrize(
    "watch",
    [
        a_hook_of_all_modules,
        a_hook_before_all_modules,
        a_mode_of_functions,
        a_mode_of_operations,
        a_forward_of_its_own,
        a_method_of_its_own,
        a_module_of_its_own,
        a_forward_for_its_class,
        attention_of_its_own,
        experts_of_its_own,
        a_computed_weight,
        a_weight_of_its_own_class,
    ],
    ids=lambda watch: watch.__name__,
)
def test_whatever_of_the_callers_sees_a_step_gets_tensors_that_can_be_trained_on(watch, model, step_modes):
    seen = []
    with ExitStack() as stack:
        watch(model, seen, stack)
        draw(model)
    assert step_modes and not any(step_modes)
    assert seen and not any(tensor.is_inference() for tensor in seen)
    weight = torch.ones(seen[-1].shape, requires_grad=True)
    (weight * seen[-1]).sum().backward()
    assert torch.equal(weight.grad, seen[-1].to(weight.dtype))


def test_ids_of_a_class_of_their_own_stay_out_of_inference_mode(model, step_modes):
    Seen.seen = seen = []
    model.generate(PROMPT.as_subclass(Seen), max_new_tokens=3, do_sample=False)
    assert step_modes and not any(step_modes)
    assert seen and not any(tensor.is_inference() for tensor in seen)


def test_a_default_device_and_a_hook_that_is_gone_see_nothing(model, step_modes):
    of_all_modules.register_module_forward_hook(lambda *args: None).remove()
    with torch.device("cpu"):
        draw(model)
    assert step_modes and all(step_modes)
