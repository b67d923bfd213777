# SPDX-License-Identifier: Apache-2.0
"""Train a MoMa on captions and pictures, from a recipe or from a saved model."""

import argparse

from ..training.pretraining import pretrain
from ..training.recipe import read_recipe


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
    parser.add_argument("--processor", required=True, help="folder of a MomaProcessor")
    parser.add_argument("--codes", required=True, help="folder that `moma tokenize` wrote")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--recipe", help="YAML of the fields of model and trainer; the processor gives the token ids")
    start.add_argument("--model", help="start from this saved model; one that was upcycled goes on in the data")
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
    parser.add_argument("--freeze-groups", nargs="+", default=[], help="expert groups whose weights stay as they are")
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
    recipe = parser.parse_args(arguments).recipe
    fields = dict(read_recipe(recipe).trainer) if recipe else {}
    chosen = {flag[2:].replace("-", "_"): fields.pop(name) for name, (flag, _) in FLAGS.items() if name in fields}
    parser.set_defaults(**chosen)
    return argparse.Namespace(**vars(parser.parse_args(arguments)), trainer=fields)


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def main(arguments: list[str] | None = None):
    pretrain(parse_arguments(arguments))
