# SPDX-License-Identifier: Apache-2.0
"""Two processes under `DistributedDataParallel`, of which one may have text only and the other images only."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from helpers.parallel_reference import MODELS, SEED, TWO_BATCHES, assert_steps_equal, sgd, single_process, train
from helpers.processes import run_group
from helpers.tiny import tiny_model


def work(rank, folder):
    results = {}
    for name, fields in MODELS.items():
        model = tiny_model(seed=SEED, **fields)
        # the second step hangs or raises when the first left a gradient out
        wrapped = DistributedDataParallel(model, find_unused_parameters=False)
        results[name] = train(model, sgd(model), [step[rank] for step in TWO_BATCHES], forward=wrapped)
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_group(work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_as_one(name, results):
    expected = single_process(name, TWO_BATCHES)["steps"]
    for rank, result in enumerate(results):
        assert_steps_equal(result[name], expected, rank)
