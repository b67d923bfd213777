# SPDX-License-Identifier: Apache-2.0
"""What `torch.compile` makes of the model: few graphs, and the same numbers."""

from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, StaticCache

from helpers.reference import GROUPS, fields_of
from helpers.slow import slow
from helpers.tiny import mixed_ids, randomize_auxiliary
from helpers.tiny import tiny_model as reference_model
from modeling_moma import MomaConfig, MomaForCausalLM


PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "performance.md"
FOUR_EACH = {"text": 4, "image": 4}
# what a configuration is called in the table, and its fields
KINDS = {
    "dense": {"num_experts": 1},
    "8x": {"num_experts": 8},
    "1t1i": {"num_experts": {"text": 1, "image": 1}},
    "4t4i": {"num_experts": FOUR_EACH},
    "4t4i, `token_choice`": {"num_experts": FOUR_EACH, "training_routing": "token_choice"},
    "4t4i, `threshold`": {"num_experts": FOUR_EACH, "training_routing": "threshold"},
    "4t4i, one depth layer": {"num_experts": FOUR_EACH, "depth_layers": [0]},
    "4t4i, two depth layers": {"num_experts": FOUR_EACH, "num_hidden_layers": 4, "depth_layers": [0, 2]},
}
# the version of torch that the page names
COUNTED_WITH = "2.13"


def training_graphs(fields: dict) -> int:
    """Graphs that one training forward of a small model is compiled into: graph breaks, plus 1."""
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    images = {
        "begin_image_token_id": 5,
        "end_image_token_id": 6,
        "image_seq_length": 4,
        "modality_token_ranges": {"image": [[32, 64]]},
    }
    config = MomaConfig(**{"num_hidden_layers": 2, **small, **images, **fields})
    model = MomaForCausalLM(config).train()
    ids_BT = torch.randint(7, 64, (2, 16))
    torch._dynamo.reset()
    return torch._dynamo.explain(model)(input_ids=ids_BT, labels=ids_BT).graph_count


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def listed_breaks() -> dict[str, int]:
    assert f"torch {COUNTED_WITH}" in PAGE.read_text()
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: int(row[1]) for row in rows if row[0] in KINDS}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "4t4i" else slow) for name in KINDS])
def test_graph_breaks_of_a_training_forward_are_those_that_the_docs_list(name):
    breaks, listed = training_graphs(KINDS[name]) - 1, listed_breaks()[name]
    # a later compiler may need fewer
    assert breaks <= listed
    if torch.__version__.startswith(f"{COUNTED_WITH}."):
        assert breaks == listed
    if "depth" not in name and "threshold" not in name:
        # the split by modality waits for the numbers of tokens, once
        assert breaks <= 1


@slow
def test_threshold_training_has_one_graph_break_where_dynamic_shapes_are_captured():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert training_graphs(KINDS["4t4i, `threshold`"]) <= 2


def test_compiled_training_equals_plain_training_for_any_mixture_of_text_and_images():
    model, plain = (reference_model(**GROUPS["4t4i"], num_hidden_layers=1) for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager")
    for num_words in (6, 12):
        words = torch.randint(26, 40, (2, num_words))
        codes = torch.randint(8, 24, (2, 12 - num_words))
        ids = torch.cat([words, codes], dim=1)
        losses = [network(input_ids=ids, labels=ids).loss for network in (compiled, plain)]
        torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
        for loss in losses:
            loss.backward()
        for (name, parameter), other in zip(model.named_parameters(), plain.parameters()):
            torch.testing.assert_close(parameter.grad, other.grad, atol=1e-6, rtol=0, msg=name)
        model.zero_grad()
        plain.zero_grad()
    for (name, value), other in zip(model.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(value, other, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    "name, mode",
    [("8x", "text"), ("4t4i", "image"), ("shared_by_modality", "image")],
)
def test_a_compiled_step_is_one_graph_and_gives_the_same_tokens(name, mode):
    model = reference_model(**GROUPS[name], pad_token_id=0, bos_token_id=1, eos_token_id=2).eval()
    ids = torch.tensor([[0, 0, 1, 30, 31, 32], [1, 24, 8, 9, 10, 11]])
    if mode == "text":
        ids[1, 1:] = 33
    arguments = {"attention_mask": (ids != 0).long(), "generation_mode": mode, "do_sample": False}
    if mode == "text":
        arguments["max_new_tokens"] = 4
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend="eager")
    compile_config._compile_all_devices = True
    expected = model.generate(ids, **arguments)
    torch._dynamo.utils.counters.clear()
    compiled = model.generate(ids, cache_implementation="static", compile_config=compile_config, **arguments)
    assert torch.equal(compiled, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def step_of(model, ids, cache, num_seen, room=16):
    """What `generate` gives the model in a step of one token with a static cache."""
    mask = (torch.arange(room) <= num_seen).expand(ids.shape[0], 1, 1, room).clone()
    positions = torch.full((ids.shape[0], 1), num_seen)
    step = ids[:, num_seen : num_seen + 1].clone()
    return {"input_ids": step, "attention_mask": mask, "position_ids": positions, "cache": cache}


@torch.no_grad()
@pytest.mark.parametrize("name, routing", [("4t4i", "threshold"), ("8x", "token_choice"), ("4t4i", "auxiliary")])
def test_a_step_is_one_graph_under_every_causal_rule(name, routing):
    model = reference_model(**GROUPS[name], **fields_of(routing)).eval()
    randomize_auxiliary(model)
    ids = mixed_ids()
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    outputs = []
    for forward in (model, step):
        cache = StaticCache(model.config, max_cache_len=16)
        model(ids[:, :8], cache=cache, routing=routing)
        calls = [step_of(model, ids, cache, place) for place in range(8, 11)]
        outputs.append(torch.cat([forward(**call, routing=routing).logits for call in calls]))
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_step_of_a_depth_layer_is_not_compiled_for_who_takes_part_is_read_from_the_device():
    # `generate` asks the cache
    assert not StaticCache(reference_model(depth_layers=[0]).config, max_cache_len=16).is_compileable
