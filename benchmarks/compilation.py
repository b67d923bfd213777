# SPDX-License-Identifier: Apache-2.0
"""What `torch.compile` makes of MoMa: graph breaks of a training forward, and decoding with a static cache.

Graph breaks are counted for small models of every kind, by `torch._dynamo.explain`. Decoding draws one picture with
the given model, greedily, by three ways in turns: a dynamic cache, a static one, and a static one with the step
compiled. All must give the same tokens before anything is timed; medians and their ratios are reported.
"""

import argparse
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoProcessor, CompileConfig

from modeling_moma import MomaConfig, MomaForCausalLM


GROUPS = {"text": 4, "image": 4}
# what a configuration is called in the table, and its fields
KINDS = {
    "dense": {"num_experts": 1},
    "8x": {"num_experts": 8},
    "1t1i": {"num_experts": {"text": 1, "image": 1}},
    "4t4i": {"num_experts": GROUPS},
    "4t4i, `token_choice`": {"num_experts": GROUPS, "training_routing": "token_choice"},
    "4t4i, `threshold`": {"num_experts": GROUPS, "training_routing": "threshold"},
    "4t4i, one depth layer": {"num_experts": GROUPS, "depth_layers": [0]},
    "4t4i, two depth layers": {"num_experts": GROUPS, "num_hidden_layers": 4, "depth_layers": [0, 2]},
}
WAYS = ("dynamic", "static", "compiled")


def training_graphs(fields: dict) -> int:
    """Graphs that one training forward of a small model is compiled into: graph breaks, plus 1."""
    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    pictures = {
        "begin_image_token_id": 5,
        "end_image_token_id": 6,
        "image_seq_length": 4,
        "modality_token_ranges": {"image": [[32, 64]]},
    }
    config = MomaConfig(**{"num_hidden_layers": 2, **small, **pictures, **fields})
    model = MomaForCausalLM(config).train()
    ids_BT = torch.randint(7, 64, (2, 16))
    torch._dynamo.reset()
    return torch._dynamo.explain(model)(input_ids=ids_BT, labels=ids_BT).graph_count


def graph_table() -> list[str]:
    """Rows of a Markdown table: graph breaks of a training forward, by kind of model."""
    rows = ["| model | graph breaks in a training forward |", "|---|---:|"]
    return rows + [f"| {name} | {training_graphs(fields) - 1} |" for name, fields in KINDS.items()]


def decode(model, inputs, way: str, backend: str) -> tuple[torch.Tensor, float]:
    """Ids of one greedy picture by one of `WAYS`, and the seconds that it took."""
    arguments = {"generation_mode": "image", "do_sample": False}
    if way != "dynamic":
        arguments["cache_implementation"] = "static"
    if way == "compiled":
        compile_config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode="default")
        # generate compiles on accelerators alone unless it is told otherwise
        compile_config._compile_all_devices = True
        arguments["compile_config"] = compile_config
    start = time.perf_counter()
    ids = model.generate(**inputs, **arguments)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return ids, time.perf_counter() - start


def measure(args: argparse.Namespace) -> tuple[dict[str, float], float, int]:
    """Median milliseconds of a token by each way, seconds of the first compiled picture, and tokens of a picture."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    inputs = processor(text=[args.prompt] * args.rows, return_tensors="pt").to(args.device)
    torch._dynamo.reset()
    # the first round compiles
    first = {way: decode(model, inputs, way, args.backend) for way in WAYS}
    for way in WAYS:
        if not torch.equal(first[way][0], first["dynamic"][0]):
            raise RuntimeError(f"The {way} way gives other tokens than the dynamic cache: nothing to time.")
    num_tokens = first["dynamic"][0].shape[1] - inputs["input_ids"].shape[1]
    times = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            times[way].append(decode(model, inputs, way, args.backend)[1] / num_tokens * 1e3)
    medians = {way: statistics.median(values) for way, values in times.items()}
    return medians, first["compiled"][1], num_tokens


def report(args: argparse.Namespace) -> list[str]:
    medians, first_s, num_tokens = measure(args)
    lines = [
        f"# Compilation, {date.today()}",
        "",
        f"`python benchmarks/compilation.py`: {args.model}, {args.dtype}, {args.rows} row(s) of {num_tokens} new "
        f"tokens, greedy, median of {args.repeats} in turns; the same tokens by all three ways. torch "
        f"{torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {platform.machine()}, backend "
        f"{args.backend}.",
        "",
        "| decoding | ms a token | to the dynamic cache |",
        "|---|---:|---:|",
    ]
    labels = {"dynamic": "dynamic cache", "static": "static cache", "compiled": "static cache, compiled step"}
    for way in WAYS:
        lines.append(f"| {labels[way]} | {medians[way]:.1f} | {medians[way] / medians['dynamic']:.2f} |")
    lines += ["", f"The first compiled picture took {first_s:.0f} s, compilation included.", "", *graph_table()]
    return lines


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="model_cards/moma-emoji")
    parser.add_argument("--prompt", default="noto: red apple")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", help="folder for a dated report")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    lines = report(args)
    print("\n".join(lines))
    if args.report:
        path = Path(args.report) / f"{date.today()}-compilation-{args.device}.md"
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
