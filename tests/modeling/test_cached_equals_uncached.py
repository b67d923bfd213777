# Copyright 2026 The modeling-moma authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import pytest
import torch

from modeling_moma.configuration_moma import MomaConfig
from modeling_moma.modeling_moma import MomaForCausalLM
from modeling_moma.routing_moma import MomaRouter


PAD, BOS, EOS, BEGIN, END = 0, 1, 2, 3, 4
START, STOP, LENGTH = 100, 200, 8
EXPERTS = {"dense": 1, "1t1i": {"text": 1, "image": 1}, "8x": 8, "4t4i": {"text": 4, "image": 4}}
PICTURE = [BEGIN, *range(START, START + LENGTH), END]
# three lengths, padded by 0, 3 and 7
ROWS = [[BOS, *PICTURE, 20, 21, 20, 21], [BOS, 30, 31, *range(40, 49)], [BOS, 50, 51, 52, 53, 54, 55, 56]]

STRATEGIES = {
    "greedy": {"do_sample": False},
    "beam_3": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 0},
}


def make_model(experts, norm_placement):
    torch.manual_seed(0)
    config = MomaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=21,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        begin_image_token_id=BEGIN,
        end_image_token_id=END,
        image_seq_length=LENGTH,
        modality_token_ranges={"image": [[START, STOP]]},
        num_experts=EXPERTS[experts],
        norm_placement=norm_placement,
        initializer_range=0.2,
    )
    model = MomaForCausalLM(config).eval()
    for module in model.modules():
        if isinstance(module, MomaRouter):
            # tokens meet no expert, one, or several
            module.threshold.uniform_(0.2, 0.8)
    return model


@pytest.fixture(scope="module", params=[(name, norm) for name in EXPERTS for norm in ("post", "pre")], ids="-".join)
def model(request):
    return make_model(*request.param)


def batch(rows):
    width = max(len(row) for row in rows)
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, mode="image", **kwargs):
    torch.manual_seed(0)
    return model.generate(**inputs, generation_mode=mode, **kwargs)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_cached_equals_uncached(model, strategy):
    inputs = batch(ROWS)
    assert (inputs["attention_mask"] == 0).sum(1).tolist() == [0, 3, 7]
    cached = generate(model, inputs, use_cache=True, **strategy)
    assert torch.equal(cached, generate(model, inputs, use_cache=False, **strategy))


def test_cached_equals_uncached_for_interleaved_rows_in_different_states(model):
    call = {"mode": "interleaved", "do_sample": True, "max_new_tokens": 14, "sequence_bias": {(BEGIN,): 5.0}}
    inputs = batch([[BOS, 20, BEGIN, 110, 111], *ROWS[1:]])
    cached = generate(model, inputs, use_cache=True, **call)
    assert torch.equal(cached, generate(model, inputs, use_cache=False, **call))


@pytest.mark.parametrize("mode", ["image", "text"])
def test_prompt_lookup_equals_uncached_greedy(model, mode):
    inputs = batch(ROWS[:1])
    call = {"mode": mode, "do_sample": False, "max_new_tokens": LENGTH + 2}
    looked_up = generate(model, inputs, prompt_lookup_num_tokens=4, **call)
    assert torch.equal(looked_up, generate(model, inputs, use_cache=False, **call))


def test_chunked_prefill_equals_uncached_greedy(model):
    inputs = batch(ROWS)
    chunked = generate(model, inputs, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(chunked, generate(model, inputs, do_sample=False, use_cache=False))
