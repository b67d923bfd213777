# SPDX-License-Identifier: Apache-2.0
"""Train auxiliary routers, which tell ahead what a model's experts would take."""

import argparse

from ..tools.import_notices import without_import_notices


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a trained MomaForCausalLM")
    parser.add_argument("--processor", required=True, help="folder of its MomaProcessor")
    parser.add_argument("--tokens", required=True, help="folder that `moma tokenize` wrote")
    parser.add_argument("--output", required=True, help="new folder: checkpoints, model, processor, report")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32, help="that of the main training, where possible")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--eval-steps", type=int, default=250)
    parser.add_argument("--save-steps", type=int, default=250)
    parser.add_argument("--save-total-limit", type=int, default=1, help="checkpoints to keep")
    parser.add_argument("--logging-steps", type=int, default=25)
    parser.add_argument(
        "--threshold", type=float, help="take what is at least so probable (the paper: 0.5); default: calibrate"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attn-implementation", default="sdpa", help="eager is the faster one on CPUs at this size")
    parser.add_argument("--bf16", choices=["auto", "on", "off"], default="auto", help="auto: where the device has it")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    args = parser.parse_args(arguments)
    if args.threshold is not None and not 0 < args.threshold < 1:
        parser.error(f"--threshold {args.threshold}: a probability between 0 and 1 is needed")
    return args


def run(args: argparse.Namespace) -> None:
    with without_import_notices():
        from ..training.auxiliary_routers import train_auxiliary_routers

    train_auxiliary_routers(args)


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
