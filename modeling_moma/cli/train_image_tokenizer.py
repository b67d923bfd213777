# SPDX-License-Identifier: Apache-2.0
"""Train the picture tokenizer on the pictures of a data set; `--resume` goes on after a kill."""

import argparse
from collections.abc import Callable
from pathlib import Path

from tokenization.configuration_moma_vq import PRESETS

from ..training.image_tokenizer import DEFAULT_PRESET, TokenizerTraining


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="data set with the splits train and validation")
    parser.add_argument("--output", required=True, help="folder for the model, its checkpoint and metrics.json")
    parser.add_argument("--config", help=f"one of {sorted(PRESETS)} or a JSON file; by default {DEFAULT_PRESET!r}")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=500, help="steps between two checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--semantic-weight", type=float, default=None, help="default: the configuration's")
    parser.add_argument("--perceptual-weight", type=float, default=None, help="default: the configuration's")
    parser.add_argument("--bf16", choices=["auto", "on", "off"], default="auto", help="auto: where the device has it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, on_step: Callable[[int, dict[str, float]], None] | None = None):
    args = parse_arguments(arguments)
    Path(args.output).mkdir(parents=True, exist_ok=True)
    return TokenizerTraining(args).run(on_step)
