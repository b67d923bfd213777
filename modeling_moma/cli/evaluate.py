# SPDX-License-Identifier: Apache-2.0
"""Measure a model's held-out losses by modality, causal as in `generate`.

The loss under `expert_choice` stands beside them with its warning: it sees the future and is no measure of quality.
"""

import argparse
import json

import torch

from tokenization import MomaProcessor

from ..training.examples import check_layout, load_codes
from ..training.files import write_aside
from ..training.measures import EXPERT_CHOICE, LOSSES, held_out_loss, load_model, shuffled_held_out
from ..training.tables import markdown_table


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a MomaForCausalLM")
    parser.add_argument("--processor", help="folder of its MomaProcessor; by default that of the model")
    parser.add_argument("--codes", required=True, help="folder that `moma tokenize` wrote")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="measure so many pictures of the split, drawn at random")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--output", help="JSON file of the losses")
    return parser.parse_args(arguments)


def evaluate(args: argparse.Namespace) -> dict:
    """Losses in nats per target token, by the routing under which they arise."""
    processor = MomaProcessor.from_pretrained(args.processor or args.model)
    model = load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    check_layout(model.config, processor.token_layout())
    splits = load_codes(args.codes)
    if args.split not in splits:
        raise ValueError(f"--split {args.split!r}: `--codes` {args.codes!r} has {', '.join(map(str, splits))}.")
    examples = shuffled_held_out(splits[args.split], processor, args.seed, args.limit)
    rules = {"causal": None, EXPERT_CHOICE: "expert_choice"}
    return {
        name: held_out_loss(model, processor, examples, args.batch_size, routing, f"loss: {name}")
        for name, routing in rules.items()
    }


def main(arguments: list[str] | None = None):
    args = parse_arguments(arguments)
    losses = evaluate(args)
    rows = [[name, *(f"{loss[part]:.4f}" for part in LOSSES)] for name, loss in losses.items()]
    print(markdown_table(["held-out loss, nats per target token", *LOSSES.values()], rows))
    if args.output:
        report = {"arguments": vars(args), "losses": losses}
        write_aside(args.output, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
