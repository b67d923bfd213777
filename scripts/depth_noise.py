# SPDX-License-Identifier: Apache-2.0
"""Flip a share of the depth decisions of trained models, and compare their held-out loss with a model without depth.

Wrong decisions are what causal inference adds to mixture of depths (MoMa section 4.6). Losses under top-k of the batch
see the future: they tell how robust a model is, not how good.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from emoji_recipe.depth_noise import PAPER_BREAK_EVEN, SIGMAS, TOP_K, noise_report, noise_sweep, plot_noise, summarize
from modeling_moma.training.examples import open_documents, shuffled_held_out
from modeling_moma.training.files import write_aside
from modeling_moma.training.measures import held_out_loss, load_model
from tokenization import MomaProcessor


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", required=True, help="models with depth layers, for instance seeds")
    parser.add_argument("--baseline", nargs="+", required=True, help="models without, for instance seeds")
    parser.add_argument("--processor", required=True, help="folder of a MomaProcessor")
    parser.add_argument("--tokens", required=True, help="folder that `moma tokenize` wrote")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--output", required=True, help="JSON file of the report; a PNG of the same name lies beside")
    parser.add_argument("--sigmas", type=float, nargs="+", default=SIGMAS, help="shares of flipped decisions")
    parser.add_argument("--batch-size", type=int, default=32, help="examples among which depth layers choose")
    parser.add_argument("--limit", type=int, help="measure so many pictures of the split, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the examples and of the flips")
    args = parser.parse_args(arguments)
    args.sigmas = sorted(args.sigmas)
    if Path(args.output).suffix == ".png":
        parser.error(f"--output {args.output}: is the JSON file, beside which the PNG is put")
    args.command = shlex.join(
        ["python", "scripts/depth_noise.py", *(sys.argv[1:] if arguments is None else arguments)]
    )
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = MomaProcessor.from_pretrained(args.processor)
    examples = shuffled_held_out(open_documents(args.tokens, processor, args.split), args.seed, args.limit)
    size = args.batch_size
    baselines = []
    for folder in args.baseline:
        model = load_model(folder, device)
        if model.config.depth_layers:
            raise ValueError(f"--baseline {folder} has the depth layers {model.config.depth_layers}: must have none.")
        baselines.append(held_out_loss(model, processor, examples, size, "threshold", "loss: without depth"))
    sweeps = [
        noise_sweep(load_model(folder, device), processor, examples, size, args.sigmas, args.seed)
        for folder in args.models
    ]
    summary = summarize(sweeps, baselines)
    report = {
        "command": args.command,
        "split": args.split,
        "examples": len(examples),
        "batch_size": size,
        "dtype": "float32",
        "noise_is": TOP_K,
        "paper_break_even": PAPER_BREAK_EVEN,
        "summary": summary,
        "models": dict(zip(args.models, sweeps, strict=True)),
        "baselines": dict(zip(args.baseline, baselines, strict=True)),
    }
    output = write_aside(args.output, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    write_aside(output.with_suffix(".png"), lambda path: plot_noise(summary, path))
    print(noise_report(summary))
    print(f"\n{len(examples)} examples of {args.split}, both orders shuffled together, {size} in a batch.")


if __name__ == "__main__":
    main()
