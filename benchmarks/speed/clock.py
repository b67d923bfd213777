# SPDX-License-Identifier: Apache-2.0
"""Times pieces of work in turn, on a machine that does nothing else."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import psutil
import torch

from benchmarks.speed.work import Runner


# cores that others keep busy above which figures of all threads say nothing: products wait for each other by spinning
LARGEST_LOAD = 0.15


class BusyMachineError(RuntimeError):
    """Something else runs on this machine."""


@contextmanager
def threads(number: int):
    """So many threads for the operations of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Quiet:
    """Watches what other processes take while something is timed."""

    def __enter__(self) -> "Quiet":
        self._process = psutil.Process()
        self._began, self._busy, self._own = time.perf_counter(), self._all_busy(), self._own_busy()
        return self

    def __exit__(self, *error):
        seconds = time.perf_counter() - self._began
        self.load = max(0.0, self._all_busy() - self._busy - (self._own_busy() - self._own)) / max(seconds, 1e-9)

    def check(self) -> None:
        """
        Refuses what was timed beside other work.

        Raises:
            BusyMachineError: others took more than a share of a core.
        """
        if self.load > LARGEST_LOAD:
            raise BusyMachineError(
                f"other processes kept {self.load:.2f} cores busy while this was timed; at most {LARGEST_LOAD} leave "
                "figures that mean something. Stop them and begin again."
            )

    @staticmethod
    def _all_busy() -> float:
        times = psutil.cpu_times()
        return times.user + times.system + times.nice

    def _own_busy(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall-clock time of one piece of work, with all that it leaves to the device."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def in_turn(runners: Sequence[Runner], rounds: int, warm_up: int = 2) -> list[list[float]]:
    """
    Seconds of every runner's work, round by round, the runners taking turns, each round beginning with another one.

    Args:
        runners: what to time.
        rounds: how often.
        warm_up: rounds before, which do not count.
    """
    times: list[list[float]] = [[] for _ in runners]
    turns = list(zip(runners, times))
    for number in range(warm_up + rounds):
        first = number % len(turns)
        for runner, own in [*turns[first:], *turns[:first]]:
            runner.prepare()
            value = seconds(runner.work, runner.device.type)
            if number >= warm_up:
                own.append(value)
    return times


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios: what both met in a round cancels."""
    return statistics.median(mine / other for mine, other in zip(times, others))
