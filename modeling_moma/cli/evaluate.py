# SPDX-License-Identifier: Apache-2.0
"""Measure a model on held-out data: losses, captions, retrieval by likelihood, drawings.

Losses are by modality and source, causal as in `generate`. The loss under `expert_choice` stands beside them with its
warning: it sees the future and is no measure of quality.
"""

import argparse
import json

import torch

from ..data.examples import check_layout
from ..evaluation.evaluate import MEASURES, MeasureSettings, measure_sources
from ..evaluation.held_out import read_held_out
from ..evaluation.measures import load_model
from ..evaluation.report import report_tables
from ..evaluation.retrieval import DEFAULT_PAIRS
from ..hub.loading import open_processor
from ..utils.atomic_files import write_aside


SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a MomaForCausalLM")
    parser.add_argument("--processor", help="folder of its MomaProcessor; by default that of the model")
    parser.add_argument("--tokens", required=True, help="folder that `moma tokenize` wrote")
    parser.add_argument("--split", default="test")
    parser.add_argument("--sources", nargs="+", metavar="NAME", help="measure these alone; by default all")
    parser.add_argument(
        "--measures",
        nargs="+",
        choices=MEASURES,
        help="by default losses, and captions where a source has any; retrieval and drawings take longer",
    )
    parser.add_argument("--limit", type=int, help="measure so many rows of each source, drawn at random")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the draw, the order and the drawings")
    parser.add_argument(
        "--retrieval-pairs", type=int, default=DEFAULT_PAIRS, help="pairs of each source, each ranked among all"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the drawings, as the next three")
    parser.add_argument("--top-k", type=int, default=0, help="0: all codes")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1: none")
    parser.add_argument("--output", help="JSON file of all figures")
    return parser.parse_args(arguments)


def evaluate(args: argparse.Namespace) -> dict:
    """The figures of [`measure_sources`] by source."""
    settings = MeasureSettings(
        None if args.measures is None else tuple(args.measures),
        args.batch_size,
        args.seed,
        args.retrieval_pairs,
        {"do_sample": True, **{name: getattr(args, name) for name in SAMPLING}},
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.model, device)
    processor = open_processor(args.processor or args.model, "--processor" if args.processor else "--model").to(device)
    check_layout(model.config, processor.token_layout())
    sources = read_held_out(args.tokens, processor, args.split, args.limit, args.seed, args.sources)
    return measure_sources(model, processor, sources, settings)


def main(arguments: list[str] | None = None):
    args = parse_arguments(arguments)
    sources = evaluate(args)
    print(report_tables(sources))
    if args.output:
        report = {"arguments": vars(args), "dtype": "float32", "sources": sources}
        write_aside(args.output, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
