# SPDX-License-Identifier: Apache-2.0
"""Compare trainings from scratch with upcycled seeds of several lengths: causal held-out loss at equal FLOPs."""

import argparse
import json
import shlex
import sys
from datetime import date
from pathlib import Path

import torch

from emoji_recipe.upcycling_comparison import by_seed_length, compare, comparison_report, measure, plot_upcycling
from modeling_moma.training.examples import open_documents, shuffled_held_out
from modeling_moma.training.files import write_aside
from modeling_moma.training.measures import load_model
from modeling_moma.training.runs import tokens_of_example, training_of
from tokenization import MomaProcessor


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", nargs="+", required=True, help="runs of pretrain.py from scratch, one each seed")
    parser.add_argument(
        "--upcycled", nargs="+", required=True, help="runs of pretrain.py --model, one each length and seed, any order"
    )
    parser.add_argument("--processor", required=True, help="folder of a MomaProcessor")
    parser.add_argument("--tokens", required=True, help="folder that `moma tokenize` wrote")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument(
        "--output", required=True, help="JSON file of the report; a .md and a .png of the same name lie beside"
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, help="examples among which tokens compete, as in training"
    )
    parser.add_argument("--limit", type=int, help="measure so many pictures of the split, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the examples")
    args = parser.parse_args(arguments)
    if Path(args.output).suffix in (".md", ".png"):
        parser.error(f"--output {args.output}: is the JSON file, beside which the Markdown and the picture are put")
    command = sys.argv[1:] if arguments is None else arguments
    args.command = shlex.join(["python", "scripts/compare_upcycling.py", *command])
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = MomaProcessor.from_pretrained(args.processor)
    tokens = tokens_of_example(open_documents(args.tokens, processor)[0], processor)
    # a folder that does not fit shall be told before anything is measured
    groups = by_seed_length(
        *([training_of(folder, tokens) for folder in folders] for folders in (args.scratch, args.upcycled))
    )
    examples = shuffled_held_out(open_documents(args.tokens, processor, args.split), args.seed, args.limit)
    for runs in groups.values():
        for run in runs:
            run |= measure(load_model(run["folder"], device), processor, examples, args.batch_size)
    summary = compare(groups)
    report = {
        "command": args.command,
        "date": date.today().isoformat(),
        "split": args.split,
        "examples": len(examples),
        "batch_size": args.batch_size,
        "order": f"both orders of every picture, shuffled together with seed {args.seed}",
        "dtype": "float32",
        "tokens_of_example": tokens,
        "summary": summary,
        "runs": {str(length): runs for length, runs in groups.items()},
    }
    output = Path(args.output)
    picture = output.with_suffix(".png")
    text = comparison_report(report, picture.name)
    write_aside(output, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    write_aside(picture, lambda path: plot_upcycling(groups, summary, path))
    write_aside(output.with_suffix(".md"), lambda path: path.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
