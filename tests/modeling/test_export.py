# SPDX-License-Identifier: Apache-2.0
"""Programs of `torch.export` and graphs of ONNX, by the exporters of Transformers: they hold for any tokens."""

import copy
import importlib.util

import pytest
import torch
from transformers import GenerationConfig, StaticCache
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import get_leaf_tensors

from helpers.reference import GROUPS, fields_of
from helpers.slow import slow
from helpers.tiny import mixed_ids, randomize_auxiliary, tiny_model
from modeling_moma.routing_moma import MomaRouter


LAYOUTS = {
    "dense": {"num_experts": 1},
    **{name: GROUPS[name] for name in ("1t1i", "8x", "4t4i")},
    "untied": {**GROUPS["4t4i"], "untied_attention": True},
    # as `upcycle(keep_seed=True)` makes it
    "kept seed": {
        "num_experts": {"text": 1, "image": 4},
        "expert_intermediate_size": {"image": 8},
        "shared_expert_intermediate_size": {"image": 32},
    },
}
LENGTH, STORED = 10, 16
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="ONNX is not here: pip install onnx onnxscript onnxruntime",
)
KINDS = [
    *(pytest.param("torch", layout, marks=[] if layout in ("4t4i", "kept seed") else slow) for layout in LAYOUTS),
    pytest.param("onnx", "4t4i", marks=[slow, needs_onnx]),
]


def model_of(layout: str, **fields):
    """A model whose tokens meet no expert, one, or several."""
    model = tiny_model(**{"num_hidden_layers": 1, **LAYOUTS[layout], **fields}).eval()
    generator = torch.Generator().manual_seed(0)
    for router in model.modules():
        if isinstance(router, MomaRouter):
            router.threshold.uniform_(0.3, 0.7, generator=generator)
    return model


def batch_of(rows: int, length: int, padding: int = 0) -> dict[str, torch.Tensor]:
    """Rows of text and codes, the first of them padded on the left."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": mixed_ids(rows=rows, length=length), "attention_mask": mask}


def assert_same(actual, expected, atol: float = 1e-5):
    actual, expected = get_leaf_tensors(actual), get_leaf_tensors(expected)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=atol, rtol=1e-5)


def exporter_of(kind: str, dynamic: bool):
    if kind == "torch":
        return DynamoExporter(), DynamoConfig(dynamic=dynamic)
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    return OnnxExporter(), OnnxConfig(dynamic=dynamic)


@torch.no_grad()
@pytest.mark.parametrize("kind, layout", KINDS)
def test_a_program_holds_for_other_rows_lengths_and_mixtures(kind, layout):
    model = model_of(layout)
    exporter, config = exporter_of(kind, dynamic=True)
    program = exporter.export(model, batch_of(3, LENGTH, padding=2), config)
    for batch in (batch_of(3, LENGTH, padding=2), batch_of(2, 7, padding=3), batch_of(4, 13)):
        assert_same(program(**batch), model(**batch))
    text = {"input_ids": torch.full((2, 6), 30), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    assert_same(program(**text), model(**text))


@torch.no_grad()
@pytest.mark.parametrize("routing", [pytest.param("token_choice", marks=slow), "auxiliary"])
def test_a_program_holds_for_the_other_causal_rules(routing):
    model = model_of("4t4i", **fields_of(routing))
    randomize_auxiliary(model)
    program = DynamoExporter().export(model, batch_of(3, LENGTH), DynamoConfig())
    batch = batch_of(3, LENGTH, padding=4)
    assert_same(program(**batch), model(**batch))


@torch.no_grad()
@pytest.mark.parametrize("implementation", [pytest.param("batched_mm", marks=slow), "grouped_mm"])
def test_a_program_holds_with_the_experts_of_transformers(implementation):
    model = model_of("4t4i")
    expected = model(**batch_of(3, LENGTH, padding=4))
    model.set_experts_implementation(implementation)
    program = DynamoExporter().export(model, batch_of(3, LENGTH), DynamoConfig())
    assert_same(program(**batch_of(3, LENGTH, padding=4)).logits, expected.logits)


@torch.no_grad()
@pytest.mark.parametrize("kind, layout", [("torch", "kept seed"), KINDS[-1]])
def test_prefill_and_a_decode_step_with_a_static_cache_go_on_as_generate_does(kind, layout):
    model = model_of(layout, num_hidden_layers=2 if kind == "torch" else 1)
    ids = mixed_ids(rows=1, length=LENGTH)
    static = GenerationConfig(cache_implementation="static", max_cache_len=STORED, do_sample=False)
    exporter, config = exporter_of(kind, dynamic=False)
    exported = exporter.export_for_generation(model, {"input_ids": ids}, config, generation_config=static)
    prefill, decode = (exported.runners[name] for name in ("prefill", "decode"))
    cache = StaticCache(config=model.config, max_cache_len=STORED)
    output = prefill(input_ids=ids, position_ids=torch.arange(LENGTH)[None], cache=cache)
    assert_same(output.logits, model(ids).logits)
    # a word and a code, which other groups take than the words before
    for token in (30, 9, 11, 31):
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        mask = (torch.arange(STORED) < ids.shape[1])[None, None, None]
        position = torch.tensor([[ids.shape[1] - 1]])
        output = decode(input_ids=ids[:, -1:], position_ids=position, attention_mask=mask, cache=output.cache)
        assert_same(output.logits, model(ids).logits[:, -1:])


@torch.no_grad()
def test_a_step_with_a_dynamic_cache_is_exported():
    model = model_of("4t4i")
    ids = mixed_ids(rows=2, length=LENGTH)
    exported = DynamoExporter().export_for_generation(model, {"input_ids": ids}, DynamoConfig(dynamic=True))
    for num_seen in (LENGTH - 1, 4):
        cache = model(ids[:, :num_seen], use_cache=True).cache
        # once more, so that the cache has room behind its tokens
        cache = model(ids[:, num_seen : num_seen + 1], cache=cache).cache
        step = {"input_ids": ids[:, :1], "position_ids": torch.full((2, 1), num_seen + 1), "use_cache": True}
        expected = model(**step, cache=copy.deepcopy(cache))
        step.pop("use_cache")
        assert_same(exported.runners["decode"](**step, cache=cache), expected)


@torch.no_grad()
def test_torch_export_alone_will_do():
    model = model_of("4t4i")
    call = {"input_ids": mixed_ids(rows=2, length=LENGTH), "use_cache": False}
    program = torch.export.export(model, (), call, strict=True)
    other = {**call, "input_ids": mixed_ids(rows=2, length=LENGTH).flip(1)}
    torch.testing.assert_close(program.module()(**other).logits, model(**other).logits, atol=1e-5, rtol=1e-5)
    outside = {**call, "input_ids": torch.full((2, LENGTH), model.config.vocab_size)}
    with pytest.raises(IndexError):
        program.module()(**outside)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields, routing, training, message",
    [
        ({"depth_layers": [0]}, None, False, r"`depth_layers` is \[0\]: .* cannot be exported"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
            None,
            False,
            "`rope_parameters` has the type 'dynamic', .* cannot be exported",
        ),
        ({}, "expert_choice", False, "`routing` is 'expert_choice'"),
        ({}, None, True, "train"),
    ],
    ids=["depth", "dynamic", "expert_choice", "training"],
)
def test_what_no_program_can_hold_is_refused_by_name(fields, routing, training, message):
    model = tiny_model(**GROUPS["4t4i"], **fields).train(training)
    call = {"input_ids": mixed_ids(rows=2, length=LENGTH), "use_cache": False, "routing": routing}
    with pytest.raises(ValueError, match=message):
        torch.export.export(model, (), call)
