# SPDX-License-Identifier: Apache-2.0
"""Tables of what was compared."""

import platform
from collections.abc import Sequence
from datetime import date

import torch

from benchmarks.speed.comparison import Outcome


HEADER = (
    "| case | threads | ours | against | ratio of time | at most | FLOP/s over products' | over bytes' floor | "
    "products and attention | peak MiB |"
)


def report(outcomes: Sequence[Outcome], command: str, rounds: int, device: str) -> str:
    """A page of all cases.

    Args:
        outcomes: what was measured.
        command: that measured it.
        rounds: timings of each contender.
        device: where.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({_cpu_name()})"
    lines = [
        f"# Speed, {date.today()}",
        "",
        f"`{command}`: contenders in turn in one process, medians of {rounds} rounds, ratios of each round's times"
        + (", freed memory kept. " if device == "cpu" else ". ")
        + f"torch {torch.__version__}, {name}.",
        "",
        HEADER,
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_line(outcome) for outcome in outcomes]
    lines += ["", "Each contender's own figures:", "", "| case | threads | contender | seconds | ours to it |"]
    lines.append("|---|---:|---|---:|---:|")
    for outcome in outcomes:
        for row in outcome.rows:
            cells = (outcome.case.name, outcome.num_threads, row.name, f"{row.seconds:.4f}", f"{row.ratio:.3f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _line(outcome: Outcome) -> str:
    case, mine = outcome.case, outcome.rows[0]
    fastest = max(outcome.rows[1:], key=lambda row: row.ratio)
    bar = "" if case.bar is None else f"{case.bar:.2f}"
    if outcome.is_met is False:
        bar = f"**{bar}**"
    floor = "" if mine.floor_ratio is None else f"{mine.floor_ratio:.2f}"
    if case.bar_of_floor is not None and floor:
        floor += f" (at most {case.bar_of_floor})"
    cells = (
        case.name,
        outcome.num_threads,
        mine.name,
        fastest.name,
        f"{outcome.ratio:.3f}",
        bar,
        "" if mine.rate_share is None else f"{mine.rate_share:.2f}",
        floor,
        "" if mine.matmul_share is None else f"{mine.matmul_share:.0%}",
        _peaks(outcome),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _peaks(outcome: Outcome) -> str:
    peaks = [row.peak_bytes for row in outcome.rows]
    if peaks[0] is None or peaks[1] is None:
        return ""
    return f"{peaks[0] / 2**20:.1f} ({peaks[0] / peaks[1]:.2f})"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
