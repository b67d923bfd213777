# SPDX-License-Identifier: Apache-2.0
"""Processes on CPUs for Transformers' common tests of parallelism, whose source distribution lacks its own."""

import torch

from helpers.processes import run_group, start_processes


__all__ = [
    "_get_distributed_backend",
    "_get_distributed_device_type",
    "_get_rank_device",
    "_set_rank_device",
    "_start_rank_processes",
    "run_distributed",
]


def run_distributed(world_size: int):
    """Let a function of a rank and more arguments run in all processes of a group at once."""

    def decorate(function):
        return lambda *args: run_group(function, *args, num_processes=world_size)

    return decorate


def _start_rank_processes(function, args, nprocs):
    start_processes(_with_few_steps, function, args, num_processes=nprocs)


def _with_few_steps(rank, function, args):
    # imported by what imports this
    from transformers_common_tests import test_fsdp_mixin

    # a checkpoint lies between them
    test_fsdp_mixin.NUM_STEPS = 6
    function(rank, *args)


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    """One CPU serves all."""
