# SPDX-License-Identifier: Apache-2.0
"""Compare one trained model under the routing of its training, which sees the future, and under causal ones."""

import argparse
import json
import shlex
import sys
from datetime import date
from pathlib import Path

import torch

from emoji_recipe.routing_comparison import comparison_report, measure
from modeling_moma.training.examples import open_documents, shuffled_held_out
from modeling_moma.training.files import write_aside
from modeling_moma.training.measures import load_model
from tokenization import MomaProcessor


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder that `moma train-auxiliary-routers` wrote")
    parser.add_argument("--processor", required=True, help="folder of a MomaProcessor")
    parser.add_argument("--tokens", required=True, help="folder that `moma tokenize` wrote")
    parser.add_argument(
        "--split", choices=["validation", "test"], default="test", help="test: calibration has not seen it"
    )
    parser.add_argument("--output", required=True, help="JSON file of the report; a .md of the same name lies beside")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="examples among which tokens compete, as in training"
    )
    parser.add_argument("--limit", type=int, help="measure so many pictures of the split, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the examples")
    args = parser.parse_args(arguments)
    if Path(args.output).suffix == ".md":
        parser.error(f"--output {args.output}: is the JSON file, beside which the Markdown is put")
    command = sys.argv[1:] if arguments is None else arguments
    args.command = shlex.join(["python", "scripts/compare_routings.py", *command])
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = MomaProcessor.from_pretrained(args.processor)
    examples = shuffled_held_out(open_documents(args.tokens, processor, args.split), args.seed, args.limit)
    model = load_model(args.model, device)
    report = {
        "command": args.command,
        "date": date.today().isoformat(),
        "model": args.model,
        "split": args.split,
        "examples": len(examples),
        "batch_size": args.batch_size,
        "order": f"both orders of every picture, shuffled together with seed {args.seed}",
        "dtype": "float32",
        **measure(model, processor, examples, args.batch_size),
    }
    text = comparison_report(report)
    output = write_aside(args.output, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    write_aside(output.with_suffix(".md"), lambda path: path.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
