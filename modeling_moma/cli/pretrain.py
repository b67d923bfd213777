# SPDX-License-Identifier: Apache-2.0
"""Train a MoMa on tokenized sources, from a recipe or from a saved model."""

import argparse

from ..tools.import_notices import without_import_notices


# field of TrainingArguments -> the flag that wins over a recipe's value, and the value where neither is given
FLAGS = {
    "max_steps": ("--steps", 4000),
    "per_device_train_batch_size": ("--batch-size", 32),
    "gradient_accumulation_steps": ("--gradient-accumulation-steps", 1),
    "learning_rate": ("--learning-rate", 1.5e-3),
    "warmup_steps": ("--warmup-steps", 150),
    "weight_decay": ("--weight-decay", 0.1),
    "eval_steps": ("--eval-steps", 400),
    "save_steps": ("--save-steps", 400),
    "save_total_limit": ("--save-total-limit", 2),
    "logging_steps": ("--logging-steps", 50),
    "seed": ("--seed", 0),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "recipe_file", metavar="RECIPE", nargs="?", help="YAML of model and trainer, and of sources where they changed"
    )
    parser.add_argument("--processor", required=True, help="folder of a MomaProcessor")
    parser.add_argument("--tokens", required=True, help="folder that `moma tokenize` wrote")
    parser.add_argument("--model", help="start from this saved model; one that was upcycled goes on in the data")
    parser.add_argument(
        "--restart-data", action="store_true", help="begin at the first example, whatever `--model` has seen"
    )
    parser.add_argument("--output", required=True, help="folder for checkpoints and the model")
    for field, (flag, default) in FLAGS.items():
        kind = float if isinstance(default, float) else int
        parser.add_argument(flag, type=kind, default=default, help=f"`{field}`; {default} where the recipe has none")
    parser.add_argument(
        "--eval-examples", type=positive_int, help="evaluate on so many held-out examples; by default on all"
    )
    parser.add_argument("--stop-at", type=int, help="stop and save at this step of the schedule, as seeds do")
    freezing = parser.add_mutually_exclusive_group()
    freezing.add_argument(
        "--freeze-groups", nargs="+", default=[], help="expert groups whose weights stay as they are"
    )
    freezing.add_argument(
        "--train-groups",
        nargs="+",
        default=[],
        help="train these expert groups and the rows of their tokens alone: all else stays as it is",
    )
    parser.add_argument(
        "--lora-rank",
        type=int,
        help="train adapters of this rank in place of the weights, and merge them at the end; needs PEFT",
    )
    parser.add_argument(
        "--gumbel-noise",
        type=float,
        help="scale of the routers' noise in training, 0 turns it off; by default what the model's config has",
    )
    parser.add_argument("--attn-implementation", default="sdpa", help="eager is the faster one on CPUs at this size")
    parser.add_argument("--bf16", choices=["auto", "on", "off"], default="auto", help="auto: where the device has it")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line over the recipe over the defaults; what a recipe sets beyond the flags is in `trainer`."""
    parser = make_parser()
    first = parser.parse_args(arguments)
    if first.recipe_file is None and first.model is None:
        parser.error("give a RECIPE, which says what a new model is like, or `--model` to start from, or both")
    if first.lora_rank is not None and (first.train_groups or first.stop_at):
        # a stage's checkpoint would hold adapters alone
        parser.error("--lora-rank goes with neither --train-groups nor --stop-at")
    from ..training.recipe import Recipe, read_recipe

    recipe = read_recipe(first.recipe_file) if first.recipe_file else Recipe()
    if first.model is None and not recipe.model:
        parser.error(f"RECIPE {first.recipe_file!r} has no section `model`, and no `--model` is given to start from")
    fields = dict(recipe.trainer)
    chosen = {flag[2:].replace("-", "_"): fields.pop(name) for name, (flag, _) in FLAGS.items() if name in fields}
    parser.set_defaults(**chosen)
    return argparse.Namespace(**vars(parser.parse_args(arguments)), trainer=fields, recipe=recipe)


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def run(args: argparse.Namespace) -> None:
    with without_import_notices():
        from ..training.pretraining import pretrain

    pretrain(args)


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
