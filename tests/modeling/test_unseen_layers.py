# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from helpers.tiny import tiny_model
from modeling_moma import MomaForCausalLM, decoder_layers_moma


PROMPT = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny_model(vocab_size=64).eval()


@pytest.fixture
def modes(monkeypatch):
    """Whether each layer ran in inference mode."""
    modes = []
    forward = decoder_layers_moma.MomaDecoderLayer.forward

    def spy(*args, **kwargs):
        modes.append(torch.is_inference_mode_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(decoder_layers_moma.MomaDecoderLayer, "forward", spy)
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
        {"prefix_allowed_tokens_fn": lambda row, ids: (met.append(ids), list(range(5, 60)))[1]},
    ):
        assert torch.equal(draw(model, **kwargs)[:, :6], PROMPT)
    model.generate(PROMPT[:1], max_new_tokens=5, do_sample=False, streamer=streamer)
    assert step_modes and not any(step_modes)
    assert met and streamer.parts and not any(each.is_inference() for each in met + streamer.parts)


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
