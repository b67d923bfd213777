# SPDX-License-Identifier: Apache-2.0
"""A CUDA device, real or pretended, that tells how often a computation launches kernels and waits for it.

Tensors of the pretended one say `cuda:0`, and their numbers are computed on the CPU. It shows without a GPU what only
a GPU would: tensors of two devices in one operation, which it refuses with torch's own words; device syncs (`item`,
`tolist`, `nonzero`, masks as indices, copies to the host, blocking uploads); branches that ask for `device.type`; and
arguments that CUDA kernels refuse. It takes a torch that is built for CUDA, in a process that `launch.py` has started.
It is no measure of speed, and the kernels are those of the CPU.

    with open_device() as device:
        model.to("cuda")
        with device.counting() as counts:
            model(ids.to("cuda"))
    counts.launches, counts.waits
"""

import contextlib
import ctypes
import functools
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from helpers.cuda.launch import GUARD, ROOT


CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
GIB = 2**30
# operations that launch nothing, beside views
FREE = {
    *("_unsafe_view", "_reshape_alias", "lift_fresh", "is_same_size", "is_pinned", "resize_", "set_"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    # a copy to the host, which is counted as a wait
    "_local_scalar_dense",
}
# operations whose result the host has to read, or whose size only its numbers tell, and how often CUDA waits in them
WAITING = {
    **dict.fromkeys(("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim"), 1),
    **dict.fromkeys(("unique_consecutive", "grouped_mm_fallback", "grouped_mm_fallback_backward"), 1),
    # the least and the largest value
    "bincount": 2,
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"copy_", "_to_copy"}
PROJECT = tuple(f"{ROOT / name}{os.sep}" for name in ("modeling_moma", "tokenization"))
LIBRARIES = (os.path.dirname(torch.__file__) + os.sep, str(Path(__file__).parent) + os.sep)


def place() -> str:
    """The line of the project that is being run; where there is none, of the library that calls torch."""
    frame, outside = sys._getframe(1), None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PROJECT) or outside is None and not name.startswith(LIBRARIES):
            outside = f"{'/'.join(Path(name).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
            if name.startswith(PROJECT):
                return outside
        frame = frame.f_back
    return outside or "?"


@dataclass(eq=False)
class Counts:
    """What a computation asked of a device.

    Args:
        with_places: launches are told by operation and line, as waits are, and not by operation alone.
        kernels: launches by operation; none on a real device, which does not tell.
        constants: launches that read no tensor of the device: numbers that fill one, uploads.
        syncs: waits for the device, by operation and line.
    """

    with_places: bool = False
    kernels: Counter[str] = field(default_factory=Counter)
    constants: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        return self.kernels.total()

    @property
    def fills(self) -> int:
        return self.constants.total()

    @property
    def waits(self) -> int:
        return self.syncs.total()

    def launch(self, name: str, reads: bool = True):
        counter = self.kernels if reads else self.constants
        counter[f"{name} {place()}" if self.with_places else name] += 1

    def wait(self, name: str, times: int = 1):
        self.syncs[f"{name} {place()}"] += times

    def less(self, others: "Counts") -> "Counts":
        """What is here and not in others."""
        counters = ((getattr(self, name), getattr(others, name)) for name in ("kernels", "constants", "syncs"))
        return Counts(self.with_places, *(counter - other for counter, other in counters))

    def over(self, steps: int) -> "Counts":
        """What is one step's of several that are alike; of what not every step does, the nearest number."""

        def share(counter):
            return Counter({name: round(number / steps) for name, number in counter.items()})

        return Counts(self.with_places, share(self.kernels), share(self.constants), share(self.syncs))


class RealCuda:
    """The first GPU of this machine. It tells of waits alone."""

    is_pretended = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    @contextlib.contextmanager
    def counting(self, with_places: bool = False) -> Iterator[Counts]:
        """Counts what runs until the context ends."""
        counts = Counts(with_places)
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield counts
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        for warning in caught:
            if "called a synchronizing CUDA operation" in str(warning.message):
                counts.syncs[f"{warning.filename}:{warning.lineno}"] += 1


class CudaTensor(torch.Tensor):
    """A tensor that says it is on the device; `values` holds its numbers on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        # in inference mode a view of a parameter has to be an ordinary tensor, and all others may be one
        with torch.inference_mode(False):
            tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                values.size(),
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                layout=values.layout,
                device=CUDA,
            )
        tensor.values = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # in threads that autograd starts the mode is not on
        return PretendedCuda.current().operations.dispatch(func, args, kwargs or {})

    # with these two a module's `to` exchanges its parameters in place, so that ties and optimizers hold on to them
    def __tensor_flatten__(self):
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return CudaTensor(inner["values"])

    def __reduce_ex__(self, protocol):
        return self.values.detach().__reduce_ex__(protocol)

    def __repr__(self):
        return f"{self.values!r} on {CUDA}"


def is_on_device(value) -> bool:
    return isinstance(value, CudaTensor)


def values_of(value):
    return value.values if isinstance(value, CudaTensor) else value


def wrapped(value):
    """The same on the device, where it is a tensor of the CPU."""
    return CudaTensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor) else value


class PretendedCuda:
    """A device that is not there, for as long as the context lasts, and for the thread that enters it."""

    is_pretended = True
    _current: "PretendedCuda | None" = None

    def __init__(self):
        self.active: list[Counts] = []
        self.context = contextlib.ExitStack()
        self.operations = Operations(self)

    @classmethod
    def current(cls) -> "PretendedCuda":
        if cls._current is None:
            raise RuntimeError("a tensor of the pretended device is used after its context has ended")
        return cls._current

    def __enter__(self):
        # a guard of devices that does nothing
        torch._C._ensureCUDADeviceGuardSet()
        # autograd has a queue for each of so many devices; it asks once
        ctypes.CDLL(os.environ[GUARD]).pretend_devices(ctypes.c_int8(127))
        self.context.enter_context(mock.patch.object(PretendedCuda, "_current", self))
        for name, value in runtime(self).items():
            self.context.enter_context(mock.patch(name, value))
        # gradients are computed in this thread, and what a checkpoint computes again under these modes, too
        engine = torch.autograd.graph._engine_run_backward

        def run_backward(*args, **kwargs):
            with Functions(self):
                return engine(*args, **kwargs)

        self.context.enter_context(mock.patch("torch.autograd._engine_run_backward", run_backward))
        self.context.enter_context(torch.autograd.set_multithreading_enabled(False))
        self.context.enter_context(Functions(self))
        self.context.enter_context(self.operations)
        return self

    def __exit__(self, *exception):
        self.context.close()

    @contextlib.contextmanager
    def counting(self, with_places: bool = False) -> Iterator[Counts]:
        """Counts what runs until the context ends."""
        counts = Counts(with_places)
        self.active.append(counts)
        try:
            yield counts
        finally:
            self.active.remove(counts)

    def launch(self, name: str, reads: bool = True):
        """Counts a kernel, and whether it reads a tensor of the device."""
        for counts in self.active:
            counts.launch(name, reads)

    def wait(self, name: str, times: int = 1):
        """Counts a device sync."""
        for counts in self.active:
            counts.wait(name, times)


class Operations(TorchDispatchMode):
    """Every operation on its way to a device's kernel."""

    def __init__(self, device: PretendedCuda):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func, args, kwargs):
        """Runs an operation on the CPU, and counts what CUDA would have done."""
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        # by position or by name
        asked = next((leaf.type for leaf in leaves if isinstance(leaf, torch.device)), None)
        on_device = any(map(is_on_device, tensors))
        if not on_device and asked != "cuda":
            return func(*args, **kwargs)
        if func._can_decompose() and not has_kernel(func):
            # what autograd would have taken apart, in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        self.check_devices(name, args, tensors, on_device)
        if on_device:
            self.check_arguments(name, args, kwargs)
        self.count(func, name, args, kwargs, tensors, asked)
        if name == "copy_" and on_device and not is_on_device(args[0]):
            args[0].copy_(args[1].values)
            return args[0]
        plain_args, plain_kwargs = tree_map(values_of, (args, kwargs))
        plain_args, plain_kwargs = tree_map_only(torch.device, lambda device: CPU, (plain_args, plain_kwargs))
        result = on_the_cpu(func, name, plain_args, plain_kwargs)
        if asked == "cpu":
            return result
        result = tree_map(wrapped, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if on_device else result

    def check_devices(self, name, args, tensors, on_device):
        """Refuses what CUDA's operations refuse: any tensor of the host but a number."""
        if not on_device or name == "copy_":
            return
        if name in INDEXING:
            tensors = [args[0], *args[2:3]]
        strays = [tensor for tensor in tensors if not is_on_device(tensor) and tensor.dim() > 0]
        if strays or name in INDEXING and not is_on_device(args[0]):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {CUDA} and {CPU}! "
                f"(operation {name}, at {place()})"
            )

    def check_arguments(self, name, args, kwargs):
        """Refuses what a kernel of CUDA refuses, and a CPU's takes."""
        if name == "_grouped_mm":
            offsets = args[2] if len(args) > 2 else kwargs.get("offs")
            if args[0].dtype != args[1].dtype:
                raise RuntimeError(f"grouped_mm: types differ, {args[0].dtype} and {args[1].dtype}")
            if offsets is not None and (offsets.dtype != torch.int32 or not offsets.is_contiguous()):
                raise RuntimeError("grouped_mm: offsets have to be int32 and contiguous")
            if not all(map(is_aligned, args[:2])):
                shapes = [(tuple(t.shape), t.stride(), t.storage_offset(), t.dtype) for t in args[:2]]
                raise RuntimeError(f"grouped_mm: strides should be multiple of 16 bytes, got {shapes}")
        elif name == "histc" and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("histc does not have a deterministic implementation")

    def count(self, func, name, args, kwargs, tensors, asked):
        """Counts the kernel of an operation, and its waits."""
        if not (func.is_view or name in FREE):
            self.device.launch(name, reads=any(map(is_on_device, tensors)))
        blocking = not (kwargs.get("non_blocking") or name == "copy_" and args[2:3] == (True,))
        if name in COPIES and blocking:
            source = args[1] if name == "copy_" else args[0]
            target_is_host = not is_on_device(args[0]) if name == "copy_" else asked == "cpu"
            if is_on_device(source) and target_is_host:
                self.device.wait(f"{name} to the host")
            elif not is_on_device(source) and not target_is_host and source.numel():
                self.device.wait(f"{name} to the device")
        elif name in INDEXING:
            self.count_indices(name, args)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 2:
            self.device.wait(name)
        elif name == "_grouped_mm" and args[0].dtype != torch.bfloat16:
            self.device.wait("_grouped_mm, which reads offsets for want of a kernel")
        elif name in WAITING:
            self.device.wait(name, WAITING[name])

    def count_indices(self, name, args):
        """Counts the waits of indices: masks whose numbers tell the size, and what has to be uploaded."""
        is_filled = name != "index" and not is_on_device(args[2]) and args[2].numel() == 1
        for index in args[1]:
            if index is None:
                continue
            if index.dtype in (torch.bool, torch.uint8) and not is_filled:
                self.device.wait(f"{name} by a mask")
            elif not is_on_device(index) and index.dim() > 0:
                self.device.wait(f"{name}, an index to the device")


def has_kernel(func) -> bool:
    """Whether CUDA has a kernel for a whole operation that is defined by others."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA")


def on_the_cpu(func, name, args, kwargs):
    """An operation of CUDA, by a CPU."""
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": False}
    if name == "histc" and not args[0].is_floating_point():
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def is_aligned(tensor) -> bool:
    """Whether `grouped_mm` takes a tensor: rows or columns without gaps, each from a multiple of 16 bytes."""
    size = tensor.element_size()
    *batch, rows, columns = tensor.stride()
    *_, height, width = tensor.shape
    if columns == 1 and rows >= max(1, width):
        steps = [rows]
    elif rows == 1 and columns >= max(1, height):
        steps = [columns]
    else:
        return False
    return all(step * size % 16 == 0 for step in [*batch, *steps, tensor.storage_offset()])


def runtime(device: PretendedCuda) -> dict[str, Any]:
    """What takes the place of functions that would ask the driver, by name."""

    # a function for each name: dynamo has a table of them
    def returning(value):
        return lambda *args, **kwargs: value

    properties = SimpleNamespace(name="pretended", total_memory=80 * GIB, major=9, minor=0, multi_processor_count=132)
    constants = {
        "is_available": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (properties.major, properties.minor),
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "mem_get_info": (70 * GIB, properties.total_memory),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0),
    }
    silent = ("_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats", "ipc_collect")
    seeds = ("manual_seed", "manual_seed_all", "set_rng_state", "set_rng_state_all")
    state = torch.zeros(16, dtype=torch.uint8)
    states = {"get_rng_state": state, "get_rng_state_all": [state]}
    values = {**constants, **dict.fromkeys((*silent, *seeds), None), **states}
    randomness = {**dict.fromkeys(seeds, None), **states}
    return {
        **{f"torch.cuda.{name}": returning(value) for name, value in values.items()},
        **{f"torch.cuda.random.{name}": returning(value) for name, value in randomness.items()},
        "torch.cuda.device": lambda *args: contextlib.nullcontext(),
        "torch.cuda.synchronize": lambda *args: device.wait("synchronize"),
        "torch.accelerator.set_device_index": returning(None),
        "torch.Tensor.pin_memory": lambda tensor, *args: tensor,
        "torch.Tensor.is_pinned": lambda tensor, *args: False,
    }


class Functions(TorchFunctionMode):
    """What torch would hand to a library of CUDA, or to the driver, before any operation can be seen."""

    def __init__(self, device: PretendedCuda):
        super().__init__()
        self.device = device
        self.replaced: dict[Any, Callable] = {
            F.scaled_dot_product_attention: self.attention,
            F.rms_norm: self.rms_norm,
            torch.rms_norm: self.rms_norm,
            torch.tensor: functools.partial(self.make, torch.tensor),
            torch.as_tensor: functools.partial(self.make, torch.as_tensor),
            torch.Tensor.cuda: lambda tensor, *args, **kwargs: tensor.to(CUDA, **kwargs),
            torch.Tensor.new_tensor: self.new_tensor,
            torch.Tensor.to: self.to,
            torch.Tensor.tolist: self.tolist,
            torch.Tensor.__getitem__: self.get_item,
            torch.Tensor.__setitem__: self.set_item,
            # which tensors share one
            torch.Tensor.data_ptr: lambda tensor: values_of(tensor).data_ptr(),
            torch.Tensor.storage: lambda tensor: values_of(tensor).storage(),
            torch.Tensor.untyped_storage: lambda tensor: values_of(tensor).untyped_storage(),
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.replaced.get(func, func)(*args, **(kwargs or {}))

    def attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        """Scaled dot product attention, one launch."""
        rest = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if not is_on_device(query):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **rest)
        if attn_mask is not None and not is_on_device(attn_mask):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {CUDA} and {CPU}! "
                f"(the mask of an attention, at {place()})"
            )
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))

        def attend(query, key, value, mask):
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
            return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask, 0.0, **rest)[0]

        return Fused.apply("scaled_dot_product_attention", attend, query, key, value, attn_mask)

    def rms_norm(self, input, normalized_shape, weight=None, eps=None):
        """Root mean square norm, one launch."""
        if not is_on_device(input):
            return torch.rms_norm(input, normalized_shape, weight, eps)

        def normalize(x, weight):
            return torch.rms_norm(x.float(), normalized_shape, None if weight is None else weight.float(), eps).to(x)

        return Fused.apply("rms_norm", normalize, input, weight)

    def make(self, function, data, *, device=None, **kwargs):
        """A tensor of Python's numbers, which the host makes."""
        if device is None or torch.device(device).type != "cuda":
            return function(data, device=device, **kwargs)
        return function(data, **kwargs).to(CUDA)

    def new_tensor(self, tensor, data, *, dtype=None, device=None, **kwargs):
        """The same by a tensor's method."""
        device, dtype = tensor.device if device is None else device, tensor.dtype if dtype is None else dtype
        return self.make(torch.tensor, data, device=device, dtype=dtype, **kwargs)

    def to(self, tensor, *args, **kwargs):
        """A copy, where one is asked for."""

        def with_index(value):
            is_cuda = isinstance(value, (str, torch.device)) and torch.device(value).type == "cuda"
            return CUDA if is_cuda else value

        args, kwargs = tree_map(with_index, args), {name: with_index(value) for name, value in kwargs.items()}
        return tensor.to(*args, **kwargs)

    def tolist(self, tensor):
        """Numbers for Python, after a wait."""
        if is_on_device(tensor):
            self.device.wait("tolist")
        return values_of(tensor).tolist()

    def get_item(self, tensor, index):
        """Values at an index."""
        return torch.Tensor.__getitem__(tensor, self.index(tensor, index))

    def set_item(self, tensor, index, value):
        """Other values at an index."""
        torch.Tensor.__setitem__(tensor, self.index(tensor, index), value)

    def index(self, tensor, index):
        """An index in which lists and arrays have become tensors of the device."""
        if not is_on_device(tensor):
            return index

        def upload(part):
            if isinstance(part, (list, range)) or type(part).__name__ == "ndarray":
                self.device.wait("a list as an index, to the device")
                return CudaTensor(torch.as_tensor(part))
            return part

        return tuple(map(upload, index)) if isinstance(index, tuple) else upload(index)


class Fused(torch.autograd.Function):
    """One kernel, and one in the backward, for what is several operations on the CPU."""

    @staticmethod
    def forward(ctx, name, function, *tensors):
        PretendedCuda.current().launch(name)
        ctx.name, ctx.function = name, function
        ctx.save_for_backward(*tensors)
        with plainly():
            return CudaTensor(function(*(values_of(tensor) for tensor in tensors)))

    @staticmethod
    def backward(ctx, *gradients):
        PretendedCuda.current().launch(f"{ctx.name}_backward")
        with plainly(), torch.enable_grad():
            values = [None if tensor is None else values_of(tensor).detach() for tensor in ctx.saved_tensors]
            needed = [
                value.requires_grad_() for value, is_needed in zip(values, ctx.needs_input_grad[2:]) if is_needed
            ]
            result = ctx.function(*values)
            found = iter(torch.autograd.grad(result, needed, values_of(gradients[0]).to(result.dtype)))
        return None, None, *(CudaTensor(next(found)) if is_needed else None for is_needed in ctx.needs_input_grad[2:])


@contextlib.contextmanager
def plainly():
    """Operations on values in which autocast has had its say."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def open_device() -> "RealCuda | PretendedCuda | None":
    """The device of this process, to be entered; `None` where there is neither a real nor a pretended one."""
    if os.environ.get(GUARD):
        return PretendedCuda()
    return RealCuda() if torch.cuda.is_available() else None
