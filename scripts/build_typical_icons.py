# SPDX-License-Identifier: Apache-2.0
"""
Builds the typical icon of each name that several makers draw, by a model that writes names, to train it to draw them.

    python scripts/build_typical_icons.py --model runs/icons/model --output runs/icons/typical

Of each name up to eight icons of different makers are compared, and the one is kept of which the model finds the name
likeliest, in black.
"""

import argparse
import sys
from pathlib import Path

import torch

from icon_evaluation.samples import TRAIN, open_split
from icon_evaluation.typical import typical_icons
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.measures import load_model
from modeling_moma.hub.loading import open_processor
from modeling_moma.utils.atomic_files import atomic_write, check_place


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a MomaForCausalLM and its MomaProcessor")
    parser.add_argument("--data", default="data/icons", help="folder of the icons")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args(arguments)
    file = args.output / "train.parquet"
    try:
        check_place(file)
        train = open_split(args.data, TRAIN)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, processor = load_model(args.model, device), open_processor(args.model).to(device)
        icons = typical_icons(model, processor, train, args.batch_size)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    atomic_write(file, icons.to_parquet)
    print(f"{len(icons):,} images of {len(set(icons['name'])):,} names in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
