# SPDX-License-Identifier: Apache-2.0
"""What is timed, and where its time and memory go beside what the machine can do at best."""

import copy
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import DynamicCache, PreTrainedModel

from benchmarks.speed.models import PACKINGS, Shape, mixed_tokens
from modeling_moma import MomaForCausalLM


# steps of decoding in one piece of work, and the prompt before them
DECODE_STEPS, PROMPT_LENGTH = 16, 128
# of what is checked before it is timed: the prompt, and all tokens
CHECKED_PREFIX, CHECKED_LENGTH = 64, 96
_REPEATS = 9
# beyond what caches hold
_STREAMED_BYTES = 256 * 2**20


class Runner:
    """
    One model under one kind of work; `prepare()` is called before each timing, then `work()` is timed.

    Args:
        model: on its device.
        shape: gives the ids.
        kind: `"train"`, `"optimizer"`, `"prefill"` or `"decode"`.
        rows: of the batch.
        length: of the sequences.
        dtype: training runs under autocast to it with fp32 weights, as the Trainer does; inference with weights in it.
        text_share: share of words among the tokens.
        packing: a name of `PACKINGS`, by which rows hold several documents.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: Shape,
        kind: str,
        rows: int,
        length: int,
        dtype: torch.dtype,
        text_share: float = 0.5,
        packing: str | None = None,
    ):
        self.kind, self.dtype, self.device = kind, dtype, model.device
        is_training = kind in ("train", "optimizer")
        self.model = model.train(is_training) if is_training else model.to(dtype).eval()
        self._shape, self._rows, self._text_share, self._seed = shape, rows, text_share, 0
        self._total = PROMPT_LENGTH + DECODE_STEPS if kind == "decode" else length
        self._next_tokens()
        self.more = {"position_ids": PACKINGS[packing](rows, length).to(self.device)} if packing else {}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) if kind == "optimizer" else None
        self.cache: DynamicCache | None = None

    def _next_tokens(self) -> None:
        ids_BT = mixed_tokens(self._shape, self._rows, self._total, self._text_share, seed=self._seed)
        self.ids_BT = ids_BT.to(self.device)
        self._seed += 1

    def prepare(self) -> None:
        """What a timing needs and does not count; each time there are other tokens, the same for every contender."""
        self._next_tokens()
        if self.kind == "train":
            self.model.zero_grad()
        elif self.kind == "optimizer":
            self._step()
        elif self.kind == "decode":
            self.cache = DynamicCache(config=self.model.config)
            self._read(self.ids_BT[:, :PROMPT_LENGTH])

    def work(self) -> None:
        """What is timed."""
        if self.kind == "train":
            self._step()
        elif self.optimizer is not None:
            self.optimizer.step()
        elif self.kind == "prefill":
            self.cache = DynamicCache(config=self.model.config)
            self._read(self.ids_BT)
        else:
            for place in range(PROMPT_LENGTH, PROMPT_LENGTH + DECODE_STEPS):
                self._read(self.ids_BT[:, place : place + 1])

    def _step(self) -> None:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(input_ids=self.ids_BT, labels=self.ids_BT, use_cache=False, **self.more).loss
        loss.backward()

    @torch.no_grad()
    def _read(self, ids_BT: torch.Tensor) -> None:
        self.model(input_ids=ids_BT, cache=self.cache, use_cache=True, logits_to_keep=1, **self.more)


def check(model: MomaForCausalLM, shape: Shape) -> None:
    """
    Raises `AssertionError` where what is timed differs, in fp32, from the plain way: the default experts from one
    expert after the other, packed documents from eager attention, and a cached prompt with steps from no cache.
    """
    ids_BT = mixed_tokens(shape, 2, CHECKED_LENGTH).to(model.device)
    fast = copy.deepcopy(model).float()
    plain = copy.deepcopy(fast)
    plain.set_experts_implementation("eager")
    batch = {"input_ids": ids_BT, "labels": ids_BT, "use_cache": False}
    compare_gradients(fast, plain, **batch)
    attention = plain.config._attn_implementation
    # flash attention takes no fp32, and its lengths come with the data
    if "flash" not in attention:
        position_ids = PACKINGS["quarters"](*ids_BT.shape).to(model.device)
        plain.set_attn_implementation("eager")
        compare_gradients(fast, plain, position_ids=position_ids, **batch)
        plain.set_attn_implementation(attention)
    plain.load_state_dict(fast.state_dict())
    with torch.no_grad():
        expected_BTV = plain.eval()(input_ids=ids_BT, use_cache=False).logits
        cache = DynamicCache(config=fast.config)
        parts = [fast.eval()(input_ids=ids_BT[:, :CHECKED_PREFIX], cache=cache, use_cache=True).logits]
        for place in range(CHECKED_PREFIX, CHECKED_LENGTH):
            parts.append(fast(input_ids=ids_BT[:, place : place + 1], cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected_BTV, rtol=1e-3, atol=1e-4)


def compare_gradients(fast: MomaForCausalLM, plain: MomaForCausalLM, **batch: Any) -> None:
    """Raises `AssertionError` where gradients of a training step of two models with the first's weights differ."""
    gradients = []
    plain.load_state_dict(fast.state_dict())
    for model in (fast, plain):
        model.zero_grad()
        model.train()(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        expected = gradients[1][name]
        if (gradient is None) != (expected is None):
            raise AssertionError(f"{name}: one of the two ways has no gradient for it.")
        if gradient is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5, msg=name)


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
    """Watches what other processes take while something is timed: `load`, in cores."""

    def __enter__(self) -> "Quiet":
        self._began, self._others = time.perf_counter(), self._others_busy()
        return self

    def __exit__(self, *error):
        seconds = max(time.perf_counter() - self._began, 1e-9)
        self.load = max(0.0, self._others_busy() - self._others) / seconds

    @staticmethod
    def _others_busy() -> float:
        every, own = psutil.cpu_times(), psutil.Process().cpu_times()
        return every.user + every.system + every.nice - own.user - own.system


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall-clock time of one piece of work, with all that it leaves to the device."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def in_turn(runners: Sequence[Runner], rounds: int, warm_up: int = 2) -> list[list[float]]:
    """Seconds of every runner's work, round by round, the runners taking turns, each round beginning with another."""
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


def bandwidth(device: str) -> float:
    """Bytes a second that a product with one vector reads of a matrix beyond the caches."""
    rows = _STREAMED_BYTES // 4 // 4096
    matrix, vector = torch.randn(rows, 4096, device=device), torch.randn(4096, device=device)
    times = [seconds(lambda: torch.mv(matrix, vector), device) for _ in range(_REPEATS + 2)]
    return _STREAMED_BYTES / statistics.median(times[2:])


def bytes_read(runner: Runner) -> float:
    """Bytes of the weights that a piece of decoding has to read: all, of experts those that tokens chose."""
    model, read = runner.model, Counter()
    expert_bytes = {
        module: sum(parameter.nbytes for parameter in module.parameters()) / module.num_experts
        for module in model.modules()
        if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")
    }

    def count_experts(module, args, *_):
        index, weight = args[1], args[2]
        is_taken = weight.reshape(index.shape) != 0
        read["experts"] += index[is_taken].unique().numel() * expert_bytes[module]

    runner.prepare()
    handles = [module.register_forward_pre_hook(count_experts) for module in expert_bytes]
    handles.append(model.register_forward_pre_hook(lambda *_: read.update(steps=1)))
    runner.work()
    for handle in handles:
        handle.remove()
    embedding = model.get_input_embeddings().weight
    is_tied = model.get_output_embeddings().weight is embedding
    others = sum(parameter.nbytes for parameter in model.parameters())
    others -= sum(each * module.num_experts for module, each in expert_bytes.items())
    others -= 0 if is_tied else embedding.nbytes
    return others * read["steps"] + read["experts"]


def profiled(runner: Runner) -> list:
    """What torch's profiler says of a piece of work on a GPU."""
    runner.prepare()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        seconds(runner.work, "cuda")
    return list(profiler.key_averages())


def count_calls(events: Iterable) -> tuple[int, int]:
    """Launches of kernels and waits for the GPU among the calls of CUDA's runtime that a profile holds."""
    counts = Counter({event.key: event.count for event in events})
    launches = sum(number for name, number in counts.items() if name.startswith(("cudaLaunch", "cuLaunch")))
    # the end of a timing waits by cudaDeviceSynchronize, which the work itself does not call
    return launches, sum(counts[name] for name in ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"))


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors held at once, of those made under it; views may be made of `known` ones."""

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
