# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch

from helpers.reference import GROUPS
from helpers.tiny import mixed_ids, tiny_model
from helpers.upcycling import CASES, trained_seed
from modeling_moma import add_layers


LAST = {"pre": ("o_proj", "down_proj"), "post": ("attention_norm", "ffn_norm")}
GROWN = {
    **CASES,
    "post, biases": ({**GROUPS["4t4i"], "attention_bias": True}, None),
    "pre, untied, biases": (
        {**GROUPS["4t4i"], "norm_placement": "pre", "untied_attention": True, "attention_bias": True},
        None,
    ),
    "pre, auxiliary": (
        {**GROUPS["4t4i"], "norm_placement": "pre", "auxiliary_routers": True, "depth_layers": [1]},
        None,
    ),
    "pre, shared": ({**GROUPS["shared"], "norm_placement": "pre"}, None),
}


def is_last(name, placement):
    parts = name.split(".")
    return "auxiliary" not in parts and any(part in LAST[placement] for part in parts)


@pytest.mark.parametrize("case", GROWN)
def test_deeper_model_computes_the_same_and_has_copies_behind_the_layers_named(case):
    model = trained_seed(**GROWN[case][0]).eval()
    before, count = copy.deepcopy(model.state_dict()), model.config.num_hidden_layers
    after = [0, count - 1, 0]
    deeper = add_layers(model, after)
    sources = [0, 0, 0, *range(1, count), count - 1]
    copies = [False, True, True, *[False] * (count - 1), True]

    state = deeper.state_dict()
    assert deeper.config.num_hidden_layers == len(sources) == len(deeper.model.layers)
    checked = set()
    for index, (source, is_copy) in enumerate(zip(sources, copies)):
        for name, tensor in model.model.layers[source].state_dict().items():
            mine = state[f"model.layers.{index}.{name}"]
            checked.add(f"model.layers.{index}.{name}")
            if is_copy and is_last(name, model.config.norm_placement):
                assert not mine.any(), name
            else:
                assert torch.equal(mine, tensor), name
                assert mine.data_ptr() != tensor.data_ptr()
    for name in set(state) - checked:
        assert torch.equal(state[name], before[name]), name

    is_depth = [layer in (model.config.depth_layers or ()) for layer in range(count)]
    depth = [index for index, source in enumerate(sources) if is_depth[source]]
    assert deeper.config.depth_layers == (depth if model.config.depth_layers else None)
    for mode in (False, True):
        model.train(mode)
        deeper.train(mode)
        assert torch.equal(deeper(mixed_ids()).logits, model(mixed_ids()).logits)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if "router" not in name
    )


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_every_matrix_of_a_copy_learns(placement):
    model = tiny_model(**GROUPS["4t4i"], norm_placement=placement, training_routing="token_choice")
    deeper = add_layers(model, [0]).train()
    optimizer = torch.optim.AdamW(deeper.parameters(), lr=1e-2, weight_decay=0.0)
    before = copy.deepcopy(deeper.model.layers[1].state_dict())
    ids = mixed_ids()
    for step in range(2):
        optimizer.zero_grad()
        deeper(ids, labels=ids).loss.backward()
        moved = {name for name, p in deeper.model.layers[1].named_parameters() if p.grad is not None and p.grad.any()}
        if step == 0:
            assert moved and all(is_last(name, placement) for name in moved)
        optimizer.step()
    state = deeper.model.layers[1].state_dict()
    for name, parameter in deeper.model.layers[1].named_parameters():
        if parameter.requires_grad and "router" not in name:
            assert not torch.equal(state[name], before[name]), name


def test_dtype_mode_and_generation_config_stay():
    model = tiny_model(**GROUPS["4t4i"]).bfloat16().eval()
    model.generation_config.temperature = 0.25
    deeper = add_layers(model, (1,))
    assert deeper.dtype == torch.bfloat16 and not deeper.training
    assert deeper.generation_config.temperature == 0.25
    assert deeper.generation_config is not model.generation_config


@pytest.mark.parametrize("after", [[], [-1], [2], [0, 2], [0.5], [True], 1, None])
def test_layers_that_are_not_there_are_refused(after):
    with pytest.raises(ValueError, match="`after` = .*counted from 0, of which the model has 2"):
        add_layers(tiny_model(**GROUPS["4t4i"]), after)
