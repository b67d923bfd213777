# SPDX-License-Identifier: Apache-2.0
"""What servers rely on: one row of tokens of many requests, each with its own past, equals the requests by themselves.

vLLM calls the base model so. That vLLM itself works is tested in `tests/serving/vllm`; these run without it.
"""

import ast
import inspect
import textwrap

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from helpers.tiny import tiny_model, tiny_processor
from modeling_moma.modeling_moma import MomaAttention


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


def row_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """An attention of one's own, which hangs on the module and answers with `[tokens, width]`."""
    assert attention_mask is None
    instance = module.row_attention
    instance.scale = scaling
    tokens = query.shape[-2]
    flat = (states.transpose(1, 2).reshape(tokens, -1) for states in (query, key, value))
    return instance.forward(*flat), None


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def requests(processor):
    """Token ids of three requests, one with a whole image."""
    image = [processor.begin_image_token_id, *processor.image_token_ids[:16], processor.end_image_token_id]
    words = [processor.tokenizer(text)["input_ids"] for text in ("noto: red apple", "castle", "twemoji: fish")]
    return [words[0], words[1] + image, words[2]]


def spread_thresholds(model):
    """Cuts at which some experts take a token and some do not, as after training."""
    torch.manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("router.threshold"):
            buffer.copy_(0.5 + 0.05 * torch.randn_like(buffer))


def give_row_attention(model):
    """An attention for each layer, which knows the requests."""
    ALL_ATTENTION_FUNCTIONS.register("row", row_attention)
    model.config._attn_implementation = "row"
    for layer in model.layers:
        layer.self_attn.row_attention = RowAttention(model.config)
    return [layer.self_attn.row_attention for layer in model.layers]


def call_in_one_row(model, pieces, starts=None):
    """Hidden states `[tokens, width]` of a piece of each request, all in one row; `starts` counts what came before."""
    lengths = [len(piece) for piece in pieces]
    for layer in model.layers:
        layer.self_attn.row_attention.lengths = lengths
    positions = [torch.arange(length) + start for length, start in zip(lengths, starts or [0] * len(pieces))]
    with torch.no_grad():
        outputs = model(
            input_ids=torch.tensor([sum(pieces, [])]),
            inputs_embeds=None,
            use_cache=False,
            position_ids=torch.cat(positions)[None],
            return_dict=False,
        )
    return outputs[0][0]


def separate_rows(model, requests):
    """Hidden states of each request on its own, one after the other."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([request])).last_hidden_state[0] for request in requests]
    return torch.cat(rows)


def test_the_call_of_attention_stands_in_forward_where_its_source_is_read():
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(MomaAttention.forward))))
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    lookups = [
        node for node in assigned if ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    ]
    assert len(lookups) == 1
    name = lookups[0].target.id
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    assert len(calls) == 1
    assert [ast.unparse(word.value) for word in calls[0].keywords if word.arg == "scaling"] == ["self.scaling"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_and_single_tokens_of_other_requests_share_a_row(processor, requests, variant):
    model = tiny_model(processor, **VARIANTS[variant]).model
    spread_thresholds(model)
    expected = separate_rows(model, requests).split([len(request) for request in requests])
    instances = give_row_attention(model)
    # a prompt in two chunks beside two that are answered token by token
    cuts = [(2, 3, len(requests[0])), (9, len(requests[1]) - 1, len(requests[1])), (1, 2, len(requests[2]))]
    starts, states = [0] * 3, [[], [], []]
    for ends in zip(*cuts):
        pieces = [request[start:end] for request, start, end in zip(requests, starts, ends)]
        row = call_in_one_row(model, pieces, starts)
        for kept, part in zip(states, row.split([len(piece) for piece in pieces])):
            kept.append(part)
        starts = ends
    for kept, whole in zip(states, expected):
        torch.testing.assert_close(torch.cat(kept), whole, atol=1e-5, rtol=1e-5)
    # every layer called its own attention once a row, with its own scale
    assert [instance.calls for instance in instances] == [3] * model.config.num_hidden_layers
    assert {instance.scale for instance in instances} == {model.config.head_dim**-0.5}


def test_a_row_may_hold_more_tokens_than_a_request(processor):
    model = tiny_model(processor, max_position_embeddings=20).model
    requests = [processor.tokenizer("castle")["input_ids"]] * 12
    assert sum(map(len, requests)) > 20 >= len(requests[0])
    expected = separate_rows(model, requests)
    give_row_attention(model)
    hidden_states = call_in_one_row(model, requests)
    torch.testing.assert_close(hidden_states, expected, atol=1e-5, rtol=1e-5)


def test_weights_are_built_on_meta_and_filled_in_later(processor, requests):
    whole = tiny_model(processor, **SHARED).model
    with init_empty_weights():
        model = AutoModel.from_config(whole.config).eval()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    # buffers that no checkpoint holds are those of a model built as usual
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, whole.get_buffer(name))
    model.load_state_dict(whole.state_dict(), assign=True)
    assert torch.equal(separate_rows(model, requests), separate_rows(whole, requests))


def test_attention_is_told_what_a_paged_cache_changes(processor):
    # flash attention reads keys from the blocks that the cache of continuous batching names
    class PagedCache:
        def update(self, key, value, layer_idx, kwargs):
            kwargs["block_table"] = f"blocks of layer {layer_idx}"
            return key, value

    seen = []

    def attention(module, query, key, value, attention_mask, block_table, **kwargs):
        seen.append(block_table)
        return query.transpose(1, 2), None

    model = tiny_model(processor)
    ids = processor(text=["a red apple"], return_tensors="pt")["input_ids"]
    ALL_ATTENTION_FUNCTIONS.register("paged_row", attention)
    model.config._attn_implementation = "paged_row"
    with torch.no_grad():
        model(ids, cache=PagedCache(), block_table="blocks of all layers")
    assert seen == ["blocks of layer 0", "blocks of layer 1"]
