# SPDX-License-Identifier: Apache-2.0
"""Train a MoMa on tokenized sources, from a recipe or from a saved model.

What the section `trainer` of a recipe says stands in for the defaults of the flags.
"""

import argparse
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from ..utils.fields import Count, Float, Int, NotNegative, Seed, read_field
from ..utils.messages import without_import_notices
from .arguments import Flag, FlagParser


# below 1 a share of all steps
Steps = Annotated[Int | Float, Field(gt=0)]
# field of TrainingArguments -> the flag that wins over a recipe's value
FLAGS = {
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "learning_rate": "learning_rate",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "eval_steps": "eval_steps",
    "save_steps": "save_steps",
    "save_total_limit": "save_total_limit",
    "logging_steps": "logging_steps",
    "seed": "seed",
}


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
        steps (`int`, *optional*, defaults to `4000`):
            steps of the optimizer in all stages (`max_steps` of a recipe).
        batch_size (`int`, *optional*, defaults to `32`):
            sequences of a device at once (`per_device_train_batch_size` of a recipe).
        gradient_accumulation_steps (`int`, *optional*, defaults to `1`):
            batches of a step.
        learning_rate (`float`, *optional*, defaults to `0.0015`):
            largest one of the schedule.
        warmup_steps (`int | float`, *optional*, defaults to `150`):
            steps in which the learning rate rises.
        weight_decay (`float`, *optional*, defaults to `0.1`):
            of the optimizer.
        eval_steps (`int | float`, *optional*, defaults to `400`):
            steps between two evaluations.
        save_steps (`int | float`, *optional*, defaults to `400`):
            steps between two checkpoints.
        save_total_limit (`int | None`, *optional*, defaults to `2`):
            checkpoints to keep.
        logging_steps (`int | float`, *optional*, defaults to `50`):
            steps between two lines of the log.
        seed (`int`, *optional*, defaults to `0`):
            of weights, order and choices.
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
        gumbel_noise (`float`, *optional*):
            scale of the routers' noise in training, 0 turns it off; by default what the model's config has.
        attn_implementation (`str`, *optional*, defaults to `"sdpa"`):
            on a CPU eager is the faster one for small models whose rows are not packed, sdpa for packed rows.
        bf16 (`Literal["auto", "on", "off"]`, *optional*, defaults to `"auto"`):
            bf16 in training; auto: where the device is faster by that.
        resume (`bool`, *optional*, defaults to `False`):
            go on from the last checkpoint in the output folder.
    """

    recipe_file: Annotated[str | None, Flag(metavar="RECIPE", is_positional=True)] = None
    processor: str
    tokens: str
    model: str | None = None
    restart_data: bool = False
    output: str
    steps: Count = 4000
    batch_size: Count = 32
    gradient_accumulation_steps: Count = 1
    learning_rate: NotNegative = 1.5e-3
    warmup_steps: Annotated[Int | Float, Field(ge=0)] = 150
    weight_decay: NotNegative = 0.1
    eval_steps: Steps = 400
    save_steps: Steps = 400
    save_total_limit: Int | None = 2
    logging_steps: Steps = 50
    seed: Seed = 0
    eval_examples: Count | None = None
    stop_at: Count | None = None
    freeze_groups: Annotated[list[str], Flag(one_of="freezing")] = field(default_factory=list)
    train_groups: Annotated[list[str], Flag(one_of="freezing")] = field(default_factory=list)
    lora_rank: Int | None = None
    gumbel_noise: Float | None = None
    attn_implementation: str = "sdpa"
    bf16: Literal["auto", "on", "off"] = "auto"
    resume: bool = False


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line over the recipe over the defaults; `trainer` is what a recipe sets beyond the flags."""
    parser = FlagParser(Arguments, description=__doc__)
    given = parser.read(arguments)
    first = Arguments(**given)
    if first.recipe_file is None and first.model is None:
        parser.error("give a RECIPE, which says what a new model is like, or `--model` to start from, or both")
    if first.lora_rank is not None and (first.train_groups or first.stop_at):
        # a stage's checkpoint would hold adapters alone
        parser.error("--lora-rank goes with neither --train-groups nor --stop-at")
    if first.restart_data and first.model is None:
        parser.error("--restart-data is of a saved model, whose data it begins anew, and no `--model` is given")
    with without_import_notices():
        from ..training.recipe import Recipe, read_recipe

    recipe = read_recipe(first.recipe_file) if first.recipe_file else Recipe()
    if first.model is None and not recipe.model:
        parser.error(f"RECIPE {first.recipe_file!r} has no section `model`, and no `--model` is given to start from")
    trainer = dict(recipe.trainer)
    where = f"RECIPE {first.recipe_file!r}, trainer"
    of_recipe = {
        flag: read_field(Arguments, flag, trainer.pop(name), f"{where}: {name}")
        for name, flag in FLAGS.items()
        if trainer.get(name) is not None
    }
    # what a flag says, a recipe's field without a value does not overrule
    overruled = [name for name, flag in FLAGS.items() if flag in given]
    overruled += {"on": ["bf16", "fp16"], "off": ["bf16"], "auto": []}[first.bf16]
    for name in overruled:
        trainer.pop(name, None)
    args = argparse.Namespace(**{**vars(first), **of_recipe, **given}, trainer=trainer, recipe=recipe)
    if args.stop_at is not None and args.stop_at > args.steps:
        parser.error(
            f"--stop-at {args.stop_at} is a step that the schedule does not reach: it has {args.steps} (`--steps`, or "
            "`max_steps` of the recipe)"
        )
    return args


def run(args: argparse.Namespace) -> None:
    with without_import_notices():
        from ..training.pretraining import pretrain

    pretrain(args)


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
