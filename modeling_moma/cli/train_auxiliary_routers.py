# SPDX-License-Identifier: Apache-2.0
"""Train auxiliary routers, which tell ahead what a model's experts would take."""

import argparse
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ..utils.fields import Count, Float, Int, NotNegative, Seed
from ..utils.messages import without_import_notices
from .arguments import parse_fields


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma train-auxiliary-routers`.

    Args:
        model (`str`):
            folder of a trained MomaForCausalLM.
        processor (`str`):
            folder of its MomaProcessor.
        tokens (`str`):
            folder that `moma tokenize` wrote.
        output (`str`):
            new folder for checkpoints, model, processor and report.
        steps (`int`, *optional*, defaults to `500`):
            steps of the optimizer.
        batch_size (`int`, *optional*, defaults to `32`):
            that of the main training, where possible.
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            batches of a step.
        learning_rate (`float`, *optional*, defaults to `0.001`):
            largest one of the schedule.
        warmup_steps (`int`, *optional*, defaults to `20`):
            steps in which the learning rate rises.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            of the optimizer.
        eval_steps (`int`, *optional*, defaults to `250`):
            steps between two evaluations.
        save_steps (`int`, *optional*, defaults to `250`):
            steps between two checkpoints.
        save_total_limit (`int`, *optional*, defaults to `1`):
            checkpoints to keep.
        logging_steps (`int`, *optional*, defaults to `25`):
            steps between two lines of the log.
        threshold (`float`, *optional*):
            take what is at least so probable (the paper: 0.5); by default it is calibrated.
        seed (`int`, *optional*, defaults to `0`):
            of weights and order.
        attn_implementation (`str`, *optional*, defaults to `"sdpa"`):
            on a CPU eager is the faster one for small models whose rows are not packed, sdpa for packed rows.
        bf16 (`Literal["auto", "on", "off"]`, *optional*, defaults to `"auto"`):
            bf16 in training; auto: where the device is faster by that.
        resume (`bool`, *optional*, defaults to `False`):
            go on from the last checkpoint in the output folder.
    """

    model: str
    processor: str
    tokens: str
    output: str
    steps: Count = 500
    batch_size: Count = 32
    gradient_accumulation_steps: Count = 1
    learning_rate: NotNegative = 1e-3
    warmup_steps: Annotated[Int, Field(ge=0)] = 20
    weight_decay: NotNegative = 0.0
    eval_steps: Count = 250
    save_steps: Count = 250
    save_total_limit: Int = 1
    logging_steps: Count = 25
    threshold: Annotated[Float, Field(gt=0, lt=1)] | None = None
    seed: Seed = 0
    attn_implementation: str = "sdpa"
    bf16: Literal["auto", "on", "off"] = "auto"
    resume: bool = False


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    return argparse.Namespace(**vars(parse_fields(Arguments, __doc__, arguments)))


def run(args: argparse.Namespace) -> None:
    with without_import_notices():
        from ..training.auxiliary_routers import train_auxiliary_routers

    train_auxiliary_routers(args)


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
