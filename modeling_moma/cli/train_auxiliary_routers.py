# SPDX-License-Identifier: Apache-2.0
"""Train auxiliary routers, which tell ahead what a model's experts would take."""

import argparse
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from ..utils.fields import Float
from ..utils.messages import without_import_notices
from .arguments import Changes, parse_fields


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
        set (`list[str]`, *optional*, defaults to `[]`):
            fields of `TrainingArguments`, as trainer.max_steps=500.
        threshold (`float`, *optional*):
            take what is at least so probable (the paper: 0.5); by default it is calibrated.
        attn_implementation (`str`, *optional*, defaults to `"sdpa"`):
            on a CPU eager is the faster one for small models whose rows are not packed, sdpa for packed rows.
        resume (`bool`, *optional*, defaults to `False`):
            go on from the last checkpoint in the output folder.
    """

    model: str
    processor: str
    tokens: str
    output: str
    set: Changes = field(default_factory=list)
    threshold: Annotated[Float, Field(gt=0, lt=1)] | None = None
    attn_implementation: str = "sdpa"
    resume: bool = False


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    args = parse_fields(Arguments, __doc__, arguments)
    with without_import_notices():
        from ..training.auxiliary_routers import AuxiliaryFields
        from ..training.recipe import read_recipe
        from ..training.trainer_settings import with_defaults

    recipe = read_recipe(None, (), args.set, ("trainer",))
    return argparse.Namespace(**vars(args), trainer=with_defaults(AuxiliaryFields, recipe.trainer))


def run(args: argparse.Namespace) -> None:
    with without_import_notices():
        from ..training.auxiliary_routers import train_auxiliary_routers

    train_auxiliary_routers(args)


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
