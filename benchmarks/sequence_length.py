# SPDX-License-Identifier: Apache-2.0
"""How the time of a training step grows with the length of its sequence, attention and all else apart.

python -m benchmarks.sequence_length
"""

import argparse
import gc
import statistics
from collections.abc import Sequence

import torch

from benchmarks.speed.clock import seconds, threads
from benchmarks.speed.contenders import CONTENDERS, build
from benchmarks.speed.profiles import own_seconds
from benchmarks.speed.shapes import SHAPES
from benchmarks.speed.work import Runner


LENGTHS = (256, 512, 1024, 2048, 4096)


def time_of(runner: Runner, rounds: int) -> tuple[float, float]:
    """Seconds of a step of one row, and the share that attention takes of its operations' time."""
    times = []
    for _ in range(rounds + 1):
        runner.prepare()
        times.append(seconds(runner.work, "cpu"))
    own = own_seconds(runner.work, "cpu", runner.prepare, repeats=1)
    attention = sum(value for name, value in own.items() if "dot_product" in name) / sum(own.values())
    return statistics.median(times[1:]), attention


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sequence_length", description=__doc__)
    parser.add_argument("--model", default="16t16i", choices=sorted(CONTENDERS))
    parser.add_argument("--shape", default="medium", choices=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    shape = SHAPES[args.shape]
    print(f"{args.model}, {args.shape}, one row, bf16 autocast, forward and backward, medians of {args.rounds}.\n")
    print("| T | seconds | attention | all else, ms a token |\n|---:|---:|---:|---:|")
    with threads(args.threads):
        model = build(args.model, shape, max(args.lengths), "cpu")
        for length in args.lengths:
            runner = Runner(model, shape, "train", 1, length, torch.bfloat16)
            total, attention = time_of(runner, args.rounds)
            others = total * (1 - attention) / length * 1e3
            print(f"| {length} | {total:.2f} | {attention:.0%} | {others:.3f} |", flush=True)
            gc.collect()


if __name__ == "__main__":
    main()
