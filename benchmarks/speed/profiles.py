# SPDX-License-Identifier: Apache-2.0
"""Where a piece of work spends its time, and how much memory it holds at once."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.speed.clock import seconds
from benchmarks.speed.work import Runner


# aten names that hold one of these are matrix products or attention, forward or backward
MATMUL_NAMES = ("mm", "linear", "matmul", "addmv", "dot_product", "flash_attention", "efficient_attention")


def own_seconds(
    work: Callable[[], object], device: str, prepare: Callable[[], object] = lambda: None, repeats: int = 2
) -> Counter:
    """Mean seconds that each operation of a piece of work takes by itself, on the device."""
    on_cuda = device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    own: Counter = Counter()
    for _ in range(repeats):
        prepare()
        with profile(activities=activities) as profiler:
            seconds(work, device)
        for event in profiler.key_averages():
            # kernels are counted with the operation that launched them
            if event.device_type == torch.autograd.DeviceType.CPU:
                own_us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
                own[event.key] += own_us / repeats / 1e6
    return own


def device_calls(work: Callable[[], object], prepare: Callable[[], object]) -> tuple[int, int]:
    """Kernels that a piece of work starts on a GPU, and how often the host waits for it meanwhile."""
    prepare()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    return count_calls(profiler.key_averages())


def count_calls(events: Iterable) -> tuple[int, int]:
    """Launches and waits among the calls of CUDA's runtime that a profile holds."""
    counts = Counter({event.key: event.count for event in events})
    launches = sum(number for name, number in counts.items() if name.startswith(("cudaLaunch", "cuLaunch")))
    return launches, sum(counts[name] for name in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"))


def is_matmul(name: str) -> bool:
    """Whether an operation is a matrix product or attention."""
    return any(part in name for part in MATMUL_NAMES) and "::" in name


def matmul_share(own: Counter) -> float | None:
    """The share of operations' time that is matrix products and attention; `None` where a GPU may not be profiled."""
    total = sum(own.values())
    return sum(value for name, value in own.items() if is_matmul(name)) / total if total else None


class PeakMemory(TorchDispatchMode):
    """
    The most bytes that tensors held at once, of those that were made under it.

    Args:
        known: tensors that were there before, of which views may be made under it.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor.untyped_storage())
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage)
        weakref.finalize(storage, self._leave, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _leave(self, size: int) -> None:
        self.now -= size


def peak_bytes(runner: Runner) -> int:
    """Bytes of what a training step makes and holds at once, without weights, gradients and optimizer."""
    runner.prepare()
    runner.work()
    known = [runner.ids_BT, *runner.model.parameters(), *runner.model.buffers()]
    # the gradients are there, and stay
    for parameter in runner.model.parameters():
        if parameter.grad is not None:
            known.append(parameter.grad.zero_())
    with PeakMemory(known) as memory:
        runner.work()
    return memory.peak
