# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of a 4t4i model in training: depth on every other layer against the same model without it.

Both models run the same tokens, half text and half picture codes, under bf16 autocast over fp32 weights, as the
Trainer with `bf16=True` does. Autocast converts all weights in every step, which depth does not spare. The models take
turns; medians and their ratio are reported, beside the ratio of FLOPs that it cannot beat. The share of a step that is
neither matrix products nor attention comes from a profile of further steps.
"""

import argparse
import platform
import statistics
from datetime import date
from pathlib import Path

import torch

from benchmarks.speed.clock import seconds
from benchmarks.speed.profiles import is_matmul, own_seconds
from modeling_moma import MomaConfig, MomaForCausalLM, training_flops


PICTURE_CODES = 1024
PICTURE_LENGTH = 64


def build(args: argparse.Namespace, with_depth: bool) -> MomaForCausalLM:
    torch.manual_seed(0)
    config = MomaConfig.from_preset(
        "moma-90m-4t4i",
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.width,
        num_hidden_layers=args.layers,
        modality_token_ranges={"image": [[args.vocab_size - PICTURE_CODES, args.vocab_size]]},
        begin_image_token_id=3,
        end_image_token_id=4,
        image_seq_length=PICTURE_LENGTH,
        depth_layers=list(range(0, args.layers, 2)) if with_depth else None,
        depth_capacity=args.capacity,
        use_cache=False,
        attn_implementation=args.attn_implementation,
    )
    return MomaForCausalLM(config).to(args.device).train()


def mixed_tokens(args: argparse.Namespace) -> torch.Tensor:
    """Ids `[B, T]`: text and picture codes in turns of one picture's length."""
    generator = torch.Generator().manual_seed(0)
    num_words = args.vocab_size - PICTURE_CODES
    words_BT = torch.randint(5, num_words, (args.rows, args.length), generator=generator)
    codes_BT = torch.randint(num_words, args.vocab_size, (args.rows, args.length), generator=generator)
    is_code_T = torch.arange(args.length) // PICTURE_LENGTH % 2 == 1
    return torch.where(is_code_T, codes_BT, words_BT).to(args.device)


def step(model: MomaForCausalLM, ids_BT: torch.Tensor) -> None:
    with torch.autocast(ids_BT.device.type, torch.bfloat16):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()


def measure(args: argparse.Namespace, models: dict, ids_BT: torch.Tensor) -> dict[str, dict[str, float]]:
    """Median seconds of forward and backward, and of AdamW, by model."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    times = {name: {"step": [], "optimizer": []} for name in models}
    # the first round allocates
    for round_index in range(args.repeats + 1):
        for name, model in models.items():
            step_s = seconds(lambda model=model: step(model, ids_BT), args.device)
            optimizer_s = seconds(optimizers[name].step, args.device)
            optimizers[name].zero_grad()
            if round_index:
                times[name]["step"].append(step_s)
                times[name]["optimizer"].append(optimizer_s)
    return {name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in times.items()}


def profiled(args: argparse.Namespace, models: dict, ids_BT: torch.Tensor) -> dict[str, dict[str, float]]:
    """Mean seconds that each operation of a step takes by itself, on the device, by model."""
    return {
        name: own_seconds(lambda model=model: step(model, ids_BT), args.device, model.zero_grad, args.profiled)
        for name, model in models.items()
    }


def report(args: argparse.Namespace, models: dict, times: dict, operations: dict) -> list[str]:
    tokens = args.rows * args.length
    flops = {
        name: training_flops(model.config, {"text": tokens / 2, "image": tokens / 2}, args.length)
        for name, model in models.items()
    }
    depth_layers = models["depth"].config.depth_layers
    lines = [
        f"# A training step with depth, {date.today()}",
        "",
        f"`python -m benchmarks.depth_step`: 4t4i, {args.layers} layers of {args.hidden_size}, experts of width "
        f"{args.width}, vocabulary of {args.vocab_size}, {args.rows} rows of {args.length} tokens, half of them "
        f"picture codes; depth in layers {depth_layers} at capacity {args.capacity}. bf16 autocast over fp32 weights, "
        f"{args.attn_implementation} attention, expert choice, median of {args.repeats} in turns. "
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {platform.machine()}.",
        "",
        "| | without depth | with depth | ratio |",
        "|---|---:|---:|---:|",
    ]
    matmul = {name: sum(own for key, own in operations[name].items() if is_matmul(key)) for name in models}
    cells = {
        "forward and backward, s": {name: times[name]["step"] for name in models},
        "with AdamW, s": {name: sum(times[name].values()) for name in models},
        "FLOPs of forward and backward, 1e12": {name: flops[name] / 1e12 for name in models},
        "matrix products and attention, s": matmul,
    }
    for label, value in cells.items():
        ratio = value["depth"] / value["plain"]
        lines.append(f"| {label} | {value['plain']:.3f} | {value['depth']:.3f} | {ratio:.3f} |")
    other = {name: 1 - matmul[name] / sum(operations[name].values()) for name in models}
    lines.append(f"| share of operations' time not in them | {other['plain']:.1%} | {other['depth']:.1%} | |")
    lines += ["", f"The other operations that take longest, s (mean of {args.profiled} steps):", ""]
    lines += ["| | without depth | with depth |", "|---|---:|---:|"]
    names = [name for name in operations["depth"] | operations["plain"] if not is_matmul(name)]
    names.sort(key=lambda name: -operations["depth"].get(name, 0))
    for name in names[: args.operations]:
        lines.append(f"| {name} | {operations['plain'].get(name, 0):.3f} | {operations['depth'].get(name, 0):.3f} |")
    return lines


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--width", type=int, default=1365)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=3027, help="by default that of moma-emoji")
    parser.add_argument("--capacity", type=float, default=0.25)
    parser.add_argument("--attn-implementation", default="sdpa")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profiled", type=int, default=2, help="steps under the profiler")
    parser.add_argument("--operations", type=int, default=8, help="other operations to list")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", help="folder for a dated report")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    models = {"plain": build(args, with_depth=False), "depth": build(args, with_depth=True)}
    ids_BT = mixed_tokens(args)
    times = measure(args, models, ids_BT)
    operations = profiled(args, models, ids_BT)
    lines = report(args, models, times, operations)
    print("\n".join(lines))
    if args.report:
        path = Path(args.report) / f"{date.today()}-depth-step-{args.device}.md"
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
