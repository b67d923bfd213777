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
import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from modeling.reference import GROUPS, tiny_model


BATCHES = {"text": torch.arange(26, 38).view(2, 6), "pictures": torch.arange(8, 20).view(2, 6)}
STEPS = 2


def train(rank, folder, name, routing):
    """One of two processes: text only on rank 0, pictures only on rank 1."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )
    model = tiny_model(**GROUPS[name], training_routing=routing)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    ids = list(BATCHES.values())[rank]
    # the second step hangs or raises when the first left a gradient out
    for _ in range(STEPS):
        wrapped(input_ids=ids, labels=ids).loss.backward()
    result = {
        "gradients": {key: parameter.grad for key, parameter in model.named_parameters()},
        "routers": {key: value for key, value in model.state_dict().items() if ".router." in key},
    }
    torch.save(result, folder / f"rank{rank}.pt")
    dist.barrier()
    # gloo's threads now and then wait for each other for ever when they are taken down in order
    os._exit(0)


def single_process_gradients(name, routing):
    """The mean over both batches of the gradients that one process alone computes."""
    total = {}
    for ids in BATCHES.values():
        model = tiny_model(**GROUPS[name], training_routing=routing)
        for _ in range(STEPS):
            model(input_ids=ids, labels=ids).loss.backward()
        for key, parameter in model.named_parameters():
            total[key] = total.get(key, 0) + parameter.grad / 2
    return total


@pytest.mark.parametrize(("name", "routing"), [("4t4i", "expert_choice"), ("shared_by_modality", "token_choice")])
def test_one_rank_may_be_text_only_and_the_other_pictures_only(name, routing, tmp_path):
    # daemons: a process that hangs in its own exit must not keep the test run from ending
    mp.spawn(train, args=(tmp_path, name, routing), nprocs=2, daemon=True)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for key, expected in single_process_gradients(name, routing).items():
        for result in (first, second):
            assert torch.allclose(result["gradients"][key], expected, atol=1e-5), key
    for key, value in first["routers"].items():
        assert torch.equal(value, second["routers"][key]), key
        if key.endswith("num_updates"):
            assert value == STEPS, key
        if key.endswith("threshold"):
            # each group has seen the rank that has its tokens
            assert (value != 0.5).all(), key
