# SPDX-License-Identifier: Apache-2.0
"""Held-out images, what a model says of them and what it draws from their captions, on one sheet."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from quickstart import (
    add_data_flags,
    add_drawing_flags,
    check_drawing_prompt,
    check_number,
    load,
    open_source,
    pick_rows,
    show_both_ways,
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a MomaForCausalLM and its MomaProcessor")
    add_data_flags(parser)
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=12)
    add_drawing_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images, and of the drawings")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    args = parser.parse_args(arguments)
    check_number(parser, args, "images", 1)
    args.source = open_source(parser, args)
    check_drawing_prompt(parser, args, args.split)
    return args


def main(arguments: Sequence[str] | None = None):
    args = parse_arguments(arguments)
    model, processor = load(args.model)
    rows = pick_rows(args.source, args.split, args.images, args.seed)
    show_both_ways(model, processor, rows, args, args.output)


if __name__ == "__main__":
    main()
