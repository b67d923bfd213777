# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of one expert group in training: this package's implementation against Transformers'.

Every way runs the same tokens through the same weights; results are compared before anything is timed. The ways take
turns, and medians and their ratios are reported.
"""

import argparse
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch

from modeling_moma import MomaConfig
from modeling_moma.experts_moma import MomaExpertGroup
from modeling_moma.selection_moma import Selection


WAYS = ("moma", "grouped_mm", "eager")


def step(group: MomaExpertGroup, x_ND: torch.Tensor, selection: Selection, way: str) -> torch.Tensor:
    """One forward and backward; returns the output."""
    group.zero_grad()
    group.config._experts_implementation = way
    y_ND, _ = selection.combine(group._run_experts(selection.dispatch(x_ND), selection), x_ND.shape[0])
    # a gradient of full rank: a sum would expand a scalar, which grouped products refuse
    y_ND.backward(torch.ones_like(y_ND))
    return y_ND.detach()


def measure(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    torch.manual_seed(0)
    config = MomaConfig(
        hidden_size=args.hidden_size,
        intermediate_size=args.width,
        num_attention_heads=8,
        num_experts={"text": args.experts, "image": args.experts},
    )
    group = MomaExpertGroup(config, "image")
    for parameter in group.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    group = group.to(args.device, dtype)
    x_ND = torch.randn(args.tokens, args.hidden_size, device=args.device, dtype=dtype, requires_grad=True)
    scores_NE = torch.rand(args.tokens, args.experts, device=args.device)
    weight_EK, token_EK = scores_NE.t().topk(group.router.capacity(args.tokens), dim=-1)
    selection = Selection.of_equal_shares(token_EK, weight_EK)
    expected = step(group, x_ND, selection, WAYS[0])
    for way in WAYS[1:]:
        torch.testing.assert_close(step(group, x_ND, selection, way), expected, rtol=2e-2, atol=2e-2)
    times = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            start = time.perf_counter()
            step(group, x_ND, selection, way)
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[way].append(time.perf_counter() - start)
    return {way: statistics.median(values) for way, values in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", help="folder for a dated report")
    args = parser.parse_args()
    lines = [
        f"# Expert dispatch, {date.today()}",
        "",
        f"`python benchmarks/expert_dispatch.py`: {args.experts} experts of width {args.width}, hidden size "
        f"{args.hidden_size}, {args.tokens} tokens, forward and backward, median of {args.rounds}. "
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {platform.machine()}.",
        "",
        "| dtype | way | ratio to moma |",
        "|---|---|---:|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        medians = measure(args, dtype)
        for way in WAYS:
            lines.append(f"| {str(dtype).removeprefix('torch.')} | {way} | {medians[way] / medians[WAYS[0]]:.2f} |")
    print("\n".join(lines))
    if args.report:
        path = Path(args.report) / f"{date.today()}-expert-dispatch-{args.device}.md"
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
