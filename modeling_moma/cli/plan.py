# SPDX-License-Identifier: Apache-2.0
"""Find the fastest layout for a training on so many GPUs: computed, not measured.

Documents hold tables between `<!-- plan: ARGUMENTS -->` and `<!-- /plan -->`; `--write DOCUMENT` computes them anew.
"""

import argparse
import json
import re
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from ..configuration_moma import MomaConfig
from ..errors_moma import InputError
from ..planning.layouts import Layout
from ..planning.memory import Memory
from ..planning.plans import GIGA, Hardware, Plan, plan_training
from ..utils.atomic_files import write_aside
from ..utils.messages import one_line


TABLE = re.compile(r"(<!-- plan: (.+?) -->\n).*?(<!-- /plan -->)", flags=re.DOTALL)
SECONDS_PER_DAY = 86400
OVERVIEW_GPUS = (1, 8, 64, 256)


def parse_arguments(arguments=None) -> argparse.Namespace:
    usual = Hardware()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", choices=MomaConfig.preset_names(), metavar="NAME", help="as moma-1.4b-4t4i")
    what.add_argument("--config", help="folder or JSON file of a complete MomaConfig, such as model_cards/moma-emoji")
    what.add_argument("--overview", action="store_true", help="the fastest layout of every preset on 1 to 256 GPUs")
    what.add_argument("--write", metavar="DOCUMENT", help="compute the tables of a document anew")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tokens-per-gpu", type=int, default=24576, help="of a step, all micro-batches together")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, help="also tell the days of so many steps")
    parser.add_argument("--gpu-memory", type=float, default=usual.memory / GIGA, help="GB of 1e9 bytes")
    parser.add_argument("--headroom", type=float, default=usual.headroom, help="share of the memory to use")
    parser.add_argument("--flops", type=float, default=usual.flops, help="bf16 FLOPs per second of one GPU")
    parser.add_argument("--utilization", type=float, default=usual.utilization, help="share of them that is reached")
    parser.add_argument("--bandwidth", type=float, default=usual.bandwidth / GIGA, help="GB/s of a GPU in its node")
    parser.add_argument("--network", type=float, default=usual.network / GIGA, help="GB/s of a GPU to other nodes")
    parser.add_argument("--latency", type=float, default=usual.latency, help="seconds from one GPU to the next")
    parser.add_argument("--node-size", type=int, default=usual.node_size, help="GPUs of a node")
    parser.add_argument("--top", type=int, default=6, help="layouts in the table")
    parser.add_argument("--json", action="store_true", help="print all layouts, in bytes and seconds")
    args = parser.parse_args(arguments)
    if args.top < 1:
        parser.error(f"--top {args.top}: at least 1 layout")
    return args


def read_config(args: argparse.Namespace) -> MomaConfig:
    if args.preset:
        return MomaConfig.from_preset(args.preset)
    path = Path(args.config)
    if not path.exists():
        raise InputError(f"--config {path}: no such file or folder")
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise InputError(f"--config {path}: the folder has no config.json; is it that of a saved model?")
    try:
        return MomaConfig.from_json_file(file)
    except (StrictDataclassError, json.JSONDecodeError) as error:
        raise InputError(
            f"--config {file}: no complete MomaConfig. Does it lack the token layout, as recipes/*.yaml do, which get "
            f"it from a tokenizer? {one_line(error)}"
        ) from error


def hardware_of(args: argparse.Namespace) -> Hardware:
    return Hardware(
        args.gpu_memory * GIGA,
        args.headroom,
        args.flops,
        args.utilization,
        args.bandwidth * GIGA,
        args.network * GIGA,
        args.latency,
        args.node_size,
    )


def compute(args: argparse.Namespace) -> tuple[list[Plan], list[tuple[Layout, Memory]]]:
    plans, misfits = plan_training(
        read_config(args), args.gpus, args.tokens_per_gpu, args.sequence_length, hardware_of(args)
    )
    if not plans:
        layout, memory = misfits[0]
        raise InputError(
            f"no layout fits {args.gpus} GPUs of {args.gpu_memory:g} GB: the smallest, {layout}, needs "
            f"{memory.total / args.headroom / GIGA:.1f} GB with one sequence of {args.sequence_length} at once. Take "
            "more GPUs, larger ones, or shorter sequences."
        )
    return plans, misfits


def to_json(args: argparse.Namespace, plans: list[Plan], misfits: list) -> str:
    def layout_of(layout):
        return {"name": str(layout), **asdict(layout)}

    report = {
        "arguments": {
            name: value for name, value in vars(args).items() if name not in ("json", "write", "top", "overview")
        },
        "plans": [
            {
                **asdict(plan),
                "layout": layout_of(plan.layout),
                "memory": {**asdict(plan.memory), "total": plan.memory.total},
                "collectives": [{**asdict(item), "sent": item.sent} for item in plan.collectives],
                "seconds": plan.seconds,
            }
            for plan in plans
        ],
        "do_not_fit": [{"layout": layout_of(layout), "least_memory": memory.total} for layout, memory in misfits],
    }
    return json.dumps(report, indent=2)


def to_table(args: argparse.Namespace, plans: list[Plan], misfits: list) -> str:
    lines = [
        "| layout | GB per GPU | of which activations | sequences at once | layers computed again | compute s "
        "| weights s (GB) | tokens s (GB) | step s |",
        "|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for plan in plans[: args.top]:
        sent = {True: 0.0, False: 0.0}
        for item in plan.collectives:
            sent[item.is_overlapped] += item.sent / GIGA
        cells = [
            str(plan.layout),
            f"{plan.memory.total / GIGA:.1f}",
            f"{plan.memory.activations / GIGA:.1f}",
            str(plan.sequences),
            "yes" if plan.checkpointing else "no",
            f"{plan.compute_seconds:.2f}",
            f"{plan.weight_seconds:.2f} ({sent[True]:.1f})",
            f"{plan.token_seconds:.2f} ({sent[False]:.1f})",
            f"{plan.seconds:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    best = plans[0]
    rate = args.tokens_per_gpu / best.seconds
    lines += ["", f"Recommended: {best.layout}, {rate:,.0f} tokens per second and GPU."]
    if args.steps is not None:
        lines[-1] += f" {args.steps:,} steps take {args.steps * best.seconds / SECONDS_PER_DAY:.1f} days."
    if len(plans) > args.top:
        lines[-1] += f" {len(plans) - args.top} slower layouts fit as well."
    if misfits:
        names = ", ".join(f"{layout} ({memory.total / GIGA:.0f} GB)" for layout, memory in misfits)
        lines[-1] += f" Do not fit, even one sequence at a time: {names}."
    return "\n".join(lines)


def overview(args: argparse.Namespace) -> str:
    lines = [
        "| preset | " + " | ".join(f"{gpus} GPUs" if gpus > 1 else "1 GPU" for gpus in OVERVIEW_GPUS) + " |",
        "|---|" + "---|" * len(OVERVIEW_GPUS),
    ]
    for name in MomaConfig.preset_names():
        config, cells = MomaConfig.from_preset(name), []
        for gpus in OVERVIEW_GPUS:
            plans, _ = plan_training(config, gpus, args.tokens_per_gpu, args.sequence_length, hardware_of(args))
            cells.append(f"{plans[0].layout}, {plans[0].memory.total / GIGA:.0f} GB" if plans else "does not fit")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_tables(document: str) -> int:
    """Compute the tables of a document anew; returns their number."""

    def compute_anew(match):
        args = parse_arguments(shlex.split(match[2]))
        table = overview(args) if args.overview else to_table(args, *compute(args))
        return f"{match[1]}{table}\n{match[3]}"

    text, count = TABLE.subn(compute_anew, Path(document).read_text())
    if not count:
        raise InputError(f"{document} has no table between <!-- plan: ARGUMENTS --> and <!-- /plan -->.")
    write_aside(document, lambda path: path.write_text(text))
    return count


def main(arguments=None) -> int:
    args = parse_arguments(arguments)
    try:
        if args.write:
            print(f"{args.write}: {write_tables(args.write)} tables")
        elif args.overview:
            print(overview(args))
        else:
            plans, misfits = compute(args)
            print(to_json(args, plans, misfits) if args.json else to_table(args, plans, misfits))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
