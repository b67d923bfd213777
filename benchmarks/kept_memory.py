# SPDX-License-Identifier: Apache-2.0
"""
What a training step on a CPU gains where glibc keeps freed memory, as `moma pretrain` has it.

    python -m benchmarks.kept_memory

Each model trains in processes of its own, with and without, in turn.
"""

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.speed.clock import seconds, threads
from benchmarks.speed.contenders import build
from benchmarks.speed.shapes import SHAPES, mixed_tokens
from modeling_moma.training.allocator import keep_freed_memory


CONTENDERS = ("dense", "4t4i")
WARM_UP = 3


def train(name: str, keeps: bool, rounds: int) -> None:
    """Print seconds of a step with its optimizer, pages asked for in it, and MiB at the peak."""
    if keeps and not keep_freed_memory():
        raise SystemExit("glibc's allocator cannot be set here, or the environment sets it already.")
    shape = SHAPES["medium"]
    model = build(name, shape, 512, "cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times, pages = [], []

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(WARM_UP + rounds):
        ids_BT = mixed_tokens(shape, 4, 512, seed=number)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        times.append(seconds(step, "cpu"))
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(statistics.median(times[WARM_UP:]), statistics.median(pages[WARM_UP:]), peak)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kept_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=7, help="steps of a process")
    parser.add_argument("--turns", type=int, default=3, help="processes of each kind")
    parser.add_argument("--train", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.train:
        with threads(1):
            train(args.train, args.keep, args.rounds)
        return
    print("| model | step, kept over not | pages a step: not; kept | peak MiB: not; kept |\n|---|---:|---:|---:|")
    for name in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.kept_memory", "--train", name, "--rounds", str(args.rounds)]
        runs: list[list[list[float]]] = [[], []]
        for _ in range(args.turns):
            for own, extra in zip(runs, ([], ["--keep"])):
                answer = subprocess.run([*command, *extra], check=True, stdout=subprocess.PIPE, text=True).stdout
                own.append([float(part) for part in answer.split()])
        ratio = statistics.median(kept[0] / not_kept[0] for not_kept, kept in zip(*runs))
        pages, peaks = ("; ".join(f"{statistics.median(run[i] for run in own):.0f}" for own in runs) for i in (1, 2))
        print(f"| {name} | {ratio:.2f} | {pages} | {peaks} |", flush=True)


if __name__ == "__main__":
    main()
