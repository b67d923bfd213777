# SPDX-License-Identifier: Apache-2.0
"""
Everything that a GPU can tell of this package, in ten minutes: its tests, all comparisons of speed, and a profile.

    python -m benchmarks.gpu --report benchmarks/reports

The tests are Transformers' own of models, which take the GPU by themselves. Cases that the time does not suffice for
are left out, and named.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.speed.cases import CASES
from benchmarks.speed.comparison import Outcome, run_case
from benchmarks.speed.contenders import build
from benchmarks.speed.profiles import matmul_share, own_seconds
from benchmarks.speed.results import report
from benchmarks.speed.shapes import SHAPES
from benchmarks.speed.work import Runner


ROOT = Path(__file__).resolve().parent.parent
TESTS = "tests/hf_common/test_modeling_moma_common.py"
# seconds for the tests, and for the comparisons
TEST_SECONDS, CASE_SECONDS = 180, 330
PROFILED_ROWS = 15


def run_tests(seconds: float) -> str:
    """What the tests said last."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "4", TESTS]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    return (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]


def compare(names: Sequence[str], device: str, rounds: int, seconds: float) -> tuple[list[Outcome], list[str]]:
    """Outcomes of the cases that the time sufficed for, and the names of the others."""
    outcomes, left_out, end = [], [], time.monotonic() + seconds
    for name in names:
        if time.monotonic() > end:
            left_out.append(name)
            continue
        outcomes.append(run_case(CASES[name], torch.get_num_threads(), rounds, device, with_details=True))
        print(f"{name}: {outcomes[-1].ratio:.3f}", file=sys.stderr, flush=True)
    return outcomes, left_out


def profile_table(device: str, shape_name: str) -> list[str]:
    """Operations of one training step of 4t4i by their own time."""
    shape = SHAPES[shape_name]
    runner = Runner(build("4t4i", shape, 512, device), shape, "train", 4, 512, torch.bfloat16)
    runner.prepare()
    runner.work()
    own = own_seconds(runner.work, device, runner.prepare)
    lines = [f"Products and attention take {matmul_share(own):.0%} of a training step of 4t4i.", ""]
    lines += ["| operation | ms |", "|---|---:|"]
    return lines + [f"| {name} | {value * 1e3:.2f} |" for name, value in own.most_common(PROFILED_ROWS)]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--shape", default="medium", choices=list(SHAPES), help="of the profile")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--report", type=Path, help="folder for a dated report")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here. Is this a build of torch for CPUs?")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    command = " ".join(["python -m benchmarks.gpu", *(arguments if arguments is not None else sys.argv[1:])])
    tests = "left out" if args.no_tests else run_tests(TEST_SECONDS)
    outcomes, left_out = compare(args.cases, args.device, args.rounds, CASE_SECONDS)
    page = report(outcomes, command, args.rounds, args.device)
    lines = [page, f"Tests (`pytest {TESTS}`): {tests}."]
    if left_out:
        lines.append(f"\nLeft out for lack of time: {', '.join(left_out)}.")
    page = "\n".join([*lines, "", *profile_table(args.device, args.shape), ""])
    print(page)
    if args.report:
        (args.report / f"{date.today()}-gpu.md").write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
