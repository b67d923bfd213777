# SPDX-License-Identifier: Apache-2.0
"""Runs one case: builds its contenders, checks ours, times them in turn and sets the times against the floors."""

import copy
import gc
import statistics
from dataclasses import dataclass, field

import torch

from benchmarks.speed import floors, gate
from benchmarks.speed.cases import Case
from benchmarks.speed.clock import Quiet, in_turn, median_ratio, threads
from benchmarks.speed.contenders import build
from benchmarks.speed.profiles import device_calls, matmul_share, own_seconds, peak_bytes
from benchmarks.speed.shapes import SHAPES, Shape
from benchmarks.speed.work import DECODE_STEPS, Runner
from modeling_moma import MomaForCausalLM


# a decoding is short, and how many experts its few tokens meet under `threshold` changes from round to round
_DECODE_ROUNDS = 3


@dataclass
class Row:
    """
    What one contender did in a case.

    Args:
        name: the contender.
        seconds: median of the rounds.
        ratio: ours to this one, median of the rounds' ratios.
        rate_share: FLOP/s over those of matrix products of the same shapes, where something is computed at length.
        floor_ratio: time over the bytes that decoding reads at the bandwidth of the run.
        matmul_share: share of the operations' time that is matrix products and attention.
        peak_bytes: what a training step holds at once beside weights, gradients and optimizer.
        launches: kernels that a step starts on a GPU.
        waits: how often the host waits for the GPU in a step.
    """

    name: str
    seconds: float
    ratio: float
    rate_share: float | None = None
    floor_ratio: float | None = None
    matmul_share: float | None = None
    peak_bytes: int | None = None
    launches: float | None = None
    waits: float | None = None


@dataclass
class Outcome:
    """
    A case on so many threads.

    Args:
        case: what was compared.
        num_threads: of torch.
        load: cores that other processes kept busy.
        rows: ours first.
    """

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
    Compares what a case names.

    Args:
        case: the comparison.
        num_threads: for torch.
        rounds: timings of each contender.
        device: `"cpu"` or `"cuda"`.
        with_details: also count FLOPs and bytes, profile, and measure the memory.

    Raises:
        AssertionError: ours is wrong, so that its time says nothing.
        BusyMachineError: the machine did something else, and all threads of a CPU were asked for.
    """
    shape, dtype = SHAPES[case.shape], getattr(torch, case.dtype)
    names = [case.ours, *case.peers]
    with threads(num_threads):
        runners = [_runner(case, name, shape, dtype, device) for name in names]
        with Quiet() as quiet:
            times = in_turn(runners, rounds * (_DECODE_ROUNDS if case.kind == "decode" else 1))
        # beside a GPU the host has cores to spare, and a server is never quite idle: the load is told
        if num_threads > 1 and device == "cpu":
            quiet.check()
        outcome = Outcome(case, num_threads, quiet.load)
        for name, runner, own in zip(names, runners, times):
            row = Row(name, statistics.median(own), median_ratio(times[0], own))
            if with_details:
                _add_details(row, case, runner, shape, dtype, device)
            outcome.rows.append(row)
    del runners
    gc.collect()
    return outcome


def _runner(case: Case, name: str, shape: Shape, dtype: torch.dtype, device: str) -> Runner:
    model = build(name, shape, case.length, device)
    if isinstance(model, MomaForCausalLM):
        gate.check(copy.deepcopy(model), shape)
    return Runner(model, shape, case.kind, case.rows, case.length, dtype, case.text_share, case.packing)


def _add_details(row: Row, case: Case, runner: Runner, shape: Shape, dtype: torch.dtype, device: str) -> None:
    if case.kind in ("train", "prefill"):
        rate = floors.matmul_rate(shape, runner.tokens_per_work, dtype, device)
        row.rate_share = floors.flops(runner) / row.seconds / rate
    if case.kind == "decode":
        row.floor_ratio = row.seconds * floors.bandwidth(device) / floors.bytes_read(runner)
    if case.kind != "optimizer":
        row.matmul_share = matmul_share(own_seconds(runner.work, device, runner.prepare))
    if case.kind == "train":
        row.peak_bytes = peak_bytes(runner)
    if device == "cuda":
        steps = DECODE_STEPS if case.kind == "decode" else 1
        launches, waits = device_calls(runner.work, runner.prepare)
        # none where a GPU may not be profiled
        if launches:
            row.launches, row.waits = launches / steps, waits / steps
