# SPDX-License-Identifier: Apache-2.0
"""Measure a MoMa of captions and images on held-out drawings, and write its report and model card."""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset

from emoji_recipe.captions import (
    caption_accuracies,
    emoji_documents,
    label_caption,
    label_table,
    majority_accuracies,
)
from emoji_recipe.judge import ImageJudge, accuracies
from emoji_recipe.model_card import CURVES_FILE, report_table, write_card
from modeling_moma import MomaForCausalLM
from modeling_moma.data.examples import shuffled_held_out
from modeling_moma.errors_moma import InputError
from modeling_moma.evaluation.captions import derangement
from modeling_moma.evaluation.drawings import feature_extractor
from modeling_moma.evaluation.measures import (
    EXPERT_CHOICE,
    decode_images,
    draw_images,
    encode_images,
    held_out_loss,
    image_batches,
    load_model,
    tokenizer_quality,
    write_captions,
)
from modeling_moma.training.loss_curves import plot_curves, read_run, savings, tokens_of_example
from modeling_moma.utils.atomic_files import atomic_write, check_place
from tokenization import MomaProcessor


NUM_SAMPLES = 12


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a MomaForCausalLM and its MomaProcessor")
    parser.add_argument("--baseline", help="folder of a dense MomaForCausalLM with the same token ids")
    parser.add_argument("--curves", nargs=2, metavar=("RUN", "BASELINE_RUN"), help="output folders of both trainings")
    parser.add_argument("--data", default="data/emoji")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", required=True, help="JSON file of the report")
    parser.add_argument("--write-card", action="store_true", help="write README.md and the curves beside the model")
    parser.add_argument("--limit", type=int, help="measure so many images of the split, drawn at random")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the drawings, as the next three")
    parser.add_argument("--top-k", type=int, default=0, help="0: all codes")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1: none")
    args = parser.parse_args(arguments)
    if args.write_card and not (args.baseline and args.curves):
        parser.error("--write-card needs --baseline and --curves, whose numbers are part of the card")
    if args.limit is not None and args.limit < 2:
        parser.error(f"--limit {args.limit}: at least 2 images are needed")
    if args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: it must be at least 1")
    try:
        check_place(args.output)
    except InputError as error:
        parser.error(str(error))
    args.command = shlex.join(
        ["python", "scripts/evaluate_emoji.py", *(sys.argv[1:] if arguments is None else arguments)]
    )
    return args


def describe(model: MomaForCausalLM) -> dict:
    config = model.config
    fields = (
        "num_experts",
        "hidden_size",
        "num_hidden_layers",
        "depth_layers",
        "training_routing",
        "modality_loss_weights",
    )
    return {
        "parameters": config.num_parameters(),
        "active_parameters": config.num_parameters(active=True),
        "capacity_factor": {group: config.group_capacity_factor(group) for group in config.expert_groups},
        **{name: getattr(config, name) for name in fields},
    }


def by_style(captions: list[str], neighbours: list[dict], rows: list[dict], table: dict) -> dict[str, dict]:
    result = {}
    for style in dict.fromkeys(row["style"] for row in rows):
        chosen = [index for index, row in enumerate(rows) if row["style"] == style]
        wanted = [rows[index] for index in chosen]
        result[style] = {
            "pictures": len(chosen),
            "model": caption_accuracies([captions[index] for index in chosen], wanted, table),
            "nearest_neighbour": accuracies([neighbours[index] for index in chosen], wanted),
        }
    return result


class Evaluation:
    """Loads what every measure needs; `run` measures."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        splits = load_dataset(args.data)
        if args.split not in splits:
            raise InputError(f"--split {args.split!r}: --data {args.data!r} has {list(splits)}.")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(args.model, self.device)
        self.baseline = load_model(args.baseline, self.device) if args.baseline else None
        self.processor = MomaProcessor.from_pretrained(args.model).to(self.device)
        self.train = splits["train"]
        held_out = splits[args.split]
        if args.limit is not None:
            held_out = held_out.shuffle(seed=args.seed).select(range(min(args.limit, len(held_out))))
        self.rows = held_out.remove_columns("image").to_list()
        self.train_rows = self.train.remove_columns("image").to_list()
        everything = [row for split in splits.values() for row in split.remove_columns("image").to_list()]
        self.table = label_table(everything)
        self.images = list(image_batches(held_out, self.processor, args.batch_size, "held-out images"))
        self.codes = encode_images(self.processor, self.images)

    def losses(self) -> dict[str, dict]:
        rows = [{**row, "codes": codes[None].numpy()} for row, codes in zip(self.rows, self.codes, strict=True)]
        examples = shuffled_held_out([emoji_documents(rows, self.processor)], self.args.seed)
        size = self.args.batch_size

        def measure(model, routing, name):
            return held_out_loss(model, self.processor, examples, size, routing, f"loss: {name}")

        result = {
            "causal": measure(self.model, "threshold", "threshold"),
            EXPERT_CHOICE: measure(self.model, "expert_choice", "expert_choice"),
        }
        if self.baseline is not None:
            result["dense"] = measure(self.baseline, None, "dense")
        return result

    def captions(self, neighbours: list[dict]) -> dict:
        def caption(model):
            return write_captions(model, self.processor, self.codes, self.args.batch_size)

        texts = caption(self.model)
        result = {"model": caption_accuracies(texts, self.rows, self.table)}
        if self.baseline is not None:
            result["dense"] = caption_accuracies(caption(self.baseline), self.rows, self.table)
        result["nearest_neighbour"] = accuracies(neighbours, self.rows)
        result["majority"] = majority_accuracies(self.train_rows, self.rows)
        result["by_style"] = by_style(texts, neighbours, self.rows, self.table)
        pairs = list(zip(self.rows, texts, strict=True))[:NUM_SAMPLES]
        result["samples"] = [{"style": row["style"], "label": row["label"], "caption": text} for row, text in pairs]
        return result

    def drawings(self, judge: ImageJudge, neighbours: list[dict]) -> dict:
        args, styles = self.args, [row["style"] for row in self.rows]
        settings = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "guidance_scale")}
        captions = [label_caption(row["style"], row["label"]) for row in self.rows]
        drawn = draw_images(
            self.model, self.processor, captions, args.batch_size, {"do_sample": True, **settings}, args.seed
        )
        found = {
            name: judge.nearest(decode_images(self.processor, codes, args.batch_size), styles)
            for name, codes in (("reconstructed", self.codes), ("drawn", drawn))
        }
        others = [self.rows[index] for index in derangement(len(self.rows), args.seed)]
        return {
            "settings": {**settings, "seed": args.seed},
            "real": accuracies(neighbours, self.rows),
            "reconstructed": accuracies(found["reconstructed"], self.rows),
            "drawn": accuracies(found["drawn"], self.rows),
            "shuffled": accuracies(found["drawn"], others),
        }

    def training(self) -> dict:
        # the lengths do not depend on the codes
        codes = np.zeros((1, self.processor.image_seq_length), dtype=np.int64)
        rows = [{**row, "codes": codes} for row in self.train_rows]
        tokens = tokens_of_example(emoji_documents(rows, self.processor), self.processor)
        runs = dict(zip(("model", "dense"), (read_run(folder, tokens) for folder in self.args.curves), strict=True))
        return {
            "training": {"tokens_of_example": tokens, **runs},
            "eta": savings(runs["dense"], runs["model"]),
        }

    def judge(self) -> ImageJudge:
        batches = image_batches(self.train, self.processor, self.args.batch_size, "features of training images")
        return ImageJudge.from_batches(feature_extractor(self.device), batches, self.train_rows)

    def run(self) -> dict:
        args = self.args
        # a folder without a run is told before the hours that the rest takes
        curves = self.training() if args.curves else {}
        models = {"model": describe(self.model)}
        if self.baseline is not None:
            models["dense"] = describe(self.baseline)
        report = {
            "command": args.command,
            "split": args.split,
            "pictures": len(self.rows),
            "dtype": "float32",
            "models": models,
            "image_seq_length": self.processor.image_seq_length,
            "resolution": self.processor.image_size[0],
            "tokenizer": tokenizer_quality(self.processor, self.images, self.codes),
            "loss": self.losses(),
            **curves,
        }
        judge = self.judge()
        neighbours = judge.nearest(self.images, [row["style"] for row in self.rows])
        report["captions"] = self.captions(neighbours)
        report["drawings"] = self.drawings(judge, neighbours)
        return report


def main(arguments=None) -> int:
    args = parse_arguments(arguments)
    try:
        report = Evaluation(args).run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    atomic_write(args.output, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    print(report_table(report))
    if args.write_card:
        runs = {name: report["training"][key] for name, key in (("MoMa", "model"), ("dense", "dense"))}
        plot_curves(runs, Path(args.model) / CURVES_FILE)
        write_card(args.model, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
