# SPDX-License-Identifier: Apache-2.0
"""Compute a model's thresholds anew from held-out batches."""

import argparse

import torch

from .. import (
    calibrate_auxiliary_thresholds,
    calibrate_thresholds,
)
from ..calibration.auxiliary_training import save_with_processor
from ..data.examples import check_layout, open_documents
from ..errors_moma import InputError
from ..evaluation.measures import held_out_batches, load_model
from ..evaluation.report import router_table
from ..hub.loading import open_processor
from ..utils.atomic_files import refuse_files


REPORT_FILE = "calibration.json"


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a trained MomaForCausalLM")
    parser.add_argument("--processor", required=True, help="folder of its MomaProcessor")
    parser.add_argument("--tokens", required=True, help="folder that `moma tokenize` wrote")
    parser.add_argument("--output", required=True, help="new folder for the model, its processor and the report")
    parser.add_argument(
        "--inference-routing",
        choices=["threshold", "auxiliary"],
        help="what the saved model chooses by, in depth layers, too; default: as before",
    )
    parser.add_argument("--split", default="validation")
    parser.add_argument("--batches", type=int, default=16, help="at most so many")
    parser.add_argument("--batch-size", type=int, default=32, help="that of the training, where possible")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of examples")
    args = parser.parse_args(arguments)
    for name, value in (("--batches", args.batches), ("--batch-size", args.batch_size)):
        if value < 1:
            parser.error(f"{name} {value}: at least one is needed to calibrate on")
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    refuse_files(args.output)
    processor = open_processor(args.processor)
    model = load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    check_layout(model.config, processor.token_layout())
    if args.inference_routing == "auxiliary" and not model.config.auxiliary_routers:
        raise InputError(
            "`--inference-routing` is auxiliary, but `--model` has no auxiliary routers: "
            "`moma train-auxiliary-routers` adds and trains them."
        )
    if args.inference_routing:
        model.config.inference_routing, model.config.depth_inference_routing = args.inference_routing, None
    documents = open_documents(args.tokens, processor, args.split)
    batches = held_out_batches(documents, processor, args.batch_size, args.seed)[: args.batches]
    report = {"threshold": calibrate_thresholds(model, batches)}
    if model.config.auxiliary_routers:
        report["auxiliary"] = calibrate_auxiliary_thresholds(model, batches)
    for rows in report.values():
        print(router_table(rows))
    facts = {"arguments": vars(args), "batches": len(batches), **report}
    save_with_processor(model, args.model, processor, args.output, REPORT_FILE, facts)
