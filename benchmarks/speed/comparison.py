# SPDX-License-Identifier: Apache-2.0
"""Runs one case: builds its contenders, checks ours, times them in turn; and the report of all cases."""

import copy
import gc
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.speed import measures
from benchmarks.speed.cases import Case
from benchmarks.speed.measures import DECODE_STEPS, Quiet, Runner, in_turn, threads
from benchmarks.speed.models import SHAPES, Shape, build
from modeling_moma import MomaForCausalLM


# a decoding is short, and how many experts its few tokens meet under `threshold` changes from round to round
_DECODE_ROUNDS = 3
HEADER = "| case | threads | ours | against | ratio of time | at most | over bytes' floor | peak MiB |"
# cores that others keep busy above which figures of all threads say nothing: products wait for each other by spinning
LARGEST_LOAD = 0.15
# beside torch, what decides on the kernels that run
_LIBRARIES = {"Transformers": "transformers", "flash-attn": "flash-attn", "kernels": "kernels", "Triton": "triton"}


class BusyMachineError(RuntimeError):
    """Something else runs on this machine."""


@dataclass
class Row:
    """
    What one contender did in a case.

    Args:
        name: the contender.
        seconds: median of the rounds.
        ratio: ours to this one, median of the rounds' ratios.
        floor_ratio: time over the bytes that decoding reads at the bandwidth of the run.
        peak_bytes: what a training step holds at once beside weights, gradients and optimizer.
        launches: kernels that a step starts on a GPU.
        waits: how often the host waits for the GPU in a step.
    """

    name: str
    seconds: float
    ratio: float
    floor_ratio: float | None = None
    peak_bytes: int | None = None
    launches: float | None = None
    waits: float | None = None


@dataclass
class Outcome:
    """A case on so many threads of torch, the cores that others kept busy meanwhile, and its rows, ours first."""

    case: Case
    num_threads: int
    load: float
    rows: list[Row] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Ours to the fastest peer."""
        return max(row.ratio for row in self.rows[1:])

    def missed(self) -> dict[str, float]:
        """Figures above their bar, by `"ratio"` and `"floor"`; that of the floor is measured with details alone."""
        figures = {"ratio": (self.ratio, self.case.bar), "floor": (self.rows[0].floor_ratio, self.case.bar_of_floor)}
        return {
            name: figure
            for name, (figure, bar) in figures.items()
            if figure is not None and bar is not None and figure > bar
        }


def run_case(case: Case, num_threads: int, rounds: int, device: str, with_details: bool) -> Outcome:
    """
    Compares what a case names, in so many rounds; `with_details` also counts bytes, profiles on a GPU, and
    measures the memory.

    Raises `AssertionError` where ours is wrong, so that its time says nothing, and `BusyMachineError` where the
    machine did something else, and all threads of a CPU were asked for.
    """
    shape, dtype = SHAPES[case.shape], getattr(torch, case.dtype)
    names = [case.ours, *case.peers]
    with threads(num_threads):
        runners = [_runner(case, name, shape, dtype, device) for name in names]
        with Quiet() as quiet:
            times = in_turn(runners, rounds * (_DECODE_ROUNDS if case.kind == "decode" else 1))
        # beside a GPU the host has cores to spare, and a server is never quite idle: the load is told
        if num_threads > 1 and device == "cpu":
            check_quiet(quiet.load)
        outcome = Outcome(case, num_threads, quiet.load)
        for name, runner, own in zip(names, runners, times):
            # what both met in a round cancels
            ratio = statistics.median(mine / other for mine, other in zip(times[0], own))
            row = Row(name, statistics.median(own), ratio)
            if with_details:
                _add_details(row, case, runner, device)
            outcome.rows.append(row)
    del runners
    gc.collect()
    return outcome


def _runner(case: Case, name: str, shape: Shape, dtype: torch.dtype, device: str) -> Runner:
    model = build(name, shape, case.length, device)
    if isinstance(model, MomaForCausalLM):
        measures.check(copy.deepcopy(model), shape)
    return Runner(model, shape, case.kind, case.rows, case.length, dtype, case.text_share, case.packing)


def check_quiet(load: float) -> None:
    """Refuses what was timed beside other work, which kept so many cores busy."""
    if load > LARGEST_LOAD:
        raise BusyMachineError(
            f"other processes kept {load:.2f} cores busy while this was timed; at most {LARGEST_LOAD} leave figures "
            "that mean something. Stop them and begin again."
        )


def _add_details(row: Row, case: Case, runner: Runner, device: str) -> None:
    if case.kind == "decode":
        row.floor_ratio = row.seconds * measures.bandwidth(device) / measures.bytes_read(runner)
    if case.kind == "train":
        row.peak_bytes = measures.peak_bytes(runner)
    if device == "cuda":
        launches, waits = measures.count_calls(measures.profiled(runner))
        # none where a GPU may not be profiled
        if launches:
            steps = DECODE_STEPS if case.kind == "decode" else 1
            row.launches, row.waits = launches / steps, waits / steps


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


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def report(
    outcomes: Sequence[Outcome], command: str, rounds: int, device: str, machine: str, not_measured: Mapping[str, str]
) -> str:
    """A page of all cases; `not_measured` says why, by case."""
    lines = [
        f"# Speed, {date.today()}",
        "",
        f"`{command}`: contenders in turn in one process, medians of {rounds} rounds, ratios of each round's times"
        + (", freed memory kept. " if device == "cpu" else ". ")
        + f"{machine}.",
        "",
        HEADER,
        "|---|---:|---|---|---:|---:|---:|---:|",
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
    floor = "" if mine.floor_ratio is None else f"{mine.floor_ratio:.2f}"
    if case.bar_of_floor is not None and floor:
        floor += f" (at most **{case.bar_of_floor}**)" if "floor" in missed else f" (at most {case.bar_of_floor})"
    peaks = [row.peak_bytes for row in outcome.rows[:2]]
    cells = (
        case.name,
        outcome.num_threads,
        mine.name,
        fastest.name,
        f"{outcome.ratio:.3f}",
        f"**{bar}**" if "ratio" in missed else bar,
        floor,
        "" if None in peaks else f"{peaks[0] / 2**20:.1f} ({peaks[0] / peaks[1]:.2f})",
    )
    return "| " + " | ".join(map(str, cells)) + " |"
