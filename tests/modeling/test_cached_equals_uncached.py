# SPDX-License-Identifier: Apache-2.0

from functools import cache

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.tiny import randomize_auxiliary
from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.depth_moma import MomaDepthRouter
from modeling_moma.modeling_moma import MomaForCausalLM
from modeling_moma.routing_moma import MomaRouter


PAD, BOS, EOS, BEGIN, END = 0, 1, 2, 3, 4
START, STOP, LENGTH = 100, 200, 8
EXPERTS = {"dense": 1, "1t1i": {"text": 1, "image": 1}, "8x": 8, "4t4i": {"text": 4, "image": 4}}
IMAGE = [BEGIN, *range(START, START + LENGTH), END]
# three lengths, padded by 0, 3 and 7
ROWS = [[BOS, *IMAGE, 20, 21, 20, 21], [BOS, 30, 31, *range(40, 49)], [BOS, 50, 51, 52, 53, 54, 55, 56]]

WAYS = {
    "greedy": {"do_sample": False},
    "beam_3": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0},
    "prompt_lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4, "one_row": True},
    "chunks": {"do_sample": False, "prefill_chunk_size": 4},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "static_beam_3": {"do_sample": False, "num_beams": 3, "cache_implementation": "static"},
    "static_chunks": {"do_sample": False, "prefill_chunk_size": 4, "cache_implementation": "static"},
    "assisted": {"do_sample": False, "assisted": True, "one_row": True},
}
AUXILIARY = {"auxiliary_routers": True, "inference_routing": "auxiliary"}
POOL = {"num_experts": 8, "inference_routing": "token_choice", "balance_bias_by_modality": True}
MODELS = {
    "1t1i-pre": {"num_experts": EXPERTS["1t1i"], "norm_placement": "pre"},
    "4t4i-untied": {"num_experts": EXPERTS["4t4i"], "untied_attention": True},
    "8x-biases": POOL,
    "4t4i-auxiliary": {"num_experts": EXPERTS["4t4i"], **AUXILIARY},
}
DEPTH = {"num_hidden_layers": 4, "depth_layers": [0, 2]}
MOD_4T4I = {"num_experts": EXPERTS["4t4i"], **DEPTH}
BY_MODALITY = {"depth_capacity": {"text": 0.5, "image": 0.25}}
DEPTH_MODELS = {
    "mod-dense": {"num_experts": EXPERTS["dense"], **DEPTH},
    "mod-1t1i": {"num_experts": EXPERTS["1t1i"], "norm_placement": "pre", **DEPTH},
    # the layer that the stock code asks for the length is a full one here
    "mod-4t4i-odd": {**MOD_4T4I, "depth_layers": [1, 3], "norm_placement": "pre"},
    "mod-4t4i-all": {**MOD_4T4I, "num_hidden_layers": 2, "depth_layers": [0, 1]},
    "mod-4t4i-by-modality": {**MOD_4T4I, **BY_MODALITY},
    "mod-4t4i-token_choice": {**MOD_4T4I, "depth_inference_routing": "token_choice"},
    "mod-4t4i-by-modality-auxiliary": {**MOD_4T4I, **BY_MODALITY, **AUXILIARY, "norm_placement": "pre"},
    "mod-4t4i-untied": {**MOD_4T4I, "untied_attention": True, "norm_placement": "pre"},
    "mod-8x-biases": {**POOL, **DEPTH, "depth_inference_routing": "threshold"},
    "mod-4t4i-eager": {**MOD_4T4I, "attn_implementation": "eager"},
}


def make_model(**fields):
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 21,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "begin_image_token_id": BEGIN,
        "end_image_token_id": END,
        "image_seq_length": LENGTH,
        "modality_token_ranges": {"image": [[START, STOP]]},
        "initializer_range": 0.2,
    }
    model = MomaForCausalLM(MomaConfig(**{**defaults, **fields})).eval()
    for module in model.modules():
        if isinstance(module, MomaRouter):
            # tokens meet no expert, one, or several
            module.threshold.uniform_(0.2, 0.8)
            if module.balance_bias.ndim == 2:
                module.balance_bias.uniform_(-0.3, 0.3)
        if isinstance(module, MomaDepthRouter):
            module.threshold.uniform_(0.48, 0.56)
            module.balance_bias.uniform_(-0.06, 0.02)
    randomize_auxiliary(model)
    for module in model.modules():
        if isinstance(module, MomaDepthRouter) and module.auxiliary is not None:
            # few enough that some steps have no token at all
            module.auxiliary.threshold.uniform_(0.8, 0.95)
    return model


@cache
def model_of(name):
    return make_model(**{**MODELS, **DEPTH_MODELS}[name])


def batch(rows):
    width = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, mode="image", **kwargs):
    torch.manual_seed(0)
    return model.generate(**inputs, generation_mode=mode, **kwargs)


# every model by two ways to generate, and every way by models of all kinds
CASES = [
    (name, list(WAYS)[(2 * index + more) % len(WAYS)])
    for index, name in enumerate([*MODELS, *DEPTH_MODELS])
    for more in range(2)
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_cached_equals_uncached(name, way):
    model, call = model_of(name), dict(WAYS[way])
    if call.pop("assisted", False):
        call["assistant_model"] = make_model(num_experts=EXPERTS["1t1i"], num_hidden_layers=2, depth_layers=[0])
    # drafts are of one row
    inputs = batch(ROWS[:1] if call.pop("one_row", False) else ROWS)
    cached = generate(model, inputs, **call)
    plain = {key: call[key] for key in ("do_sample", "top_k", "num_beams") if key in call}
    assert torch.equal(cached, generate(model, inputs, use_cache=False, **plain))


@pytest.mark.parametrize("name", [*MODELS, *DEPTH_MODELS])
def test_cached_equals_uncached_for_interleaved_rows_in_different_states(name):
    call = {"mode": "interleaved", "do_sample": True, "max_new_tokens": 14, "sequence_bias": {(BEGIN,): 5.0}}
    inputs = batch([[BOS, 20, BEGIN, 110, 111], *ROWS[1:]])
    cached = generate(model_of(name), inputs, use_cache=True, **call)
    assert torch.equal(cached, generate(model_of(name), inputs, use_cache=False, **call))


KINDS = [("dynamic", 1), ("dynamic", 3), ("static", 2)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind", "chunk"), [(name, *KINDS[index % 3]) for index, name in enumerate([*MODELS, *DEPTH_MODELS])]
)
def test_logits_of_chunks_equal_those_of_whole_rows(name, kind, chunk):
    model = model_of(name)
    ids, mask = batch(ROWS).values()
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    held = DynamicCache(config=model.config)
    if kind == "static":
        held = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    parts = []
    for start in range(0, ids.shape[1], chunk):
        stop = start + chunk
        parts.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=held).logits)
    logits, whole = torch.cat(parts, dim=1)[mask.bool()], whole[mask.bool()]
    torch.testing.assert_close(logits, whole, atol=1e-5 * whole.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("name", "lengths", "kind"),
    [
        ("1t1i-pre", [4], "dynamic"),
        ("8x-biases", [2, 1, 1], "static"),
        ("mod-dense", [1, 1, 1, 1], "dynamic"),
        ("mod-4t4i-by-modality", [2, 1, 1], "dynamic"),
        ("mod-4t4i-odd", [4], "static"),
        ("mod-4t4i-untied", [1, 1, 1, 1], "static"),
        ("mod-4t4i-eager", [2, 1, 1], "dynamic"),
    ],
)
@torch.no_grad()
def test_what_a_later_mask_hides_of_the_cache_is_not_seen(name, lengths, kind):
    model, config = model_of(name), model_of(name).config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=16)
    ids = torch.tensor([[BOS, *range(30, 41)], [BOS, 50, *IMAGE], [PAD, PAD, BOS, *range(60, 69)]])
    mask = (ids != PAD).long()
    model(ids[:, :8], attention_mask=mask[:, :8], cache=cache, use_cache=True)
    # of the last ones, which no other cached token has seen: words, codes, and of one row none
    rows = torch.randperm(3, generator=torch.Generator().manual_seed(len(lengths))).tolist()
    for row, count in zip(rows, (0, 1 + len(lengths), 3)):
        mask[row, 8 - count : 8] = 0
    logits, place = [], 8
    for length in lengths:
        place += length
        chunk = ids[:, place - length : place]
        logits.append(model(chunk, attention_mask=mask[:, :place], cache=cache, use_cache=True).logits)
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=2e-5, rtol=1e-4)
