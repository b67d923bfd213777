# SPDX-License-Identifier: Apache-2.0
"""Tensor, expert and fully sharded data parallelism on processes over gloo, against one process."""

import pytest
import torch
from transformers.distributed import DistributedConfig

from helpers import parallel_reference
from helpers.parallel_reference import (
    ONE_BATCH,
    SEED,
    TWO_BATCHES,
    assert_steps_equal,
    evaluate,
    sgd,
    single_process,
    train,
)
from helpers.processes import run_group
from helpers.slow import slow
from helpers.tiny import tiny_model
from modeling_moma import MomaForCausalLM


# each has layers without depth, too
MODELS = {name: parallel_reference.MODELS[name] for name in ("depth", "uneven")}
# the sizes multiply to two processes, in the last to four
KINDS = {
    "tensor": {"tp_size": 2},
    "tensor_expert": {"tp_size": 2, "ep_size": 2},
    "tensor_expert_all_to_all": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "sharded": {"fsdp_size": 2},
    "sharded_expert": {"fsdp_size": 2, "ep_size": 2},
    "sharded_tensor_expert": {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
}


def batches_of(kind):
    """Processes of a tensor-parallel group share a batch."""
    return TWO_BATCHES if "fsdp_size" in KINDS[kind] else ONE_BATCH


def batch_of(kind, rank):
    return rank // KINDS[kind].get("tp_size", 1)


def num_processes(kind):
    return KINDS[kind].get("fsdp_size", 1) * KINDS[kind].get("tp_size", 1)


def work(rank, folder, kind):
    """One process: trains, evaluates and saves each model, and leaves what it saw."""
    results = {}
    for name in MODELS:
        config = DistributedConfig(**KINDS[kind])
        model = MomaForCausalLM.from_pretrained(folder / name, distributed_config=config).train()
        batches = [step[batch_of(kind, rank)] for step in batches_of(kind)]
        results[name] = {
            "sizes": {
                key: (value.to_local() if hasattr(value, "to_local") else value).numel()
                for key, value in model.named_parameters()
            },
            "steps": train(model, sgd(model), batches),
            **evaluate(model, batches[-1]),
        }
        model.save_pretrained(folder / kind / name)
    torch.save(results, folder / f"{kind}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel")
    for name, fields in MODELS.items():
        tiny_model(seed=SEED, **fields).save_pretrained(path / name)
    return path


# the layouts that remain hold the parts of these
SLOW = ("tensor", "tensor_expert", "sharded", "sharded_expert")


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=[slow] if kind in SLOW else []) for kind in KINDS])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def results(folder, kind):
    """What each process saw of each model."""
    run_group(work, folder, kind, num_processes=num_processes(kind))
    return [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(num_processes(kind))]


@pytest.mark.parametrize("name", MODELS)
def test_processes_equal_a_single_one(name, kind, results, folder):
    single = single_process(name, batches_of(kind))
    for rank, result in enumerate(results):
        batch = batch_of(kind, rank)
        assert_steps_equal(result[name]["steps"], single["steps"], batch)
        expected = single["evaluated"][batch]
        torch.testing.assert_close(result[name]["logits"], expected["logits"], atol=1e-5, rtol=1e-5)
        for cache in ("generated", "generated_static"):
            assert torch.equal(result[name][cache], expected[cache]), cache
    # what the processes saved together
    state = MomaForCausalLM.from_pretrained(folder / kind / name).state_dict()
    assert state.keys() == single["state"].keys()
    for key, value in single["state"].items():
        torch.testing.assert_close(state[key], value, atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_routers_have_the_same_state_in_every_process(name, results):
    for first, *others in zip(*(result[name]["steps"] for result in results), strict=True):
        for key, value in first["buffers"].items():
            for other in others:
                assert torch.equal(other["buffers"][key], value), key


@pytest.mark.parametrize("name", MODELS)
def test_no_two_processes_hold_the_same_part_of_a_matrix(name, results):
    for key, value in tiny_model(seed=SEED, **MODELS[name]).named_parameters():
        if value.ndim > 1 and "router." not in key:
            sizes = [result[name]["sizes"][key] for result in results]
            assert sum(sizes) == value.numel(), (key, sizes)
            assert max(sizes) < value.numel(), key
