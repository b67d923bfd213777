# SPDX-License-Identifier: Apache-2.0
"""Compute a model's thresholds anew from held-out batches."""

from dataclasses import dataclass
from typing import Literal

from ..errors_moma import InputError
from ..utils.fields import Count, Seed
from ..utils.messages import without_import_notices
from .arguments import parse_fields


REPORT_FILE = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Flags of `moma calibrate`.

    Args:
        model (`str`):
            folder of a trained MomaForCausalLM.
        processor (`str`):
            folder of its MomaProcessor.
        tokens (`str`):
            folder that `moma tokenize` wrote.
        output (`str`):
            new folder for the model, its processor and the report.
        inference_routing (`Literal["threshold", "auxiliary"]`, *optional*):
            what the saved model chooses by, in depth layers, too; by default as before.
        split (`str`, *optional*, defaults to `"validation"`):
            of the tokens.
        batches (`int`, *optional*, defaults to `16`):
            at most so many.
        batch_size (`int`, *optional*, defaults to `32`):
            that of the training, where possible.
        dtype (`Literal["float32", "bfloat16"]`, *optional*, defaults to `"float32"`):
            of the weights while batches are looked at; the saved model keeps its own.
        seed (`int`, *optional*, defaults to `0`):
            of the choice of examples.
    """

    model: str
    processor: str
    tokens: str
    output: str
    inference_routing: Literal["threshold", "auxiliary"] | None = None
    split: str = "validation"
    batches: Count = 16
    batch_size: Count = 32
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: Seed = 0


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    return parse_fields(Arguments, __doc__, arguments)


def run(args: Arguments) -> None:
    with without_import_notices():
        import torch

        from ..calibration.auxiliary_training import save_with_processor
        from ..calibration.thresholds import calibrate_auxiliary_thresholds, calibrate_thresholds
        from ..data.documents import check_layout, open_documents
        from ..evaluation.measures import held_out_batches, load_model
        from ..evaluation.report import router_table
        from ..hub.loading import open_processor, require_plain_weights
        from ..utils.atomic_files import check_new_folder

    check_new_folder(args.output)
    processor = open_processor(args.processor)
    model = load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu", args.dtype)
    require_plain_weights("--model", args.model, model.config)
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


def main(arguments: list[str] | None = None):
    run(parse_arguments(arguments))
