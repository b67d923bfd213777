# SPDX-License-Identifier: Apache-2.0
"""Compare trainings with and without mixture of depths on held-out drawings: loss at equal training FLOPs, causal and
under top-k of the batch, and what the depth layers choose."""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from emoji_recipe.depth_comparison import compare, comparison_report, measure
from modeling_moma.training.examples import open_documents, shuffled_held_out
from modeling_moma.training.files import write_aside
from modeling_moma.training.measures import load_model
from modeling_moma.training.runs import tokens_of_example, training_of
from tokenization import MomaProcessor


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", required=True, help="runs of pretrain.py without depth layers, by seed")
    parser.add_argument("--depth", nargs="+", required=True, help="runs with depth layers, in the same order of seeds")
    parser.add_argument("--processor", required=True, help="folder of a MomaProcessor")
    parser.add_argument("--tokens", required=True, help="folder that `moma tokenize` wrote")
    parser.add_argument("--split", choices=["validation", "test"], default="validation")
    parser.add_argument("--output", required=True, help="JSON file of the report; a .md of the same name lies beside")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="examples among which tokens compete, as in training"
    )
    parser.add_argument("--limit", type=int, help="measure so many pictures of the split, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the examples")
    args = parser.parse_args(arguments)
    if len(args.models) != len(args.depth):
        parser.error(f"--models has {len(args.models)} runs, --depth {len(args.depth)}: they are compared in pairs")
    if Path(args.output).suffix == ".md":
        parser.error(f"--output {args.output}: is the JSON file, beside which the Markdown is put")
    command = sys.argv[1:] if arguments is None else arguments
    args.command = shlex.join(["python", "scripts/compare_depth.py", *command])
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = MomaProcessor.from_pretrained(args.processor)
    tokens = tokens_of_example(open_documents(args.tokens, processor)[0], processor)
    folders = {"without": args.models, "with_depth": args.depth}
    # a folder that does not fit shall be told before anything is measured
    runs = {side: [training_of(folder, tokens) for folder in folders[side]] for side in folders}
    examples = shuffled_held_out(open_documents(args.tokens, processor, args.split), args.seed, args.limit)
    for side, parts in runs.items():
        for run in parts:
            model = load_model(run["folder"], device)
            if bool(model.config.depth_layers) != (side == "with_depth"):
                raise ValueError(f"{run['folder']} has the depth layers {model.config.depth_layers}: wrong side?")
            run |= measure(model, processor, examples, args.batch_size)
    report = {
        "command": args.command,
        "split": args.split,
        "examples": len(examples),
        "batch_size": args.batch_size,
        "order": f"both orders of every picture, shuffled together with seed {args.seed}",
        "dtype": "float32",
        "tokens_of_example": tokens,
        "summary": compare(runs["without"], runs["with_depth"]),
        "runs": runs,
    }
    text = comparison_report(report)
    output = write_aside(args.output, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    write_aside(output.with_suffix(".md"), lambda path: path.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
