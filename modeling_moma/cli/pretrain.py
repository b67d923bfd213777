# SPDX-License-Identifier: Apache-2.0
"""Train a MoMa on tokenized sources, from a recipe or from a saved model.

`--set` changes fields of the recipe, and those of its section `trainer` are fields of `TrainingArguments`.
"""

import argparse
from dataclasses import dataclass, field
from typing import Annotated

from ..utils.fields import Count, Int
from ..utils.messages import without_import_notices
from .arguments import Changes, Flag, FlagParser


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma pretrain`.

    Args:
        recipe_file (`str`, *optional*):
            YAML of model and trainer, and of sources where they changed.
        processor (`str`):
            folder of a MomaProcessor.
        tokens (`str`):
            folder that `moma tokenize` wrote.
        model (`str`, *optional*):
            start from this saved model; one that was upcycled, or given layers, goes on in the data.
        restart_data (`bool`, *optional*, defaults to `False`):
            begin at the first example, whatever `--model` has seen.
        output (`str`):
            folder for checkpoints and the model.
        set (`list[str]`, *optional*, defaults to `[]`):
            fields of the recipe, as trainer.max_steps=4000 or model.preset=moma-90m-4t4i.
        eval_examples (`int`, *optional*):
            evaluate on so many held-out examples; by default on all.
        stop_at (`int`, *optional*):
            stop and save at this step of the schedule, as seeds do.
        freeze_groups (`list[str]`, *optional*, defaults to `[]`):
            expert groups whose weights stay as they are.
        train_groups (`list[str]`, *optional*, defaults to `[]`):
            train these expert groups and the rows of their tokens alone: all else stays as it is.
        lora_rank (`int`, *optional*):
            train adapters of this rank in place of the weights, and merge them at the end (extra `finetune`).
        attn_implementation (`str`, *optional*, defaults to `"sdpa"`):
            on a CPU eager is the faster one for small models whose rows are not packed, sdpa for packed rows.
        resume (`bool`, *optional*, defaults to `False`):
            go on from the last checkpoint in the output folder.
    """

    recipe_file: Annotated[str | None, Flag(metavar="RECIPE", is_positional=True)] = None
    processor: str
    tokens: str
    model: str | None = None
    restart_data: bool = False
    output: str
    set: Changes = field(default_factory=list)
    eval_examples: Count | None = None
    stop_at: Count | None = None
    freeze_groups: Annotated[list[str], Flag(one_of="freezing")] = field(default_factory=list)
    train_groups: Annotated[list[str], Flag(one_of="freezing")] = field(default_factory=list)
    lora_rank: Int | None = None
    attn_implementation: str = "sdpa"
    resume: bool = False


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line with its recipe, and with the recipe's section `trainer` over the defaults."""
    parser = FlagParser(Arguments, description=__doc__)
    args = Arguments(**parser.read(arguments))
    if args.recipe_file is None and args.model is None:
        parser.error("give a RECIPE, which says what a new model is like, or `--model` to start from, or both")
    if args.lora_rank is not None and (args.train_groups or args.stop_at):
        # a stage's checkpoint would hold adapters alone
        parser.error("--lora-rank goes with neither --train-groups nor --stop-at")
    if args.restart_data and args.model is None:
        parser.error("--restart-data is of a saved model, whose data it begins anew, and no `--model` is given")
    with without_import_notices():
        from ..training.recipe import read_recipe
        from ..training.trainer_settings import TrainerFields, with_defaults

    recipe = read_recipe(args.recipe_file, (), args.set, ("model", "trainer", "sources", "data", "samples"))
    if args.model is None and not recipe.model:
        parser.error(f"RECIPE {args.recipe_file!r} has no section `model`, and no `--model` is given to start from")
    trainer = with_defaults(TrainerFields, recipe.trainer)
    if args.stop_at is not None and args.stop_at > trainer["max_steps"]:
        parser.error(
            f"--stop-at {args.stop_at} is a step that the schedule does not reach: it has {trainer['max_steps']} "
            "(`max_steps` of the recipe's section `trainer`)"
        )
    return argparse.Namespace(**vars(args), trainer=trainer, recipe=recipe)


def run(args: argparse.Namespace) -> None:
    with without_import_notices():
        from ..training.pretraining import pretrain

    pretrain(args)


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
