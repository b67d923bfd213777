# SPDX-License-Identifier: Apache-2.0
"""
Measures a model of icons and their names on held-out icons, and writes its report, a sheet of drawings and its card.

    python scripts/evaluate_icons.py --model model_cards/moma-icons --write-card

Some icons of every held-out split are measured, chosen by a hash of set and file name, so that they are a fair sample.
"""

import argparse
import json
import math
import shlex
import sys
from pathlib import Path

from PIL import Image

from icons_recipe.measuring import Evaluation
from icons_recipe.model_card import EVALUATION_FILE, SHEET_FILE, report_tables, write_card
from modeling_moma.errors_moma import InputError
from modeling_moma.utils.atomic_files import atomic_write, check_place, check_writable


# smallest values of numbers that are asked for; fewer drawings are no test
LEAST = {
    "train_images": 1,
    "limit": 2,
    "ranked": 1,
    "queries": 1,
    "drawings": 8,
    "sheet": 1,
    "seeds": 1,
    "top_k": 0,
    "batch_size": 1,
    "views": 2,
}


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a MomaForCausalLM and its MomaProcessor")
    parser.add_argument("--data", default="data/icons", help="folder of scripts/build_icons_dataset.py")
    parser.add_argument("--emoji", default="data/emoji", help="folder of the emoji, to name their test; '' for none")
    parser.add_argument("--output", help="JSON file of the report; by default evaluation.json beside the model")
    parser.add_argument("--write-card", action="store_true", help="write README.md and its sheet beside the model")
    parser.add_argument("--control", help="folder of a model of the same codes that saw half its captions first")
    parser.add_argument("--features", help="file of the features of all training images, made where it is missing")
    parser.add_argument(
        "--neighbours", help="report of an earlier model on the same icons, whose neighbours are taken"
    )
    parser.add_argument("--typical", help="folder of scripts/build_typical_icons.py that the model learnt to draw by")
    parser.add_argument("--train-images", type=int, default=20_000, help="of which features are computed without it")
    parser.add_argument("--limit", type=int, default=300, help="icons of each split to name, tag and search")
    parser.add_argument("--ranked", type=int, default=32, help="icons of each split for which all names are ranked")
    parser.add_argument("--queries", type=int, default=50, help="of each split and kind to look for")
    parser.add_argument("--views", type=int, default=5, help="codings of each icon, beside one, to name and tag it")
    parser.add_argument("--drawings", type=int, default=160, help="captions to draw")
    parser.add_argument("--seeds", type=int, default=4, help="drawings of each caption")
    parser.add_argument("--sheet", type=int, default=24, help="captions of the sheet")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the drawings, as the next")
    parser.add_argument("--top-k", type=int, default=0, help="likeliest codes to draw from, 0: all")
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="1: none")
    parser.add_argument("--typical-temperature", type=float, default=0.3, help="of those of --typical, as the next")
    parser.add_argument("--typical-guidance-scale", type=float, default=1.0, help="1: none")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args(arguments)
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least {least}")
    for name in ("temperature", "typical_temperature"):
        if not 0 < (value := getattr(args, name)) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: it must be above 0, and finite")
    for name in ("guidance_scale", "typical_guidance_scale"):
        if not math.isfinite(value := getattr(args, name)):
            parser.error(f"--{name.replace('_', '-')} {value}: it must be a finite number, 1 for none")
    if args.emoji and not Path(args.emoji).is_dir():
        parser.error(f"--emoji {args.emoji!r} is no folder: `make data` builds it, and '' leaves it out")
    try:
        if args.output is not None:
            check_place(args.output)
        if args.output is None or args.write_card:
            check_writable(args.model)
    except InputError as error:
        parser.error(str(error))
    words = sys.argv[1:] if arguments is None else arguments
    args.command = shlex.join(["python", "scripts/evaluate_icons.py", *words])
    return args


def main(arguments=None) -> int:
    args = parse_arguments(arguments)
    try:
        evaluation = Evaluation(args)
        report = evaluation.run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = Path(args.model)
    atomic_write(
        args.output or folder / EVALUATION_FILE, lambda path: path.write_text(json.dumps(report, indent=2) + "\n")
    )
    print(report_tables(report))
    if args.write_card:
        # so few colours are enough for icons, and the folder is downloaded whole
        sheet = evaluation.sheet().quantize(96, dither=Image.Dither.NONE)
        atomic_write(folder / SHEET_FILE, lambda path: sheet.save(path, "PNG", optimize=True))
        write_card(folder, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
