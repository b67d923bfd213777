# SPDX-License-Identifier: Apache-2.0
"""What `torchrun` starts on two nodes: each process trains models in layouts, and leaves what it saw.

`torchrun ... two_node_training.py FOLDER`, whose models `MODELS` names and whose results are `LAYOUT-RANK.pt`.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from helpers.parallel_reference import IMAGES, MIXED, MODELS, TEXT, sgd, train
from modeling_moma import MomaForCausalLM


# by the number of processes: of two nodes with one each, and with two
LAYOUTS = {
    2: {
        "sharded": {"fsdp_size": 2},
        "expert": {"fsdp_size": 2, "ep_size": 2},
    },
    4: {
        "replicated": {"dp_replicate_size": 2, "fsdp_size": 2},
        "sharded": {"fsdp_size": 4},
        "replicated_expert": {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
    },
}
NAMES = ("4t4i", "depth")
# step by step, the batch of each process; of two processes the first two
BATCHES = [(TEXT, IMAGES, MIXED, TEXT), (IMAGES, MIXED, TEXT, MIXED)]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for layout, sizes in LAYOUTS[dist.get_world_size()].items():
        results = {}
        for name in NAMES:
            config = DistributedConfig(**sizes)
            model = MomaForCausalLM.from_pretrained(folder / name, distributed_config=config).train()
            results[name] = train(model, sgd(model), [step[rank] for step in BATCHES])
        torch.save({"node": os.environ["GROUP_RANK"], **results}, folder / f"{layout}-{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    # gloo's threads now and then wait for each other for ever when they are taken down in order
    os._exit(0)


if __name__ == "__main__":
    assert set(NAMES) <= set(MODELS)
    main(Path(sys.argv[1]))
