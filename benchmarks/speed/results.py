# SPDX-License-Identifier: Apache-2.0
"""Tables of what was compared."""

import platform
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.speed.comparison import Outcome


HEADER = (
    "| case | threads | ours | against | ratio of time | at most | FLOP/s over products' | over bytes' floor | "
    "products and attention | peak MiB |"
)


# beside torch, what decides on the kernels that run
_LIBRARIES = {"Transformers": "transformers", "flash-attn": "flash-attn", "kernels": "kernels", "Triton": "triton"}


def dated_file(folder: Path, subject: str) -> Path:
    """A dated file that is not there yet."""
    name, number = f"{date.today()}-{subject}", 1
    while (path := folder / (f"{name}.md" if number == 1 else f"{name}-{number}.md")).exists():
        number += 1
    return path


def environment(device: str) -> str:
    """What runs the cases: versions, and the machine."""
    cuda = f" (CUDA {torch.version.cuda})" if device == "cuda" else ""
    versions = [f"torch {torch.__version__}{cuda}"]
    versions += [f"{name} {_version(package)}" for name, package in _LIBRARIES.items()]
    machine = f"CPU ({_cpu_name()})"
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        machine = (
            f"{torch.cuda.get_device_name()}, compute capability {gpu.major}.{gpu.minor}, {total / 2**30:.0f} GiB "
            f"({free / 2**30:.0f} free at the start), beside {machine}"
        )
    return f"{', '.join(versions)}, Python {platform.python_version()}; {machine}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def report(
    outcomes: Sequence[Outcome],
    command: str,
    rounds: int,
    device: str,
    machine: str,
    not_measured: Mapping[str, str],
) -> str:
    """A page of all cases.

    Args:
        outcomes: what was measured.
        command: that measured it.
        rounds: timings of each contender.
        device: where.
        machine: see [`environment`].
        not_measured: why, by case.
    """
    lines = [
        f"# Speed, {date.today()}",
        "",
        f"`{command}`: contenders in turn in one process, medians of {rounds} rounds, ratios of each round's times"
        + (", freed memory kept. " if device == "cpu" else ". ")
        + f"{machine}.",
        "",
        HEADER,
        "|---|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_line(outcome) for outcome in outcomes]
    more = " launches a step | waits a step |" if device == "cuda" else ""
    lines += ["", "Each contender's own figures:", "", f"| case | threads | contender | seconds | ours to it |{more}"]
    lines.append("|---|---:|---|---:|---:|" + ("---:|---:|" if more else ""))
    for outcome in outcomes:
        for row in outcome.rows:
            cells = [outcome.case.name, outcome.num_threads, row.name, f"{row.seconds:.4f}", f"{row.ratio:.3f}"]
            if more:
                cells += ["" if number is None else f"{number:.0f}" for number in (row.launches, row.waits)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    if outcomes:
        load = max(outcome.load for outcome in outcomes)
        lines += ["", f"Other processes kept at most {load:.2f} cores of the host busy meanwhile."]
    if not_measured:
        lines += ["", "Not measured:", "", *(f"- {name}: {reason}" for name, reason in not_measured.items())]
    return "\n".join(lines) + "\n"


def _line(outcome: Outcome) -> str:
    case, mine = outcome.case, outcome.rows[0]
    fastest = max(outcome.rows[1:], key=lambda row: row.ratio)
    missed = outcome.missed()
    bar = "" if case.bar is None else f"{case.bar:.2f}"
    if "ratio" in missed:
        bar = f"**{bar}**"
    floor = "" if mine.floor_ratio is None else f"{mine.floor_ratio:.2f}"
    if case.bar_of_floor is not None and floor:
        floor += f" (at most **{case.bar_of_floor}**)" if "floor" in missed else f" (at most {case.bar_of_floor})"
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
