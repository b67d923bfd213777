# SPDX-License-Identifier: Apache-2.0
"""FSDP2 as Accelerate has it from configs/accelerate/fsdp2.yaml, on CPU processes."""

import os
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers.trainer
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from helpers import recorded_training
from modeling_moma.cli import pretrain


CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
# one file for each process and kind of state, and computation in fp32
SHARDED = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "ACCELERATE_MIXED_PRECISION": "no"}


def launch_arguments(path, *more):
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(path), "--main_process_port", "0", *more, "train.py"]
    )
    return _validate_launch_command(arguments)[0]


def set_environment(overrides: Mapping[str, str]):
    """Set what `accelerate launch` sets for each process, but for its place among the others."""
    os.environ.update({**prepare_multi_gpu_env(launch_arguments(CONFIG_FOLDER / "fsdp2.yaml")), **overrides})


def fsdp_accelerator(rank: int, num_processes: int, overrides: Mapping[str, str]) -> Accelerator:
    """What Accelerate makes of the file and the overrides in one of so many processes."""
    set_environment(overrides)
    size = str(num_processes)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    return sharded(Accelerator(cpu=True))


def sharded(accelerator: Accelerator) -> Accelerator:
    """The same with FSDP, which Accelerate leaves to accelerators; nothing else in it looks at the device."""
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        accelerator.state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    return accelerator


@contextmanager
def sharded_trainers():
    """Trainers are under FSDP2, as the environment has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.trainer, "Accelerator", lambda **options: sharded(Accelerator(**options)))
        yield


def sharded_training(arguments: list[str]):
    """As `recorded_training.main`, under FSDP2 with sharded checkpoints, in a process of `start_scripts`."""
    set_environment(SHARDED)
    with sharded_trainers():
        recorded_training.main(arguments)


if __name__ == "__main__":
    # `moma pretrain` for `accelerate launch`
    with sharded_trainers():
        pretrain.main(sys.argv[1:])
