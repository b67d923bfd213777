# SPDX-License-Identifier: Apache-2.0
"""What a machine is asked before a training: bf16, one GPU for each process, memory kept for the next step."""

import ctypes
import os
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors_moma import EACH_DEVICE, InputError


if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments


# where `accelerate launch` says the precision
LAUNCHED_PRECISION = "ACCELERATE_MIXED_PRECISION"
# parameters of `mallopt`, from `malloc.h`
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# bytes from which on an allocation is one of its own, given back to the system as soon as it is freed
_LARGEST_KEPT = 2**30
_NEVER = -1
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def gains_by_bf16(device: "str | torch.device") -> bool:
    """Return whether the device multiplies matrices in bfloat16 faster than in float32.

    Elsewhere bfloat16 is emulated; or, on CPUs of Intel without matrix units, it takes twice the time.
    """
    # `moma` asks for memory before it knows whether torch is needed.
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    from ..cpu_moma import has_instructions, multiplies_with

    if multiplies_with("amx_bf16") or has_instructions("bf16"):
        return True
    is_intel = "Intel" in str(torch.cpu.get_capabilities().get("cpu_name", ""))
    return multiplies_with("avx512_bf16") and not is_intel


def trains_in_bf16(choice: str, device: "str | torch.device") -> bool:
    """Return whether a training computes in bfloat16."""
    return gains_by_bf16(device) if choice == "auto" else choice == "on"


def precision_fields(trainer: Mapping[str, Any], device: str) -> dict[str, bool]:
    """Return in which precision the Trainer computes where a recipe's section `trainer` does not say it."""
    if "bf16" in trainer or trainer.get("fp16"):
        return {}
    launched = os.environ.get(LAUNCHED_PRECISION, "no")
    return {launched: True} if launched in ("bf16", "fp16") else {"bf16": gains_by_bf16(device)}


def check_precision(training_arguments: "TrainingArguments") -> None:
    """Raise where `accelerate launch` says another precision than the training has, and would overrule it."""
    wanted = "bf16" if training_arguments.bf16 else "fp16" if training_arguments.fp16 else "no"
    if (launched := os.environ.get(LAUNCHED_PRECISION, "no")) not in ("no", wanted):
        raise InputError(
            f"accelerate's mixed_precision = {launched!r} (`accelerate launch --mixed_precision`, or its "
            f"configuration), and the recipe's section `trainer` says {wanted!r}: let both say the same."
        )


def refuse_data_parallel(args: "TrainingArguments"):
    """Raise `ValueError` where `Trainer` would take `DataParallel`, as it does for several GPUs of one process."""
    if args.n_gpu > 1:
        raise InputError(
            f"`args` has n_gpu = {args.n_gpu}, but copies that DataParallel makes lose what routers learn and what "
            f"hooks observe: {EACH_DEVICE}"
        )


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for this process, in place of handing large tensors back to the system.

    Gradients, logits and activations of a training step on a CPU are as large as those of the step before. Asked for
    anew, each of their pages is cleared and entered again, which takes 12 to 16 % of a step
    (`benchmarks/reports/2026-11-27-what-was-tried-cpu.md`). The peak grows by 2 to 5 %, and the process does not
    shrink before it ends.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _SETTINGS):
        return False
    set_option = ctypes.CDLL(None).mallopt
    return bool(set_option(_M_MMAP_THRESHOLD, _LARGEST_KEPT)) and bool(set_option(_M_TRIM_THRESHOLD, _NEVER))
