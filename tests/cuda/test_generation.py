# SPDX-License-Identifier: Apache-2.0
"""Generation in every mode gives the tokens of the CPU."""

import pytest
import torch

from helpers.cuda.compare import both, on_device
from helpers.reference import GROUPS, fields_of
from helpers.tiny import mixed_ids, tiny_model
from modeling_moma.configuration_moma import rule_names


FOUR = GROUPS["4t4i"]
MODELS = {
    "dense": GROUPS["dense"],
    "8x": GROUPS["8x"],
    "shared": GROUPS["shared"],
    **{rule: {**FOUR, **fields_of(rule), "inference_routing": rule} for rule in rule_names(is_causal=True)},
    "depth": {**FOUR, "num_hidden_layers": 3, "depth_layers": [0, 2], "depth_capacity": 0.5},
    "depth by modality": {
        **FOUR,
        "num_hidden_layers": 3,
        "depth_layers": [1],
        "depth_capacity": {"text": 0.5, "image": 0.25},
    },
}
WORDS = {"max_new_tokens": 12}
MODES = {
    "greedy": WORDS,
    "static cache": {**WORDS, "cache_implementation": "static", "disable_compile": True},
    "sampling": {**WORDS, "do_sample": True, "top_k": 10, "num_return_sequences": 2},
    "beams": {**WORDS, "num_beams": 2},
    "text": {**WORDS, "generation_mode": "text"},
    "image": {"generation_mode": "image"},
    "image, guided": {"generation_mode": "image", "guidance_scale": 3.0, "do_sample": True},
    "image, static cache": {"generation_mode": "image", "cache_implementation": "static", "disable_compile": True},
    "interleaved": {**WORDS, "generation_mode": "interleaved"},
    # of one row
    "prompt lookup": {**WORDS, "prompt_lookup_num_tokens": 3},
    "early exit": {**WORDS, "assistant_early_exit": 1},
}
ONE_ROW = ("prompt lookup", "early exit")
# all modes of two models, and of the others those that differ most
CALLS = [
    (name, mode)
    for name in MODELS
    for mode in MODES
    if name in ("threshold", "depth") or mode in ("greedy", "static cache", "beams", "image")
]


@pytest.mark.parametrize(("name", "mode"), CALLS)
def test_tokens_are_those_of_the_cpu(device, name, mode):
    options = MODES[mode]
    if options.get("do_sample") and not device.is_pretended:
        pytest.skip("a real device draws other numbers")
    model, copied = both(tiny_model(**MODELS[name]).eval())
    ids = mixed_ids(rows=2, length=10)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if mode in ONE_ROW:
        inputs = {key: value[1:] for key, value in inputs.items()}
    else:
        inputs["attention_mask"][0, :3] = 0
    torch.manual_seed(1)
    expected = model.generate(**inputs, **options)
    torch.manual_seed(1)
    found = copied.generate(**on_device(inputs), **options)
    assert found.device.type == "cuda" and torch.equal(found.cpu(), expected)
    assert expected.shape[1] > ids.shape[1]
