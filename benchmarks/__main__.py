# SPDX-License-Identifier: Apache-2.0
"""
Compares the speed of our models with that of Transformers' and of one another.

    python -m benchmarks                      all cases, on one thread and on all
    python -m benchmarks decode-4t4i train-4t4i --threads 1
    python -m benchmarks --device cuda --minutes 30 --report benchmarks/reports
    python -m benchmarks --list

Nothing else may run beside it. What is timed is checked first. A case that fails is told and does not end the others.
So is a figure above what is wanted.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.speed.cases import CASES
from benchmarks.speed.comparison import BusyMachineError, Outcome, dated_file, environment, report, run_case
from modeling_moma.utils.hardware import keep_freed_memory


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="by default all")
    parser.add_argument("--list", action="store_true", help="list the cases and end")
    parser.add_argument("--threads", choices=["1", "all", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-details", action="store_true", help="times alone: no bytes, launches and memory")
    parser.add_argument("--minutes", type=float, help="begin no further case after these; what is left out is named")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--report", type=Path, help="folder for a dated report, which replaces none")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        parser.error(f"there is no case {unknown[0]!r}; --list names those that there are")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.list:
        print("\n".join(f"{case.name}: {case.kind}, {case.ours} / {' '.join(case.peers)}" for case in CASES.values()))
        return 0
    if args.device == "cpu":
        # else contenders are timed by which pages the others have left them
        keep_freed_memory()
    every = torch.get_num_threads()
    numbers = {"1": [1], "all": [every], "both": [every] if args.device == "cuda" else [1, every]}[args.threads]
    command = " ".join(["python -m benchmarks", *(arguments if arguments is not None else sys.argv[1:])])
    outcomes: list[Outcome] = []
    status, not_measured, machine = 0, {}, environment(args.device)
    file = None if args.report is None else dated_file(args.report, f"speed-{args.device}")

    def page() -> str:
        text = report(outcomes, command, args.rounds, args.device, machine, not_measured)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return text

    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    for name in args.cases or [name for name, case in CASES.items() if args.device == "cuda" or not case.needs]:
        if end is not None and time.monotonic() > end:
            not_measured[name] = "the time was over"
            continue
        if missing := CASES[name].missing(args.device):
            not_measured[name] = f"needs {missing}"
            continue
        for number in dict.fromkeys(numbers):
            try:
                outcome = run_case(CASES[name], number, args.rounds, args.device, not args.no_details)
            except Exception as error:
                # one that does not fit, or a kernel that is missing, says as much of a machine as a figure
                not_measured[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                if not isinstance(error, BusyMachineError):
                    traceback.print_exc()
                print(f"{name}, {number} threads: {error}", file=sys.stderr)
                status = 1
                continue
            finally:
                # what contenders held
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
            outcomes.append(outcome)
            print(f"{name}, {number} threads: {outcome.ratio:.3f}", file=sys.stderr, flush=True)
            if missed := outcome.missed():
                print(f"{name}, {number} threads: above what is wanted: {', '.join(missed)}", file=sys.stderr)
            # after every case, since they take long
            page()
    print(page())
    for name, reason in not_measured.items():
        print(f"Not measured: {name}: {reason}", file=sys.stderr)
    if file is not None:
        print(f"Written: {file}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
