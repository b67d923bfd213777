# SPDX-License-Identifier: Apache-2.0
"""What vLLM's Transformers backend asks of a model, without vLLM: a stand-in does to the model what the backend does.

The backend builds the base model on the meta device with real buffers, gives it an attention of its own by name,
puts a fused module in the place of everything called `experts` whose weights are all 3D, and calls the model with one
row of tokens of many requests, their positions, and `attention_instances`. See "Writing custom models" in vLLM's
documentation and `vllm/model_executor/models/transformers/`.
"""

import inspect
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.tiny import tiny_model, tiny_processor
from modeling_moma import MomaForCausalLM
from modeling_moma.attention_moma import MomaAttention


SHARED = {"shared_expert_intermediate_size": {"text": 16, "image": 16}}
VARIANTS = {
    "4t4i": SHARED,
    "4t4i, grouped queries": {**SHARED, "num_key_value_heads": 2},
    "one group, token choice": {
        "num_experts": 8,
        "training_routing": "token_choice",
        "inference_routing": "token_choice",
    },
    "dense": {"num_experts": 1},
}


class RowAttention:
    """Attention of one layer that gets tokens and heads, flat, and knows the requests by itself, as vLLM's does."""

    def __init__(self, config):
        self.config = config
        self.lengths, self.past = [], {}
        self.calls, self.scale = 0, None

    def forward(self, query, key, value):
        self.calls += 1
        shared = self.config.num_attention_heads // self.config.num_key_value_heads
        query, key, value = (states.unflatten(-1, (-1, self.config.head_dim)) for states in (query, key, value))
        key, value = (states.repeat_interleave(shared, dim=1) for states in (key, value))
        outputs = []
        for request, states in enumerate(zip(*(states.split(self.lengths) for states in (query, key, value)))):
            query, key, value = (part.transpose(0, 1) for part in states)
            if request in self.past:
                key, value = (torch.cat(pair, dim=1) for pair in zip(self.past[request], (key, value)))
            self.past[request] = key, value
            mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
            output = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
            outputs.append(output.transpose(0, 1).flatten(1))
        return torch.cat(outputs)


def row_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """The form of vLLM's attention function: it needs the keyword from the top, and answers `[tokens, width]`."""
    assert attention_mask is None
    instance = attention_instances[module.layer_idx]
    instance.scale = scaling
    tokens = query.shape[-2]
    flat = (states.transpose(1, 2).reshape(tokens, -1) for states in (query, key, value))
    return instance.forward(*flat), None


class FusedExperts(nn.Module):
    """In the place of packed experts: nothing but their weights and the documented call."""

    def __init__(self, experts):
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.calls = []

    def forward(self, hidden_states, top_k_index, top_k_weights):
        self.calls.append((hidden_states.shape, top_k_index, top_k_weights))
        output = torch.zeros_like(hidden_states)
        for row, (experts, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights)):
            for expert, weight in zip(experts, weights):
                gate, up = (self.gate_up_proj[expert] @ hidden_states[row]).chunk(2)
                output[row] += weight * (self.down_proj[expert] @ (nn.functional.silu(gate) * up))
        return output


def replace_experts(module: nn.Module) -> list[FusedExperts]:
    """What the backend takes for experts: a child of that name whose parameters all have three dimensions."""
    replaced = []
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if name == "experts" and parameters and all(parameter.ndim == 3 for parameter in parameters):
            setattr(module, name, FusedExperts(child))
            replaced.append(getattr(module, name))
        else:
            replaced += replace_experts(child)
    return replaced


@contextmanager
def empty_weights_and_real_buffers():
    """Parameters go to the meta device as they are registered, buffers stay."""
    register = nn.Module.register_parameter

    def register_empty(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            empty = nn.Parameter(module._parameters[name].to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = empty

    nn.Module.register_parameter = register_empty
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def requests(processor):
    """Token ids of three requests, one with a whole picture."""
    picture = [processor.begin_image_token_id, *processor.image_token_ids[:16], processor.end_image_token_id]
    words = [processor.tokenizer(text)["input_ids"] for text in ("noto: red apple", "castle", "twemoji: fish")]
    return [words[0], words[1] + picture, words[2]]


@pytest.fixture(scope="module")
def attention():
    ALL_ATTENTION_FUNCTIONS.register("row", row_attention)
    return "row"


def spread_thresholds(model):
    """Cuts at which some experts take a token and some do not, as after training."""
    torch.manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("router.threshold"):
            buffer.copy_(0.5 + 0.05 * torch.randn_like(buffer))


def attention_instances(model):
    return {layer: RowAttention(model.config) for layer in range(model.config.num_hidden_layers)}


def call_as_backend(model, pieces, instances, starts=None):
    """Hidden states `[tokens, width]` of a piece of each request, all in one row; `starts` counts what came before."""
    lengths = [len(piece) for piece in pieces]
    for instance in instances.values():
        instance.lengths = lengths
    positions = [torch.arange(length) + start for length, start in zip(lengths, starts or [0] * len(pieces))]
    with torch.no_grad():
        outputs = model(
            input_ids=torch.tensor([sum(pieces, [])]),
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.cat(positions)[None],
            attention_instances=instances,
            return_dict=False,
        )
    return outputs[0][0]


def separate_rows(model, requests):
    """Hidden states of each request on its own, one after the other."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([request])).last_hidden_state[0] for request in requests]
    return torch.cat(rows)


def test_the_base_model_says_that_it_takes_another_attention(processor):
    model = tiny_model(processor).model
    assert type(model)._supports_attention_backend
    # an encoder is told by `is_causal = False`
    assert all(getattr(module, "is_causal", True) for module in model.modules())
    assert "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(inspect.getmodule(MomaAttention))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_row_of_many_requests_equals_separate_rows(processor, requests, attention, variant):
    model = tiny_model(processor, **VARIANTS[variant]).model
    spread_thresholds(model)
    expected = separate_rows(model, requests)
    fused = replace_experts(model)
    model.config._attn_implementation = attention
    instances = attention_instances(model)
    hidden_states = call_as_backend(model, requests, instances)
    torch.testing.assert_close(hidden_states, expected, atol=1e-5, rtol=1e-5)
    # every layer called its own attention once, with its own scale
    assert [instance.calls for instance in instances.values()] == [1] * model.config.num_hidden_layers
    assert {instance.scale for instance in instances.values()} == {model.config.head_dim**-0.5}
    groups = sum(model.config.group_num_experts(group) > 1 for group in model.config.expert_groups)
    assert [len(experts.calls) for experts in fused] == [1] * groups * model.config.num_hidden_layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_and_single_tokens_of_other_requests_share_a_row(processor, requests, attention, variant):
    model = tiny_model(processor, **VARIANTS[variant]).model
    spread_thresholds(model)
    expected = separate_rows(model, requests).split([len(request) for request in requests])
    replace_experts(model)
    model.config._attn_implementation = attention
    instances = attention_instances(model)
    # a prompt in two chunks beside two that are answered token by token
    cuts = [(2, 3, len(requests[0])), (9, len(requests[1]) - 1, len(requests[1])), (1, 2, len(requests[2]))]
    starts, states = [0] * 3, [[], [], []]
    for ends in zip(*cuts):
        pieces = [request[start:end] for request, start, end in zip(requests, starts, ends)]
        row = call_as_backend(model, pieces, instances, starts)
        for kept, part in zip(states, row.split([len(piece) for piece in pieces])):
            kept.append(part)
        starts = ends
    for kept, whole in zip(states, expected):
        torch.testing.assert_close(torch.cat(kept), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "dense"])
def test_experts_are_called_with_rows_choices_and_gates(processor, requests, attention, variant):
    model = tiny_model(processor, **VARIANTS[variant]).model
    fused = replace_experts(model)
    assert fused
    model.config._attn_implementation = attention
    call_as_backend(model, requests, attention_instances(model))
    for experts in fused:
        assert list(inspect.signature(type(experts).forward).parameters)[1:] == [
            "hidden_states",
            "top_k_index",
            "top_k_weights",
        ]
        ((rows, index, weights),) = experts.calls
        assert rows == (index.shape[0], model.config.hidden_size) and rows[0] > 0
        # a row for each pair of token and expert, so that the backend's `top_k` is 1 whatever a token takes
        assert index.shape == weights.shape == (rows[0], 1)
        # the experts weigh their outputs themselves
        assert (0 < weights).all() and (weights < 1).all()
        assert index.dtype == torch.long and 0 <= int(index.min()) and int(index.max()) < len(experts.gate_up_proj)
    assert model.config.num_experts_per_tok == 1


def test_experts_that_no_token_chose_are_called_with_no_rows(processor, requests, attention):
    model = tiny_model(processor, **SHARED).model
    for name, buffer in model.named_buffers():
        if name.endswith("router.threshold"):
            buffer.fill_(2.0)
    fused = replace_experts(model)
    model.config._attn_implementation = attention
    hidden_states = call_as_backend(model, requests, attention_instances(model))
    assert hidden_states.isfinite().all()
    assert [experts.calls[0][0] for experts in fused] == [(0, model.config.hidden_size)] * 4


def test_a_row_may_hold_more_tokens_than_a_request(processor, attention):
    model = tiny_model(processor, max_position_embeddings=20).model
    requests = [processor.tokenizer("castle")["input_ids"]] * 12
    assert sum(map(len, requests)) > 20 >= len(requests[0])
    expected = separate_rows(model, requests)
    model.config._attn_implementation = attention
    hidden_states = call_as_backend(model, requests, attention_instances(model))
    torch.testing.assert_close(hidden_states, expected, atol=1e-5, rtol=1e-5)


def test_embeddings_can_be_given_instead_of_ids(processor, requests, attention):
    model = tiny_model(processor).model
    model.config._attn_implementation = attention
    words = [request for request in requests if processor.begin_image_token_id not in request]
    expected = call_as_backend(model, words, attention_instances(model))
    instances = attention_instances(model)
    for instance in instances.values():
        instance.lengths = [len(request) for request in words]
    with torch.no_grad():
        given = model(
            input_ids=None,
            inputs_embeds=model.get_input_embeddings()(torch.tensor([sum(words, [])])),
            use_cache=False,
            position_ids=torch.cat([torch.arange(len(request)) for request in words])[None],
            attention_instances=instances,
            return_dict=False,
        )[0][0]
    torch.testing.assert_close(given, expected)


def test_weights_are_built_on_meta_and_filled_in_later(processor, requests):
    whole = tiny_model(processor, **SHARED).model
    with empty_weights_and_real_buffers():
        model = AutoModel.from_config(whole.config).eval()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    # buffers that no checkpoint holds are those of a model built as usual
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, whole.get_buffer(name))
    model.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(separate_rows(model, requests), separate_rows(whole, requests))


def test_layers_are_the_only_list_of_modules(processor):
    model = tiny_model(processor, **SHARED).model
    assert [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)] == ["layers"]
    assert len(model.layers) == model.config.num_hidden_layers
    # the pipeline keeps what comes before on its first process and what comes after on its last
    with_weights = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    assert with_weights == ["embed_tokens", "layers", "norm"]


def test_all_that_the_head_adds_is_one_product(processor, requests):
    model = tiny_model(processor, tie_word_embeddings=True)
    assert model.base_model_prefix == "model"
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"model"}
    ids = torch.tensor([requests[1]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        torch.testing.assert_close(logits, model.model(input_ids=ids)[0] @ model.get_input_embeddings().weight.T)


def test_the_plan_splits_attention_in_styles_that_the_backend_knows(processor):
    plan = tiny_model(processor, **SHARED).model.tp_plan
    projections = {name: plan[f"layers.*.self_attn.{name}_proj"] for name in "qkvo"}
    assert projections == {"q": "colwise", "k": "colwise", "v": "colwise", "o": "rowwise"}
    shared = {style for name, style in plan.items() if "shared_expert" in name}
    assert shared == {"colwise", "rowwise"}


def test_config_names_the_class_that_the_backend_loads(processor, tmp_path):
    config = tiny_model(processor).config
    assert config.auto_map["AutoModel"] == "modeling_moma.MomaModel"
    assert isinstance(AutoModel.from_config(config), MomaForCausalLM(config).model.__class__)
